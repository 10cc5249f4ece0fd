"""Rows of chat files, whatever their keys, to conversations.

| Format | Content it is recognised by |
|---|---|
| `messages` | a list of turns with role and content (under `messages`, `conversations`, ...) |
| `sharegpt` | a list of turns with from and value |
| `turns` | a list of question-answer pairs or of alternating texts, or a row that is itself a list of turns |
| `alpaca` | instruction, input (or context), output (or response), with `history` and `system` |
| `prompt-completion` | TRL's: two texts, or two lists of turns of which only the completion counts |
| `prompt-response` | prompt (or question, query, input) and response (or answer, output) |
| `text` | running text |

Contents are kept to the letter. Two turns of one side may follow each other: people write like that, and a template
that cannot show it says so. An empty system prompt is taken as none; one that stands as a
turn is counted.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from onecard.data.chats.conversation import BadRow, Conversation, Example, PlainText, Turn
from onecard.data.chats.turns import read_turn, with_system
from onecard.data.chats.words import BadTurn, check_text, describe

_TURN_LISTS = ("messages", "conversations", "conversation", "dialog", "turns")
_QUESTIONS = ("prompt", "question", "query", "input")
_ANSWERS = ("response", "answer", "output")
_ALPACA_INPUTS = ("input", "context")
_ALPACA_ANSWERS = ("output", "response", "answer", "completion")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def recognise(row: object) -> str | None:
    """Names the format of a row by its content; None where it looks like none of them."""
    if isinstance(row, str):
        return "text"
    if isinstance(row, list):
        return "turns" if row else None
    if not isinstance(row, dict):
        return None
    for key in _TURN_LISTS:
        if key in row:
            return _recognise_list(key, row[key])
    if "instruction" in row and _first_key(row, _ALPACA_ANSWERS):
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    if _first_key(row, _QUESTIONS) and _first_key(row, _ANSWERS):
        return "prompt-response"
    return "text" if "text" in row else None


def to_example(row: object, format: str) -> Example | BadRow:
    """Reads a row as the format that its file has.

    What is malformed comes back as a BadRow. Its kinds are `mixed formats`, `unknown format`, `missing key`,
    `no turns`, `unknown role`, `null content`, `empty turn`, `not text`, `broken characters`,
    `bad tool call`, `bad weight`, `two system prompts`, `two columns for one`, `bad tools`, `late system turn`,
    `wrong alternation`, `ends on user`, `ends on tool`, `no assistant turn` and `teaches nothing`.
    """
    found = recognise(row)
    if found is not None and found != format:
        return BadRow("mixed formats", f"it is in the {found} format, the file in {format}")
    if format not in _READERS:
        raise ValueError(f"format {format!r} is none of {', '.join(_READERS)}")
    if not isinstance(row, dict) and found != format:
        return BadRow("unknown format", f"it is {describe(row)}, the file is in the {format} format")
    if isinstance(row, dict) and (media := next((key for key in _MEDIA if row.get(key)), None)):
        return BadRow("not text", f"it has {media!r} beside its text; only text can be learned")
    try:
        return _READERS[format](row)
    except BadTurn as error:
        return BadRow(error.kind, error.reason)


def _recognise_list(key: str, turns: object) -> str:
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict):
        # A turn without its text key is still a turn of this format, and its row says what is missing.
        return "sharegpt" if "from" in first or ("value" in first and "role" not in first) else "messages"
    if first is not None:
        return "turns"
    return "messages" if key == "messages" else "sharegpt"


def _first_key(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in row), None)


def _value(row: Any, keys: tuple[str, ...]) -> Any:
    key = _first_key(row, keys)
    if key is None:
        named = " or ".join(repr(key) for key in keys)
        raise BadTurn("missing key", f"there is no {named} in it")
    return row[key]


def _one_of(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Gives the value under the first of the keys; what stands under another of them would be lost."""
    given = {key: row[key] for key in keys if row.get(key) not in (None, "")}
    if any(value != next(iter(given.values())) for value in given.values()):
        named = " and ".join(map(repr, given))
        raise BadTurn("two columns for one", f"it has {named}, of which only one can be used: join or drop the others")
    return next(iter(given.values())) if given else _value(row, keys)


def _read_listed(row: Any) -> Conversation:
    """Reads `messages` and `sharegpt`: the keys of each turn say which."""
    key = _first_key(row, _TURN_LISTS)
    if key is None:
        raise BadTurn("missing key", f"there is no {' or '.join(repr(name) for name in _TURN_LISTS[:2])} in it")
    return _conversation(with_system(row, _list_of_turns(row[key], key)), _tools(row.get("tools")))


def _list_of_turns(entries: object, key: str) -> list[Turn]:
    if entries is None:
        raise BadTurn("null content", f"{key!r} is null")
    if not isinstance(entries, list):
        raise BadTurn("not text", f"{key!r} is {describe(entries)}, not a list of turns")
    return [read_turn(entry, number) for number, entry in enumerate(entries, 1)]


def _read_bare(row: Any) -> Conversation:
    entries = row if isinstance(row, list) else _value(row, _TURN_LISTS)
    beside = {} if isinstance(row, list) else row
    tools = _tools(beside.get("tools"))
    if all(isinstance(entry, dict) for entry in entries):
        return _conversation(with_system(beside, _list_of_turns(entries, "the list")), tools)
    if all(isinstance(entry, list | tuple) for entry in entries):
        return _conversation(with_system(beside, _pairs(entries, "pair")), tools)
    sides = ("user", "assistant")
    texts = (check_text(text, f"turn {number} ({sides[(number - 1) % 2]})") for number, text in enumerate(entries, 1))
    turns = [Turn(sides[n % 2], text) for n, text in enumerate(texts)]  # type: ignore[arg-type]
    return _conversation(with_system(beside, turns), tools)


