"""What a message has beside its content: calls of tools, reasoning, and whom a tool answers."""

import json
from typing import Any

from onecard.data.chats.conversation import Role
from onecard.data.chats.words import BadTurn, check_text, describe

# Templates call it differently, and look at one of them.
REASONING = ("reasoning_content", "reasoning", "thinking")
_OF_TOOLS = ("tool_call_id", "name")


def read_extras(entry: dict[str, Any], role: Role, place: str) -> dict[str, Any]:
    """Reads the keys beside the content that a template may show; raises BadTurn.

    Calls come out as OpenAI's API has them, with arguments as an object; bare ones and the older `function_call`, too.
    """
    extras: dict[str, Any] = {}
    if role == "assistant":
        calls = entry.get("tool_calls") or ([entry["function_call"]] if entry.get("function_call") else [])
        if calls:
            extras["tool_calls"] = _read_calls(calls, place)
        thoughts = next((entry[key] for key in REASONING if entry.get(key)), None)
        if thoughts is not None:
            extras |= dict.fromkeys(REASONING, check_text(thoughts, f"the reasoning of {place}"))
    elif role == "tool":
        extras |= {key: entry[key] for key in _OF_TOOLS if isinstance(entry.get(key), str) and entry[key]}
    return extras


def _read_calls(found: object, place: str) -> list[dict[str, Any]]:
    if isinstance(found, str):
        found = _parse(found, place)
    calls = found if isinstance(found, list) else [found]
    return [_read_call(call, f"call {number} of {place}") for number, call in enumerate(calls, 1)]


def _read_call(call: object, place: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = _parse(call, place)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadTurn("bad tool call", f"{place} is {describe(call)}; it takes a function with name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parse(arguments, f"the arguments of {place}")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadTurn("bad tool call", f"the arguments of {place} are {describe(arguments)}, not an object")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError, RecursionError) as error:  # Parquet holds dates and bytes
        raise BadTurn("bad tool call", f"the arguments of {place} hold what is no JSON ({error})") from error
    assert isinstance(call, dict)
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **known, "function": {"name": function["name"], "arguments": arguments}}


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTurn("bad tool call", f"{place} is text that is no JSON ({error})") from error
