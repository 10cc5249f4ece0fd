"""Rows of every format become the same conversation, and rows that cannot be used say why."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from onecard.data.chats.conversation import BadRow, Conversation, PlainText, Turn
from onecard.data.chats.formats import recognise, to_example

U, A, S, T = (lambda text, role=role: Turn(role, text) for role in ("user", "assistant", "system", "tool"))
PLAIN = Conversation((U("Hi"), A("Hello")))
UNLED = replace(PLAIN, had_empty_system=True)
KIND = Conversation((S("Be kind."), U("Hi"), A("Hello")))
LED_TWICE = replace(KIND, had_empty_system=True)
LONG = Conversation((U("Hi"), A("Hello"), U("And?"), A("Yes.")))


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": content, **more}


def of_turns(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


HI, HELLO = turn("user", "Hi"), turn("assistant", "Hello")
ASKED = [said("human", "Hi"), said("gpt", "Hello")]
GOOD: list[tuple[Any, str, Any]] = [
    ({"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}, "messages", PLAIN),
    ({"prompt": "x", "messages": [turn("USER", "Hi"), turn("model", "Hello")]}, "messages", PLAIN),
    ({"conversations": [turn("user", "Hi"), turn("assistant", "Hello")]}, "messages", PLAIN),
    (
        of_turns(turn("user", [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]), turn("gpt", ["Hello"])),
        "messages",
        PLAIN,
    ),
    ({"messages": [turn("developer", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello")]}, "messages", KIND),
    ({"messages": [turn("system", ""), turn("user", "Hi"), turn("assistant", "Hello")]}, "messages", UNLED),
    (of_turns(turn("system", ""), HI, HELLO) | {"system": "Be kind."}, "messages", LED_TWICE),
    ({"conversations": [said("human", "Hi"), said("gpt", "Hello")], "system": "Be kind."}, "sharegpt", KIND),
    ({"conversations": [said("system", "Be kind."), *ASKED], "system": "Be kind."}, "sharegpt", KIND),
    ({"conversations": [said("human", "Hi"), said("chatgpt", "Hello")], "system": ""}, "sharegpt", PLAIN),
    (
        {
            "conversations": [ASKED[0], said("function_call", "f()"), said("observation", "1"), said("gpt", "One")],
            "tools": '[{"name": "f"}]',
        },
        "sharegpt",
        Conversation((U("Hi"), A("f()"), T("1"), A("One")), ({"name": "f"},)),
    ),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", PLAIN),
    ({"instruction": "Hi", "input": None, "output": "Hello", "history": None, "system": "Be kind."}, "alpaca", KIND),
    ({"instruction": "And?", "output": "Yes.", "history": [["Hi", "Hello"]]}, "alpaca", LONG),
    ({"instruction": "Sum", "context": "1 2", "response": "3"}, "alpaca", Conversation((U("Sum\n1 2"), A("3")))),
    ({"instruction": "", "input": "Hi", "output": "Hello"}, "alpaca", PLAIN),
    ({"prompt": "Hi", "response": "Hello"}, "prompt-response", PLAIN),
    ({"question": "Hi", "answer": "Hello", "system_prompt": "Be kind."}, "prompt-response", KIND),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion", PLAIN),
    ({"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello")]}, "prompt-completion", PLAIN),
    ([turn("user", "Hi"), turn("assistant", "Hello")], "turns", PLAIN),
    ([["Hi", "Hello"], ["And?", "Yes."]], "turns", LONG),
    (["Hi", "Hello", "And?", "Yes."], "turns", LONG),
    ({"dialog": ["Hi", "Hello"], "system": "Be kind."}, "turns", KIND),
    ({"text": "Once."}, "text", PlainText("Once.")),
    ("Once.", "text", PlainText("Once.")),
    ({"messages": [turn("user", "Hi"), turn("user", "And?"), turn("assistant", "Hello")]}, "messages",
     Conversation((U("Hi"), U("And?"), A("Hello")))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "format", "example"), GOOD)
def test_rows_are_recognised_and_read(row: Any, format: str, example: Any) -> None:
    assert recognise(row) == format
    assert to_example(row, format) == example


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "f", "parameters": {"x": 1}}}]},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_calls_of_tools_are_read_however_they_are_written(given: dict[str, Any]) -> None:
    answered = turn("tool", "1", tool_call_id="a", name="f")
    example = to_example(of_turns(HI, turn("assistant", None, **given), answered, HELLO), "messages")
    called, result = Turn("assistant", "", extras={"tool_calls": [CALL]}), {"tool_call_id": "a", "name": "f"}
    assert example == Conversation((U("Hi"), called, Turn("tool", "1", extras=result), A("Hello")))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_passed_under_every_name(key: str) -> None:
    example = to_example(of_turns(HI, turn("assistant", "Hello", **{key: "Hm."})), "messages")
    assert isinstance(example, Conversation)
    assert example.turns[1].message == turn(
        "assistant", "Hello", reasoning_content="Hm.", reasoning="Hm.", thinking="Hm."
    )


def test_contents_are_kept_to_the_letter() -> None:
    row = {"messages": [turn("user", "  Hi\r\n"), turn("assistant", "\tHello 🙂 ")]}
    assert to_example(row, "messages") == Conversation((U("  Hi\r\n"), A("\tHello 🙂 ")))


@pytest.mark.parametrize("weight", [{"loss_weight": 0.0}, {"weight": 0}, {"train": False}])
def test_turns_of_no_weight_do_not_count(weight: dict[str, Any]) -> None:
    row = {
        "messages": [
            turn("user", "a", loss_weight=0.0),
            turn("assistant", "b", **weight),
            turn("user", "c"),
            turn("gpt", "d", weight=1.0, train=None),
        ]
    }
    example = to_example(row, "messages")
    assert isinstance(example, Conversation)
    assert [one.counts for one in example.turns] == [True, False, True, True]


def test_of_a_prompt_in_turns_only_the_completion_counts() -> None:
    row = {
        "prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
        "completion": [turn("assistant", "d")],
    }
    example = to_example(row, "prompt-completion")
    assert isinstance(example, Conversation)
    assert [one.counts for one in example.turns if one.role == "assistant"] == [False, True]


BAD: list[tuple[Any, str, str, str]] = [
    (of_turns(HI, turn("narrator", "x")), "messages", "unknown role", "turn 2 .*'narrator'"),
    (of_turns(HI, turn(None, "x")), "messages", "unknown role", "turn 2 .*null"),
    (of_turns(HI, turn("assistant", " \n")), "messages", "empty turn", "turn 2"),
    (of_turns(HI, turn("assistant", [])), "messages", "empty turn", "turn 2"),
    (of_turns(turn("user", None), HELLO), "messages", "null content", "turn 1"),
    (of_turns(HI, turn("assistant", 3.5)), "messages", "not text", r"turn 2 .*a number \(3\.5\)"),
    (of_turns(HI, turn("assistant", True)), "messages", "not text", "true"),
    (of_turns(HI, turn("assistant", {"a": 1})), "messages", "not text", "an object"),
    (of_turns(turn("user", [{"type": "image_url", "image_url": {}}]), HELLO), "messages", "not text", "'image_url'"),
    (of_turns(turn("user", [{"type": "text", "text": None}]), HELLO), "messages", "null content", "null"),
    (of_turns(HI, None), "messages", "null content", "turn 2"),
    (of_turns(HI, "Hello"), "messages", "not text", "turn 2"),
    (of_turns(HI, HELLO, HI), "messages", "ends on user", "no answer"),
    (of_turns(HI, HELLO, turn("tool", "1")), "messages", "ends on tool", "no answer"),
    (of_turns(HI), "messages", "no assistant turn", "assistant"),
    (of_turns(HELLO, HI, HELLO), "messages", "wrong alternation", "answers nothing"),
    (of_turns(HI, turn("tool", "1"), HELLO), "messages", "wrong alternation", "turn 2"),
    (of_turns(HI, turn("system", "x"), HELLO), "messages", "late system turn", "turn 2"),
    (of_turns(), "messages", "no turns", "no turns"),
    ({"messages": None}, "messages", "null content", "null"),
    (of_turns(HI, {"role": "assistant"}), "messages", "missing key", "turn 2 has no 'content'"),
    (of_turns(HI, {"content": "x"}), "messages", "missing key", "turn 2 has no 'role'"),
    (of_turns(HI, turn("assistant", None, tool_calls=[{"id": "f"}])), "messages", "bad tool call", "call 1 of turn 2"),
    (of_turns(HI, turn("assistant", "x", tool_calls="f(")), "messages", "bad tool call", "no JSON"),
    (of_turns(HI, turn("gpt", "x", function_call={"name": "f", "arguments": "[1]"})), "messages", "bad tool call",
     "a list of 1, not an object"),
    (of_turns(HI, turn("assistant", "x", reasoning_content=3)), "messages", "not text", "the reasoning of turn 2"),
    (of_turns(HI, turn("assistant", None, reasoning_content="y")), "messages", "null content", "turn 2"),
    (of_turns(HI, turn("assistant", "x", weight=0.5)), "messages", "bad weight", "0.5"),
    (of_turns(HI, turn("assistant", "x", weight=0)), "messages", "teaches nothing", "0"),
    (of_turns(HI, turn("assistant", "\ud83d")), "messages", "broken characters", r"U\+D83D"),
    ({"messages": [HI, HELLO], "tools": "f("}, "messages", "bad tools", "JSON"),
    ({"conversations": [said("human", "Hi")]}, "sharegpt", "no assistant turn", "assistant"),
    ({"instruction": "Hi", "output": None}, "alpaca", "null content", "output"),
    ({"instruction": "Hi"}, "alpaca", "missing key", "'output'"),
    ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "alpaca", "missing key", "history pair 1"),
    ({"instruction": "Hi", "output": "x", "history": 5}, "alpaca", "not text", r"'history' is a number \(5\)"),
    ({"instruction": "Hi", "output": "x", "response": "y"}, "alpaca", "two columns for one", "'output' and 'response'"),
    ({"question": "Hi", "response": "x", "context": "y"}, "prompt-response", "two columns for one", "'context'"),
    ({"prompt": "Hi", "input": "y", "output": "x"}, "prompt-response", "two columns for one", "'prompt' and 'input'"),
    ({"messages": [HI, HELLO], "images": ["a.png"]}, "messages", "not text", "'images' beside its text"),
    (of_turns(turn("system", "x"), HI, HELLO) | {"system": "y"}, "messages", "two system prompts", "first turn"),
    (of_turns(turn("x" * 999, "y")), "messages", "unknown role", "'x{20,60}…"),
    ({"messages": [HI, HELLO], "tools": "[" * 9999}, "messages", "bad tools", "JSON"),
    ({"messages": [HI, HELLO], "tools": [{"f": b"x"}]}, "messages", "bad tools", "bytes"),
    ({"prompt": "Hi"}, "prompt-response", "missing key", "'response'"),
    ({"prompt": "Hi", "response": 3}, "prompt-response", "not text", "number"),
    (["Hi", "Hello", "Bye"], "turns", "ends on user", "user"),
    (["Hi", 3], "turns", "not text", "turn 2"),
    ({"text": ""}, "text", "empty turn", "text"),
    ({"text": None}, "text", "null content", "null"),
    ({"prompt": "Hi", "response": "x"}, "messages", "mixed formats", "prompt-response .* messages"),
    (7, "messages", "unknown format", "number"),
    ({}, "messages", "missing key", "'messages'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "format", "kind", "reason"), BAD)
def test_rows_that_cannot_be_used_say_why(row: Any, format: str, kind: str, reason: str) -> None:
    found = to_example(row, format)
    assert isinstance(found, BadRow), found
    assert found.kind == kind
    assert re.search(reason, found.reason), found.reason


@pytest.mark.parametrize("row", [None, 3, [], {}, {"chosen": "a", "rejected": "b"}])
def test_what_is_no_chat_is_not_recognised(row: Any) -> None:
    assert recognise(row) is None
