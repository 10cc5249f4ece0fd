"""What OpenAI's clients read: bodies, chunks and errors in the forms of OpenAI's API reference."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from onecard.handover.writer import Written


class RequestRefusedError(Exception):
    """A request that gets an error of HTTP; `code` is for programs, `param` names the field to blame."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client when to come again."""
        return {"Retry-After": "2"} if self.status == 503 else {}


class Reply(Protocol):
    """One answer to one request, whole or in chunks."""

    def whole(self, written: Written, num_prompt: int) -> dict[str, Any]: ...

    def first(self) -> list[dict[str, Any]]: ...

    def piece(self, text: str) -> dict[str, Any]: ...

    def last(self, written: Written, num_prompt: int, *, with_usage: bool) -> list[dict[str, Any]]: ...


@dataclass
class CompletionReply:
    """Text that goes on from a prompt."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, written: Written, num_prompt: int) -> dict[str, Any]:
        return self._body([self._choice(written.text, _finish(written))], usage(written, num_prompt))

    def first(self) -> list[dict[str, Any]]:
        return []

    def piece(self, text: str) -> dict[str, Any]:
        return self._body([self._choice(text, None)])

    def last(self, written: Written, num_prompt: int, *, with_usage: bool) -> list[dict[str, Any]]:
        end = self._body([self._choice("", _finish(written))])
        return [end, self._body([], usage(written, num_prompt))] if with_usage else [end]

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def _body(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices} | ({} if counts is None else {"usage": counts})


@dataclass
class ChatReply:
    """The next turn of an assistant."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, written: Written, num_prompt: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": written.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(written)}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(written, num_prompt)}

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def last(self, written: Written, num_prompt: int, *, with_usage: bool) -> list[dict[str, Any]]:
        end = self._chunk({}, _finish(written))
        counts = self._head("chat.completion.chunk") | {"choices": [], "usage": usage(written, num_prompt)}
        return [end, counts] if with_usage else [end]

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(written: Written, num_prompt: int) -> dict[str, int]:
    """Counts tokens; the one that ended the text is among the completion's."""
    total = num_prompt + written.num_tokens
    return {"prompt_tokens": num_prompt, "completion_tokens": written.num_tokens, "total_tokens": total}


def event(body: dict[str, Any]) -> str:
    """Writes a chunk as a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _finish(written: Written) -> str:
    return "stop" if written.reason == "stop" else "length"
