"""Eight chats that a tiny model can learn by heart."""

import json
from pathlib import Path
from typing import Any

QUESTIONS = ("sun", "moon", "star", "sea", "wind", "tree", "bird", "stone")
ANSWERS = ("gold", "a pale lamp", "far", "salt and wide", "cold", "green old arms", "it sings", "heavy and grey")
CHATS = [
    [{"role": "user", "content": f"What is the {question}?"}, {"role": "assistant", "content": answer}]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]
TEXT = "\n".join(f"{turn['role']}: {turn['content']}" for chat in CHATS for turn in chat)


def write_chats(path: Path, chats: list[Any] = CHATS) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8", newline="\n")
    return path
