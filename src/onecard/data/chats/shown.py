"""What a chat template puts into the text beside questions and answers, found by trying it out."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from onecard.data.chats.conversation import BadRow, Conversation, Turn
from onecard.data.chats.extras import REASONING

QUESTION = (Turn("user", "Why?"), Turn("assistant", "Therefore."))
_SYSTEM = "Rules-of-a-trial"
_TOOL = {"type": "function", "function": {"name": "tool_of_a_trial", "arguments": {}}}


@dataclass(frozen=True)
class Shown:
    """Which parts of a conversation a template shows: system prompts, tools, calls of tools, reasoning."""

    system: bool
    tools: bool
    calls: bool
    reasoning: bool

    def leaves_out(self, chat: Conversation) -> bool:
        """Says whether the chat has a part that the template does not show."""
        return (
            (not self.system and any(turn.role == "system" for turn in chat.turns))
            or (not self.tools and bool(chat.tools))
            or (not self.calls and any("tool_calls" in turn.extras for turn in chat.turns))
            or (not self.reasoning and any(REASONING[0] in turn.extras for turn in chat.turns))
        )


def find_shown(render: Callable[[Conversation], str | BadRow]) -> Shown:
    """Tries a template out: a part is shown if the text differs with it, a system prompt if the text holds it."""
    plain = render(Conversation(QUESTION))

    def differs(chat: Conversation) -> bool:
        found = render(chat)
        return found != plain and not isinstance(found, BadRow)

    def differs_with(extras: dict[str, object]) -> bool:
        return differs(Conversation((QUESTION[0], replace(QUESTION[1], extras=extras))))

    # A template may drop its default prompt for one that it does not show either, so a difference tells nothing here.
    prompted = render(Conversation((Turn("system", _SYSTEM), *QUESTION)))
    return Shown(
        system=isinstance(prompted, str) and _SYSTEM in prompted,
        tools=differs(Conversation(QUESTION, (_TOOL,))),
        calls=differs_with({"tool_calls": [_TOOL]}),
        reasoning=differs_with(dict.fromkeys(REASONING, "Because.")),
    )
