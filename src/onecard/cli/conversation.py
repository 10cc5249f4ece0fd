"""A chat in a terminal: lines in, answers out as they come."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from onecard.errors import InputError

if TYPE_CHECKING:
    from onecard.handover.chat import Chat, Reply

HELP = """/reset          forget the conversation (the system prompt stays)
/regenerate     write the last answer anew
/save FILE      add the conversation to FILE.jsonl, for `onecard train --dataset FILE.jsonl`
/exit           leave, as does {end}
Ctrl+C stops an answer. A line that ends in \\ goes on in the next one."""
_END = "Ctrl+Z and Enter" if sys.platform == "win32" else "Ctrl+D"
_PROMPT, _MORE = "> ", ". "


class Conversation:
    """Reads turns from a terminal or a pipe until they end, and answers them on stdout; remarks go to stderr."""

    def __init__(self, chat: "Chat") -> None:
        self._chat = chat
        self._is_interrupted = False

    def run(self) -> None:
        """Talks until /exit or the end of the input; a mistake is told and the chat goes on.

        Raises:
            InputError: piped input that is not UTF-8.
        """
        if sys.stdin is not None and sys.stdin.isatty():
            self._remark(f"/help tells the commands, {_END} leaves")
        for text in _turns():
            try:
                if not self._receive(text):
                    return
            except InputError as error:
                self._remark(str(error))

    def _receive(self, text: str) -> bool:
        """Answers a turn or obeys a command; False ends the chat."""
        command, _, argument = text.strip().partition(" ")
        match command:
            case "/exit" | "/quit":
                return False
            case "/help":
                print(HELP.format(end=_END), file=sys.stderr, flush=True)
            case "/reset":
                self._chat.reset()
                self._remark("the conversation is forgotten")
            case "/regenerate":
                self._answer(None)
            case "/save":
                self._save(argument.strip())
            case _ if command.startswith("/") and command[1:].isalpha():
                raise InputError(f"there is no command {command}: /help tells them")
            case _:
                self._answer(text)
        return True

    def _answer(self, text: str | None) -> None:
        with self._interruptible():
            if text is None:
                reply = self._chat.regenerate(self._write, lambda: self._is_interrupted)
            else:
                reply = self._chat.ask(text, self._write, lambda: self._is_interrupted)
        print(flush=True)
        for remark in _remarks(reply):
            self._remark(remark)

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs the name of a file, as in /save chats.jsonl")
        try:
            path = Path(name.strip("\"'")).expanduser()
        except RuntimeError as error:  # ~ of a user that is not known here
            raise InputError(f"{name}: {error}: give the whole path") from error
        self._remark(f"saved as line {self._chat.save(path)} of {path}")

    def _write(self, text: str) -> None:
        from onecard.observe.console import printable

        shown = printable(text, sys.stdout.encoding or "utf-8") if sys.stdout.isatty() else text
        print(shown, end="", flush=True)

    def _remark(self, text: str) -> None:
        print(f"({text})", file=sys.stderr, flush=True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Lets the first Ctrl+C end the answer after the token at hand, a second one the chat."""

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True

        self._is_interrupted = False
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _remarks(reply: "Reply") -> Iterator[str]:
    if reply.left_out:
        rounds = "round was" if reply.left_out == 1 else f"{reply.left_out} rounds were"
        yield f"the context is full: the oldest {rounds} left out"
    match reply.reason:
        case "cancelled":
            yield "interrupted"
        case "length":
            yield f"cut off after {reply.num_tokens} tokens: --max_new_tokens allows more"
        case "context":
            yield "cut off, for the context is full"
    if not reply.text:
        yield "the answer is empty and not kept"


def _turns() -> Iterator[str]:
    """Gives what a user says, turn by turn; a line that ends in a backslash goes on in the next."""
    lines = _typed_lines() if sys.stdin is not None and sys.stdin.isatty() else _piped_lines()
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        text = "\n".join([*parts, line])
        parts = []
        if text.strip():
            yield text
    if parts:
        yield "\n".join(parts)


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history, where the system has it
    prompt = _PROMPT
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n(to leave: /exit or {_END})")
            prompt = _PROMPT
            continue
        except UnicodeDecodeError:
            print("(this line is not UTF-8 text: set the terminal to UTF-8 and type it once more)", file=sys.stderr)
            prompt = _PROMPT
            continue
        prompt = _MORE if line.endswith("\\") else _PROMPT
        yield line


def _piped_lines() -> Iterator[str]:
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            # utf-8-sig: Windows editors like to start a file with a byte order mark.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input, line {number}: it is not UTF-8 text: save it as UTF-8") from error
