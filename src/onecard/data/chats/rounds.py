"""Long conversations to a length: the system prompt and the newest whole rounds stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from onecard.data.chats.conversation import BadRow, Conversation, Example, PlainText, Rendered, Turn
from onecard.data.chats.template import ChatTemplate


def fit(
    examples: Sequence[Example], template: ChatTemplate, *, max_tokens: int, max_rounds: int | None
) -> list[Rendered | BadRow]:
    """Renders examples, each in at most `max_tokens` tokens and `max_rounds` rounds.

    A round is the user's turns in a row and all that follows them until the user speaks again. The oldest rounds go,
    whole; a single round that is too long loses its end, and so does running text. Examples that fit are rendered
    once, the others about log2(rounds) times more. BadRow kind `teaches nothing` where no target is left.
    """
    whole = template.render(examples)
    searches = {}
    for index, (example, rendered) in enumerate(zip(examples, whole, strict=True)):
        if isinstance(rendered, BadRow) or isinstance(example, PlainText):
            continue
        num_rounds = len(round_starts(example.turns))
        fewest = 0 if max_rounds is None else max(0, num_rounds - max(1, max_rounds))
        if fewest or (len(rendered.ids) > max_tokens and num_rounds > 1):
            searches[index] = _Search(example, fewest, num_rounds - 1)
    pending = list(searches.values())
    while pending:
        for search, rendered in zip(pending, template.render([search.next_chat() for search in pending]), strict=True):
            search.take(rendered, max_tokens)
        pending = [search for search in pending if not search.is_done]
    kept = [searches[index].result if index in searches else rendered for index, rendered in enumerate(whole)]
    return [_cut(one, full, template, max_tokens) for one, full in zip(kept, whole, strict=True)]


@dataclass
class _Search:
    """Halves its way to the fewest rounds that must go, from `fewest` to all but the newest one."""

    chat: Conversation
    fewest: int
    most: int
    rendered: dict[int, Rendered | BadRow] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.fewest >= self.most and self.most in self.rendered

    @property
    def result(self) -> Rendered | BadRow:
        found = self.rendered[self.most]
        return found if isinstance(found, BadRow) else replace(found, lost_rounds=self.most)

    @property
    def _next(self) -> int:
        # The fewest first: most chats that have too many rounds are short enough without them.
        return (self.fewest + self.most) // 2 if self.rendered else self.fewest

    def next_chat(self) -> Conversation:
        turns, starts = self.chat.turns, round_starts(self.chat.turns)
        return replace(self.chat, turns=(*turns[: starts[0]], *turns[starts[self._next] :]))

    def take(self, rendered: Rendered | BadRow, max_tokens: int) -> None:
        dropped = self._next
        self.rendered[dropped] = rendered
        if isinstance(rendered, BadRow) or len(rendered.ids) <= max_tokens:
            self.most = dropped
        else:
            self.fewest = min(dropped + 1, self.most)


def round_starts(turns: Sequence[Turn]) -> list[int]:
    """Gives the positions at which rounds begin, the first right after the system prompt."""
    roles = [turn.role for turn in turns]
    first = 1 if roles[:1] == ["system"] else 0
    return [i for i in range(first, len(roles)) if i == first or (roles[i] == "user" and roles[i - 1] != "user")]


def _cut(one: Rendered | BadRow, full: Rendered | BadRow, template: ChatTemplate, max_tokens: int) -> Rendered | BadRow:
    if isinstance(one, BadRow) or isinstance(full, BadRow):
        return one
    if len(one.ids) > max_tokens:
        ids, is_target = one.ids[:max_tokens], one.is_target[:max_tokens]
        one = replace(one, ids=ids, is_target=is_target, target_bytes=template.text_bytes(ids[is_target]), is_cut=True)
    if not one.is_target.any():
        if one.is_cut:
            reason = f"of its newest round alone, the first {max_tokens:,} tokens (max_seq_length) reach no answer"
        else:
            reason = "no answer in its newest rounds counts" if one.lost_rounds else "no turn counts"
        return BadRow("teaches nothing", reason)
    return one if one is full else replace(one, lost_tokens=max(0, len(full.ids) - len(one.ids)))
