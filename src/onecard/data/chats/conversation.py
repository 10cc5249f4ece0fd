"""What a row of a chat file means, and what becomes of it.

row (dict) ─ formats ─► Conversation | PlainText ─ rounds, template ─► Rendered ─► token files
     └──────────────────────────── BadRow, with the reason ──────────────┘
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side says. `counts`: whether an assistant's turn is learned; other roles never are.

    `extras` are further keys of the message for the template: `tool_calls`, `reasoning_content` (also as `reasoning`
    and `thinking`), `tool_call_id`, `name`.
    """

    role: Role
    content: str
    counts: bool = True
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as templates take it."""
        return {"role": self.role, "content": self.content, **self.extras}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, a system prompt first if there is one; `tools` are JSON schemas that the template may show.

    `had_empty_system`: an empty turn of the system was left out.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    had_empty_system: bool = False


@dataclass(frozen=True)
class PlainText:
    """Running text among chats: every token of it counts."""

    text: str


Example = Conversation | PlainText


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `kind` groups such rows in a count; `reason` is for people, without the place."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens: `ids` int32 [n], `is_target` bool [n] (whether the token itself is to be predicted).

    `target_bytes` is the UTF-8 text of the targets, stop tokens left out. `lost_tokens` were left out to keep to the
    length, `lost_rounds` are the rounds among them that were dropped whole; `is_cut` tells of a turn that was cut,
    `is_partial` of a system prompt, tools, calls or reasoning that the template does not show.
    """

    ids: np.ndarray
    is_target: np.ndarray
    target_bytes: int
    lost_tokens: int = 0
    lost_rounds: int = 0
    is_cut: bool = False
    is_partial: bool = False
