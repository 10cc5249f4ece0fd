"""Spoils an input of a working command by chance: bytes of any file, parts of a document, values of flags."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from malformed_cases import LAST_CHAT

_ODD: tuple[Any, ...] = (
    *(None, True, "", "many", -1, 0, 2.5, 1e308, 10**30, float("nan"), float("inf")),
    *([], {}, [1, "a"], {"a": {"b": 1}}, "\u0000", "x" * 5000, "../../..", "\u202eabc"),
)


@dataclass(frozen=True)
class Draw:
    """A command, the input of it that is spoiled, and how often; `names` are words its message must have."""

    words: str
    target: str
    way: Callable[[Path, random.Random], str]
    times: int = 3
    names: tuple[str, ...] | None = None
    stdin: bytes = b""

    def spoil(self, place: Path, draw: random.Random) -> str:
        """Spoils the input; says how."""
        return self.way(place / self.target, draw)


def bytes_of(path: Path, draw: random.Random) -> str:
    """Flips, cuts, empties, fills or doubles parts of a file."""
    content = bytearray(path.read_bytes())
    how = draw.choice(("flip", "flip", "cut", "zeros", "noise", "swap"))
    at = draw.randrange(len(content))
    if how == "flip":
        for _ in range(draw.choice((1, 4, 32))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "zeros":
        size = draw.choice((1, 16, 200))
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif how == "noise":
        content[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
    else:
        content = content[at:] + content[:at]
    path.write_bytes(content)
    return f"{how} at {at}"


def parts_of_json(path: Path, draw: random.Random) -> str:
    """Removes, renames or replaces a part of a JSON document."""
    document = json.loads(path.read_text(encoding="utf-8"))
    told = _change(document, draw)
    path.write_text(json.dumps(document), encoding="utf-8")
    return told


def parts_of_lines(path: Path, draw: random.Random) -> str:
    """Removes, renames or replaces a part of one line of JSON."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = draw.randrange(len(lines))
    row = json.loads(lines[number])
    told = _change(row, draw)
    lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {number + 1}: {told}"


def parts_of_yaml(path: Path, draw: random.Random) -> str:
    """Removes, renames or replaces a part of a recipe."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    told = _change(document, draw)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return told


def _change(document: Any, draw: random.Random) -> str:
    holder = document
    path: list[Any] = []
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        path.append(key)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            holder = inner
            continue
        break
    how = draw.choice(("remove", "rename", "replace", "replace", "replace"))
    place = ".".join(map(str, path))
    if how == "remove":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict) and isinstance(key, str) and len(key) > 2:
        at = draw.randrange(len(key))
        holder[key[:at] + key[at + 1 :]] = holder.pop(key)
    else:
        holder[key] = value = draw.choice(_ODD)
        return f"{place} = {str(value)[:40]!r}"
    return f"{how} {place}"


def recipe_of_flags(path: Path, draw: random.Random) -> str:
    """Writes a recipe in which one key of all there are has an odd value."""
    from onecard.spec.accepts import FIELDS

    key = draw.choice([key for key in FIELDS if key not in ("name", "description", "run_name")])
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document[key] = value = draw.choice(_ODD)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return f"{key} = {str(value)[:40]!r}"


_BASE = (
    "generate base --prompt a",
    "serve base --port 0",
    "export base --to hf --output out",
    "export base --to gguf --output out",
    "evaluate base --text text.txt",
    "train chat.yaml",
)
_BASE_FILES = {
    "config.json": (parts_of_json, bytes_of),
    "model.safetensors": (bytes_of,),
    "tokenizer.json": (parts_of_json, bytes_of),
    "tokenizer_config.json": (bytes_of,),
}
_RUN = (
    ("report run", "run/plan.json"),
    ("resume run", "run/plan.json"),
    ("compare run chatrun", "run/plan.json"),
    ("plan --explain run", "run/plan.json"),
    ("monitor run --once", "run/plan.json"),
    ("report run", "run/events.jsonl"),
    ("replay run --step 3", "run/events.jsonl"),
    ("monitor run --once", "run/events.jsonl"),
    ("compare run chatrun", "run/events.jsonl"),
    ("resume run", "run/recipe.yaml"),
    ("replay run --step 3", "run/recipe.yaml"),
    ("generate run --prompt a", "run/checkpoints/step-000004/manifest.json"),
    ("evaluate run", "run/checkpoints/step-000002/manifest.json"),
    ("serve run --port 0", "run/checkpoints/step-000004/config.json"),
    ("export run --to hf", "run/checkpoints/step-000004/tokenizer.json"),
    ("resume run/checkpoints/step-000002", "run/checkpoints/step-000002/progress.json"),
    ("chat chatrun", f"{LAST_CHAT}/adapter_model.safetensors"),
    ("chat chatrun", f"{LAST_CHAT}/adapter_config.json"),
)
_PARTS = {".json": parts_of_json, ".jsonl": parts_of_lines, ".yaml": parts_of_yaml}


def _drawn() -> list[Draw]:
    found = [
        Draw("train tiny.yaml", "tiny.yaml", recipe_of_flags, 40, ()),
        Draw("train chat.yaml", "chat.yaml", recipe_of_flags, 25, ()),
        Draw("plan tiny.yaml", "tiny.yaml", parts_of_yaml, 8, ()),
        Draw("plan tiny.yaml --card rtx-3060", "tiny.yaml", recipe_of_flags, 8, ()),
        Draw("prepare chat.yaml", "chat.yaml", parts_of_yaml, 8, ()),
        Draw("train tiny.yaml", "tiny.yaml", bytes_of, 8, ()),
        Draw("prepare chat.yaml", "chats.jsonl", parts_of_lines, 10),
        Draw("train chat.yaml", "chats.jsonl", bytes_of, 5),
        Draw("prepare tiny.yaml", "text.txt", bytes_of, 4),
    ]
    for name in ("text.jsonl", "text.json", "text.jsonl.gz", "text.tar", "text.parquet"):
        found.append(Draw(f"prepare tiny.yaml --dataset {name}", name, bytes_of, 4))
    found.append(Draw("prepare chat.yaml --dataset chats.parquet", "chats.parquet", bytes_of, 4))
    number = 0
    for name, ways in _BASE_FILES.items():
        for way in ways:
            for _ in range(3):
                found.append(Draw(_BASE[number % len(_BASE)], f"base/{name}", way, 2, ("base",)))
                number += 1
    for words, target in _RUN:
        way = _PARTS.get(Path(target).suffix, bytes_of)
        found.append(Draw(words, target, way, 2, ()))
        found.append(Draw(words, target, bytes_of, 2, ()))
    scored = "evaluate --tasks ifeval --responses responses.jsonl --ifeval-data ifeval.jsonl"
    for name in ("responses.jsonl", "ifeval.jsonl"):
        found += [Draw(scored, name, parts_of_lines, 3), Draw(scored, name, bytes_of, 2)]
    return found


DRAWS = tuple(_drawn())