def _pairs(entries: Any, name: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(entries, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadTurn("missing key", f"{name} {number} is not a question and an answer, but {describe(pair)}")
        turns.append(Turn("user", check_text(pair[0], f"the question of {name} {number}")))
        turns.append(Turn("assistant", check_text(pair[1], f"the answer of {name} {number}")))
    return turns


def _history(row: dict[str, Any]) -> list[Turn]:
    found = row.get("history")
    if found not in (None, "") and not isinstance(found, list | tuple):
        raise BadTurn("not text", f"'history' is {describe(found)}, not a list of pairs")
    return _pairs(found or (), "history pair")


def _read_alpaca(row: Any) -> Conversation:
    instruction = _value(row, ("instruction",))
    addition = _one_of(row, _ALPACA_INPUTS) if _first_key(row, _ALPACA_INPUTS) else None
    if addition not in (None, ""):
        addition = check_text(addition, "the input")
        # Rows whose whole question lies in the input exist.
        instruction = (
            addition if instruction in (None, "") else f"{check_text(instruction, 'the instruction')}\n{addition}"
        )
    turns = (
        *_history(row),
        Turn("user", check_text(instruction, "the instruction")),
        Turn("assistant", check_text(_one_of(row, _ALPACA_ANSWERS), "the output")),
    )
    return _conversation(with_system(row, turns), _tools(row.get("tools")))


def _read_prompt_response(row: Any) -> Conversation:
    # A text to answer from is no second question, but nothing else would read it either.
    question, answer = _one_of(row, (*_QUESTIONS, "context")), _one_of(row, _ANSWERS)
    turns = (
        *_history(row),
        Turn("user", check_text(question, "the prompt")),
        Turn("assistant", check_text(answer, "the response")),
    )
    return _conversation(with_system(row, turns), _tools(row.get("tools")))


def _read_prompt_completion(row: Any) -> Conversation:
    """Reads TRL's rows. Texts become a turn each and go through the chat template, which TRL does not do with them."""
    prompt, completion = _value(row, ("prompt",)), _value(row, ("completion",))
    if not isinstance(prompt, list) and not isinstance(completion, list):
        turns = [
            Turn("user", check_text(prompt, "the prompt")),
            Turn("assistant", check_text(completion, "the completion")),
        ]
    else:
        listed = _list_of_turns(_as_turns(prompt, "user"), "prompt")
        asked = [replace(turn, counts=turn.role != "assistant") for turn in listed]
        turns = [*asked, *_list_of_turns(_as_turns(completion, "assistant"), "completion")]
    return _conversation(with_system(row, turns), _tools(row.get("tools")))


def _as_turns(entries: object, role: str) -> object:
    return [{"role": role, "content": entries}] if isinstance(entries, str) else entries


def _read_text(row: Any) -> PlainText:
    return PlainText(check_text(row if isinstance(row, str) else _value(row, ("text",)), "the text"))


def _tools(found: object) -> tuple[dict[str, Any], ...]:
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise BadTurn("bad tools", f"'tools' is text that is no JSON ({error})") from error
    if not found:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadTurn("bad tools", "'tools' is not a list of JSON schemas")
    try:
        json.dumps(found)
    except (TypeError, ValueError, RecursionError) as error:  # Parquet holds dates and bytes
        raise BadTurn("bad tools", f"'tools' holds what is no JSON ({error})") from error
    return tuple(found)


def _conversation(turns: tuple[Turn, ...], tools: tuple[dict[str, Any], ...]) -> Conversation:
    """Checks the order of the turns: what has nothing before it to answer, or nothing after it to learn, is refused."""
    given = turns
    turns = tuple(turn for turn in given if turn.role != "system" or turn.content)
    if not turns:
        raise BadTurn("no turns", "there are no turns in it")
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise BadTurn("late system turn", f"turn {number} is a system prompt; only the first turn can be one")
    if roles[0] in ("assistant", "tool"):
        raise BadTurn("wrong alternation", f"it begins with a turn of the {roles[0]}, which answers nothing")
    for number, (before, role) in enumerate(pairwise(roles), 2):
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadTurn("wrong alternation", f"turn {number} is a tool's, and no turn of the assistant called it")
    if "assistant" not in roles:
        raise BadTurn("no assistant turn", "no turn is the assistant's, so nothing can be learned from it")
    if roles[-1] != "assistant":
        raise BadTurn(f"ends on {roles[-1]}", f"its last turn is the {roles[-1]}'s, and no answer follows")
    if not any(turn.role == "assistant" and turn.counts for turn in turns):
        raise BadTurn("teaches nothing", "the weight of every turn of the assistant is 0")
    return Conversation(turns, tools, had_empty_system=len(turns) < len(given))


_READERS: dict[str, Callable[[Any], Example]] = {
    "messages": _read_listed,
    "sharegpt": _read_listed,
    "turns": _read_bare,
    "alpaca": _read_alpaca,
    "prompt-response": _read_prompt_response,
    "prompt-completion": _read_prompt_completion,
    "text": _read_text,
}
