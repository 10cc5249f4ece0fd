"""One turn of a chat file: its role, its text, whether it counts."""

from collections.abc import Sequence
from typing import Any

from onecard.data.chats.conversation import Role, Turn
from onecard.data.chats.extras import REASONING, read_extras
from onecard.data.chats.words import BadTurn, check_text, describe, quote

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_SYSTEMS = ("system", "system_prompt")
_WEIGHTS = ("loss_weight", "weight", "train")
_EXTRAS = frozenset((*REASONING, "tool_calls", "function_call", "tool_call_id", "name"))


def read_turn(entry: object, number: int) -> Turn:
    """Reads turn `number` (from 1) of a list, of which only a system prompt may be empty. Raises BadTurn."""
    if not isinstance(entry, dict):
        raise BadTurn("null content" if entry is None else "not text", f"turn {number} is {describe(entry)}")
    name, value = _keys_of(entry, number)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        shown = quote(name) if isinstance(name, str) else describe(name)
        raise BadTurn("unknown role", f"turn {number} has the role {shown}; known are {', '.join(ROLES)}")
    place = f"turn {number} ({role})"
    extras = read_extras(entry, role, place) if not _EXTRAS.isdisjoint(entry) else {}
    if role == "system" and value in (None, ""):
        return Turn(role, "")
    if "tool_calls" in extras and value in (None, "", []):
        text = ""
    else:
        text = check_text(_join_parts(value, place) if isinstance(value, list) else value, place)
    return Turn(role, text, role != "assistant" or _counts(entry, place), extras)


def with_system(row: dict[str, Any], turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Puts a system prompt that stands beside the turns before them, if there is one."""
    value = next((row[key] for key in _SYSTEMS if row.get(key) not in (None, "")), None)
    if value is None:
        return tuple(turns)
    first = Turn("system", check_text(value, "the system prompt"))
    if not turns or turns[0].role != "system" or not turns[0].content:
        return first, *turns
    if turns[0] != first:
        raise BadTurn("two system prompts", "it has a system prompt beside its turns and another one as the first turn")
    return tuple(turns)


def _keys_of(entry: dict[str, Any], number: int) -> tuple[object, object]:
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in entry:
            # Calls of tools stand in place of a content.
            if text_key not in entry and not (entry.get("tool_calls") or entry.get("function_call")):
                raise BadTurn("missing key", f"turn {number} has no {text_key!r}")
            return entry[role_key], entry.get(text_key)
    raise BadTurn("missing key", f"turn {number} has no 'role' (or 'from'), it is {describe(entry)}")


def _join_parts(parts: list[Any], place: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if kind not in ("text", "input_text", "output_text"):
                raise BadTurn("not text", f"{place} has a part of the type {kind!r}; only text can be learned")
            part = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
        if not isinstance(part, str):
            raise BadTurn("null content" if part is None else "not text", f"a part of {place} is {describe(part)}")
        texts.append(part)
    return "".join(texts)


def _counts(entry: dict[str, Any], place: str) -> bool:
    for key in _WEIGHTS:
        weight = entry.get(key)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise BadTurn("bad weight", f"the {key!r} of {place} is {weight!r}; a turn counts (1) or not (0)")
        if not weight:
            return False
    return True
