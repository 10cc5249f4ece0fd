"""STUB, to be replaced."""

from collections.abc import Sequence

from onecard.data.chats.conversation import BadRow, Example, Rendered
from onecard.data.chats.template import ChatTemplate


def fit(
    examples: Sequence[Example], template: ChatTemplate, *, max_tokens: int, max_rounds: int | None
) -> list[Rendered | BadRow]:
    fitted: list[Rendered | BadRow] = []
    for entry in template.render(examples):
        if isinstance(entry, Rendered) and len(entry.ids) > max_tokens:
            lost = len(entry.ids) - max_tokens
            entry = Rendered(entry.ids[:max_tokens], entry.is_target[:max_tokens], entry.target_bytes, lost, 0, True)
        if isinstance(entry, Rendered) and not entry.is_target.any():
            entry = BadRow("nothing counts", "no turn of the assistant is in it")
        fitted.append(entry)
    return fitted
