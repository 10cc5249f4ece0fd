"""STUB, to be replaced."""

from typing import Any

from onecard.data.chats.conversation import BadRow, Conversation, Example, PlainText, Turn

_ROLES = {"human": "user", "gpt": "assistant"}


def recognise(row: Any) -> str | None:
    if isinstance(row, list):
        return "turns"
    if isinstance(row, str):
        return "text"
    if not isinstance(row, dict):
        return None
    for name, key in (
        ("messages", "messages"),
        ("sharegpt", "conversations"),
        ("alpaca", "instruction"),
        ("prompt/response", "response"),
        ("text", "text"),
    ):
        if key in row:
            return name
    return None


def to_example(row: Any, format: str) -> Example | BadRow:
    if format == "text":
        return PlainText(row if isinstance(row, str) else row["text"])
    if format == "prompt/response":
        pairs = [("user", row.get("prompt")), ("assistant", row["response"])]
    elif format == "alpaca":
        pairs = [(role, text) for q, a in row.get("history") or [] for role, text in (("user", q), ("assistant", a))]
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        pairs += [("user", question), ("assistant", row["output"])]
    elif format == "sharegpt":
        pairs = [(_ROLES.get(turn["from"], turn["from"]), turn["value"]) for turn in row["conversations"]]
        if row.get("system"):
            pairs.insert(0, ("system", row["system"]))
    else:
        turns = row if format == "turns" else row["messages"]
        pairs = []
        for turn in turns:
            content = turn["content"]
            if isinstance(content, list):
                content = "".join(part.get("value") or part.get("text") for part in content)
            pairs.append((turn["role"], content))
    for role, text in pairs:
        if role not in ("system", "user", "assistant", "tool"):
            return BadRow("unknown role", f"role {role!r} is none of system, user, assistant, tool")
        if not isinstance(text, str):
            return BadRow("no text", f"the {role}'s turn is {text!r}, not text")
    return Conversation(tuple(Turn(role, text) for role, text in pairs))  # type: ignore[arg-type]
