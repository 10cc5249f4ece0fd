"""A conversation with a model: its history, kept to the context by the rule of training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Literal

from onecard.data import Turn
from onecard.data.chats.rounds import round_starts
from onecard.errors import DataError, InputError
from onecard.handover.writer import OnText, Prompt, Writer
from onecard.model.generate import Sampling

_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Reply:
    """An answer; `left_out` counts the oldest rounds that the model did not see, for the context was full.

    `reason` says why it ended: by itself (`stop`), by max_new_tokens (`length`), at the end of the context (`context`)
    or because it was interrupted (`cancelled`). An empty answer is not kept in the history.
    """

    text: str
    reason: Literal["stop", "length", "context", "cancelled"]
    num_tokens: int
    left_out: int = 0


class Chat:
    """A conversation; `turns` is all of it, also what the context has no room for any more."""

    def __init__(self, writer: Writer, sampling: Sampling, system: str | None = None) -> None:
        """Raises InputError where the model has no chat template, or its template takes no system prompt."""
        sampling.check()
        self.sampling = sampling
        self._writer = writer
        self._opening = (Turn("system", system),) if system and not system.isspace() else ()
        self._num_answers = 0
        self._num_left_out = 0
        self.turns: tuple[Turn, ...] = self._opening
        what = "the system prompt" if self._opening else "the chat template, around one word,"
        try:
            prompt = writer.encode_chat([*self._opening, Turn("user", "Hello")])
        except DataError as error:
            raise InputError(f"{error} {'Leave out the system prompt.' if self._opening else ''}".strip()) from error
        self._refuse_too_long(prompt, what)

    def ask(
        self, text: str, on_text: OnText = lambda _: None, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Answers a user's turn, `on_text` gets the answer as it comes; an answer that breaks off is kept as it is.

        Each answer has a seed of its own, so that a conversation is the same each time and two answers are not.

        Raises:
            InputError: an empty text, one that the tokenizer cannot write, or one longer than the context.
        """
        if not text.strip():
            raise InputError("there is nothing to answer: write something")
        self._writer.refuse_endless([text])
        turns = (*self.turns, Turn("user", text))
        prompt, left_out = self._fit(turns)
        seed = (self.sampling.seed + self._num_answers) % 2**63
        sampling = self._writer.limit(replace(self.sampling, seed=seed), prompt)
        self._num_answers += 1
        written = self._writer.write(prompt, sampling, on_text, is_cancelled=is_cancelled)
        if written.text:
            self.turns, self._num_left_out = (*turns, Turn("assistant", written.text)), left_out
        ends_at_limit = written.reason == "length" and sampling.max_new_tokens < self.sampling.max_new_tokens
        return Reply(written.text, "context" if ends_at_limit else written.reason, written.num_tokens, left_out)

    def regenerate(self, on_text: OnText = lambda _: None, is_cancelled: Callable[[], bool] = lambda: False) -> Reply:
        """Answers the newest question once more, in place of its answer.

        Raises:
            InputError: there is none.
        """
        if self.turns[-1:] == self._opening[-1:]:
            raise InputError("there is no answer yet that could be written anew")
        before, question = self.turns, self.turns[-2]
        self.turns = self.turns[:-2]
        reply = self.ask(question.content, on_text, is_cancelled)
        if not reply.text:
            self.turns = before
        return reply

    def reset(self) -> None:
        """Forgets the conversation but the system prompt."""
        self.turns, self._num_left_out = self._opening, 0

    def save(self, path: Path) -> int:
        """Adds the conversation to a file as one line that `onecard train` can learn from; gives the line's number.

        Raises:
            InputError: nothing to save, a file of another kind, or one that cannot be written.
        """
        if self.turns == self._opening:
            raise InputError("there is nothing to save yet: no question has been answered")
        if path.suffix.lower() not in _SUFFIXES:
            raise InputError(f"{path}: conversations are saved as lines of JSON: give a name that ends in .jsonl")
        messages = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            before = path.read_bytes() if path.exists() else b""
            joint = b"\n" if before and not before.endswith(b"\n") else b""
            with path.open("ab", buffering=0) as stream:
                _append(stream, joint + line.encode("utf-8"))
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{path}: cannot be written ({reason}): give another file") from error
        return (before + joint).count(b"\n") + 1

    def _fit(self, turns: Sequence[Turn]) -> tuple[Prompt, int]:
        """Leaves out the fewest oldest rounds that make room for an answer of at most half the context."""
        starts = round_starts(turns)
        room = min(self.sampling.max_new_tokens, self._writer.context // 2)
        # What had no room before has none now: a long conversation is not encoded anew from its first word.
        left_out = min(self._num_left_out, len(starts) - 1)
        prompt = self._writer.encode_chat([*turns[: starts[0]], *turns[starts[left_out] :]])
        while len(prompt.ids) + room > self._writer.context and left_out < len(starts) - 1:
            left_out += 1
            prompt = self._writer.encode_chat([*turns[: starts[0]], *turns[starts[left_out] :]])
        # The newest round alone may take some of the room of its answer.
        self._refuse_too_long(prompt, "this text")
        return prompt, left_out

    def _refuse_too_long(self, prompt: Prompt, what: str) -> None:
        if len(prompt.ids) >= self._writer.context:
            raise InputError(
                f"{what} makes a prompt of {len(prompt.ids):,} tokens, and the model's context has"
                f" {self._writer.context:,} for it and the answer: shorten it, or use a model with a longer context"
            )


def _append(stream: FileIO, content: bytes) -> None:
    """Writes all or nothing: half a line would spoil the file for training."""
    end = stream.tell()
    try:
        while content:
            content = content[stream.write(content) :]
    except OSError:
        stream.truncate(end)
        raise
