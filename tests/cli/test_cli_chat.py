"""`onecard chat` and `onecard serve`: what a terminal and a pipe see."""

import io
import re
import signal
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.cli.conversation import Conversation
from onecard.errors import InputError
from onecard.handover.chat import Reply


class Parrot:
    """A chat that says a turn back, letter by letter, until it is stopped."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.left_out = 0
        self.before_letter: Callable[[int], None] = lambda _: None

    def ask(self, text: str, on_text: Callable[[str], None], is_cancelled: Callable[[], bool]) -> Reply:
        if "bad" in text:
            raise InputError("this cannot be said")
        self.heard.append(text)
        for number, letter in enumerate(text):
            self.before_letter(number)
            if is_cancelled():
                return Reply(text[:number], "cancelled", number)
            on_text(letter)
        return Reply(text, "stop", len(text), self.left_out)

    def regenerate(self, on_text: Callable[[str], None], is_cancelled: Callable[[], bool]) -> Reply:
        return self.ask(self.heard[-1].upper(), on_text, is_cancelled)

    def reset(self) -> None:
        self.heard.clear()

    def save(self, path: Any) -> int:
        self.saved = path
        return 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> list[str]:
    """Lines typed into a terminal, or Ctrl+C; gives the prompts that were shown."""
    prompts, rest = list[str](), list(lines)

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = rest.pop(0) if rest else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    return prompts


def test_lines_of_a_pipe_are_turns_and_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Parrot()
    piped(monkeypatch, "\ufeff你好\r\n\nbad\n/regenerate\n/save my chats.jsonl\n/what\n/a/b\none\\\ntwo\n".encode())
    Conversation(chat).run()  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "你好\n你好\n/a/b\none\ntwo\n"
    assert chat.heard == ["你好", "你好", "/a/b", "one\ntwo"]
    assert "(this cannot be said)\n" in err
    assert "(saved as line 3 of my chats.jsonl)" in err
    assert "(there is no command /what: /help tells them)" in err


def test_a_chat_ends_at_exit_and_can_be_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Parrot()
    piped(monkeypatch, b"one\n/reset\n/help\n/save\n/exit\ntwo\n")
    Conversation(chat).run()  # type: ignore[arg-type]
    assert chat.heard == []
    out, err = capsys.readouterr()
    for command in ("/reset", "/regenerate", "/save", "/exit", "Ctrl+C"):
        assert command in err
    # Answers alone, for a file.
    assert "/reset" not in out
    assert "forgotten" in err
    assert "/save needs the name of a file" in err


def test_piped_bytes_that_are_no_text_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Parrot()
    piped(monkeypatch, b"one\n\xff\n")
    with pytest.raises(InputError, match=r"line 2.*not UTF-8"):
        Conversation(chat).run()  # type: ignore[arg-type]
    assert chat.heard == ["one"]


def test_a_terminal_prompts_and_ctrl_c_at_the_prompt_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Parrot()
    prompts = typed(monkeypatch, "one\\", "two", KeyboardInterrupt, "three")
    Conversation(chat).run()  # type: ignore[arg-type]
    assert chat.heard == ["one\ntwo", "three"]
    assert prompts == ["> ", ". ", "> ", "> ", "> "]
    assert "to leave: /exit" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, handler = Parrot(), signal.getsignal(signal.SIGINT)
    chat.before_letter = lambda number: signal.raise_signal(signal.SIGINT) if number == 3 else None
    typed(monkeypatch, "first", "second")
    Conversation(chat).run()  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "fir\nsec\n\n"
    assert err.count("(interrupted)") == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, handler = Parrot(), signal.getsignal(signal.SIGINT)

    def press_twice(number: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    chat.before_letter = press_twice
    typed(monkeypatch, "first")
    with pytest.raises(KeyboardInterrupt):
        Conversation(chat).run()  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("reply", "remark"),
    [
        (Reply("a", "stop", 1, 1), "the context is full: the oldest round was left out"),
        (Reply("a", "stop", 1, 4), "the oldest 4 rounds were left out"),
        (Reply("a", "length", 7), "cut off after 7 tokens: --max_new_tokens"),
        (Reply("a", "context", 7), "the context is full"),
        (Reply("", "stop", 1), "the answer is empty"),
    ],
)
def test_what_happened_to_an_answer_is_told(
    reply: Reply, remark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, b"a\n")
    Conversation(SimpleNamespace(ask=lambda *_: reply)).run()  # type: ignore[arg-type]
    assert remark in capsys.readouterr().err


def test_a_terminal_is_not_obeyed_by_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    piped(monkeypatch, "\x1b[2J你\n".encode())
    monkeypatch.setattr(sys, "stdout", screen)
    Conversation(Parrot()).run()  # type: ignore[arg-type]
    assert screen.getvalue() == "?[2J你\n"


def test_chat_hands_its_flags_over(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("onecard.api.open_chat", lambda model, **named: given.update(named, model=model) or Parrot())
    piped(monkeypatch, b"ab\n")
    done = run("chat", "r", "--system", "Be brief.", "--max_new_tokens", "9", "--temperature", "0", "--top_k", "5")
    assert (done.code, done.stdout) == (0, "ab\n")
    assert given == {
        "model": "r",
        "system": "Be brief.",
        "max_new_tokens": 9,
        "temperature": 0,
        "top_k": 5,
        "top_p": None,
        "seed": 0,
        "checkpoint": "best",
        "device": "auto",
    }


@pytest.mark.parametrize(("is_chat", "path"), [(True, "/chat/completions"), (False, "/completions")])
def test_serve_prints_requests_to_copy(run: Any, monkeypatch: pytest.MonkeyPatch, is_chat: bool, path: str) -> None:
    given: dict[str, Any] = {}

    def serve(model: str, *, on_ready: Callable[[str, str, bool], None], **named: Any) -> None:
        given.update(named)
        on_ready("http://127.0.0.1:8000/v1", "tiny", is_chat)

    monkeypatch.setattr("onecard.api.serve", serve)
    done = run("serve", "r", "--host", "0.0.0.0", "--allow_origin", "http://a", "--allow_origin", "http://b")
    assert done.code == 0
    assert "curl http://127.0.0.1:8000/v1" + path in done.stdout
    (python,) = re.findall("^from openai.*", done.stdout, re.MULTILINE)
    compile(python, "python", "exec")
    assert "anyone who reaches this machine" in done.stderr
    assert (given["host"], given["port"], given["allow_origins"]) == ("0.0.0.0", 8000, ["http://a", "http://b"])
    secret = run("serve", "r", "--host", "0.0.0.0", "--api_key", "s3cret")
    assert "anyone" not in secret.stderr
    assert "s3cret" not in secret.stdout
    assert given["api_key"] == "s3cret"


def test_serve_refuses_a_port_in_use_before_it_loads_anything(run: Any) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "no-such-model", "--port", str(port))
    assert done.code == 2
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert run("serve", "no-such-model", "--port", "70000").code == 2
    assert run("serve", "no-such-model", "--port", "0").code == 2
    assert run("serve", "no-such-model", "--temperature", "-1", "--port", "0").code == 2


def test_what_is_typed_and_no_text_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoText(UnicodeDecodeError):
        def __init__(self) -> None:
            super().__init__("utf-8", b"\xff", 0, 1, "invalid start byte")

    chat = Parrot()
    typed(monkeypatch, NoText, "/save ~nobody-of-this-name/a.jsonl", "two")
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    Conversation(chat).run()  # type: ignore[arg-type]
    assert chat.heard == ["two"]
    err = capsys.readouterr().err
    assert "type it once more" in err
    assert "give the whole path" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": ""}, "host is empty"),
        ({"api_key": ""}, "api_key is empty"),
        ({"api_key": "a\n"}, "api_key has characters"),
        ({"name": " "}, "name is empty"),
        ({"allow_origins": ["a.b"]}, "'a.b'"),
    ],
)
def test_serve_lets_in_nobody_by_mistake(settings: dict[str, Any], words: str) -> None:
    import onecard

    pytest.importorskip("fastapi")
    with pytest.raises(InputError, match=words):
        onecard.serve("nowhere", **settings)
