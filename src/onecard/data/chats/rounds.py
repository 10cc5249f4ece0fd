"""Long conversations to a length: the system prompt and the newest whole rounds stay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from onecard.data.chats.conversation import BadRow, Conversation, Example, PlainText, Rendered, Turn
from onecard.data.chats.template import ChatTemplate

# Finding the answers of a chat costs the square of their number: 375 take 1 s on one core, 1,500 take 20 s.
_MANY_ROUNDS = 32


def fit(
    examples: Sequence[Example], template: ChatTemplate, *, max_tokens: int, max_rounds: int | None
) -> list[Rendered | BadRow]:
    """Renders examples, each in at most `max_tokens` tokens and `max_rounds` rounds.

    A round is the user's turns in a row and all that follows them until the user speaks again. The oldest rounds go,
    whole; a single round that is too long loses its end, and so does running text. Examples that fit are rendered
    once, the others about log2(rounds) times more. Of a chat with many rounds it is first counted which of them stay,
    and the answers in the others are never looked for. BadRow kind `teaches nothing` where no target is left.
    """
    shortened = _shorten(examples, template, max_tokens, max_rounds)
    kept = [one.chat for one in shortened.values() if isinstance(one, _Shortened)]
    others = [example for index, example in enumerate(examples) if index not in shortened]
    fitted = iter(_fit(others, template, max_tokens, max_rounds))
    of_shortened = iter(_fit(kept, template, max_tokens, None) if kept else ())
    found = list[Rendered | BadRow]()
    for index in range(len(examples)):
        one = shortened.get(index)
        found.append(next(fitted) if one is None else one.told(of_shortened) if isinstance(one, _Shortened) else one)
    return found


def _fit(
    examples: Sequence[Example], template: ChatTemplate, max_tokens: int, max_rounds: int | None
) -> list[Rendered | BadRow]:
    whole = template.render(examples)
    searches = {}
    for index, (example, rendered) in enumerate(zip(examples, whole, strict=True)):
        if isinstance(rendered, BadRow) or isinstance(example, PlainText):
            continue
        num_rounds = len(round_starts(example.turns))
        fewest = _count_beyond(num_rounds, max_rounds)
        if fewest or (len(rendered.ids) > max_tokens and num_rounds > 1):
            searches[index] = _Search(example, fewest, num_rounds - 1)
    pending = list(searches.values())
    while pending:
        for search, rendered in zip(pending, template.render([search.next_chat() for search in pending]), strict=True):
            search.take(rendered, max_tokens)
        pending = [search for search in pending if not search.is_done]
    kept = [searches[index].result if index in searches else rendered for index, rendered in enumerate(whole)]
    return [_cut(one, full, template, max_tokens) for one, full in zip(kept, whole, strict=True)]


@dataclass(frozen=True)
class _Shortened:
    """A chat without its oldest rounds, and what it was before."""

    chat: Conversation
    lost_rounds: int
    num_tokens: int

    def told(self, rendered: Iterator[Rendered | BadRow]) -> Rendered | BadRow:
        """Adds what was lost to the next rendering, which is that of the chat."""
        one = next(rendered)
        if isinstance(one, BadRow):
            return one
        lost_tokens = max(0, self.num_tokens - len(one.ids))
        return replace(one, lost_rounds=self.lost_rounds + one.lost_rounds, lost_tokens=lost_tokens)


def _shorten(
    examples: Sequence[Example], template: ChatTemplate, max_tokens: int, max_rounds: int | None
) -> dict[int, _Shortened | BadRow]:
    """Drops rounds of the chats that have many until the rest fits, by counting tokens; those that fit are left out."""
    chats = {
        index: example
        for index, example in enumerate(examples)
        if isinstance(example, Conversation) and len(round_starts(example.turns)) > _MANY_ROUNDS
    }
    shortened: dict[int, _Shortened | BadRow] = {}
    for (index, chat), num_tokens in zip(chats.items(), template.count_tokens(list(chats.values())), strict=True):
        if isinstance(num_tokens, BadRow):
            shortened[index] = num_tokens
            continue
        num_rounds = len(round_starts(chat.turns))
        fewest = _count_beyond(num_rounds, max_rounds)
        if fewest or num_tokens > max_tokens:
            search = _Search(chat, fewest, num_rounds - 1)
            while search.fewest < search.most:
                (counted,) = template.count_tokens([search.next_chat()])
                search.take(counted, max_tokens)
            shortened[index] = _Shortened(search.next_chat(), search.most, num_tokens)
    return shortened


def _count_beyond(num_rounds: int, max_rounds: int | None) -> int:
    return 0 if max_rounds is None else max(0, num_rounds - max(1, max_rounds))


@dataclass
class _Search:
    """Halves its way to the fewest rounds that must go, from `fewest` to all but the newest one."""

    chat: Conversation
    fewest: int
    most: int
    rendered: dict[int, Rendered | BadRow | int] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.fewest >= self.most and self.most in self.rendered

    @property
    def result(self) -> Rendered | BadRow:
        found = self.rendered[self.most]
        assert not isinstance(found, int)
        return found if isinstance(found, BadRow) else replace(found, lost_rounds=self.most)

    @property
    def _next(self) -> int:
        # The fewest first: most chats that have too many rounds are short enough without them.
        return (self.fewest + self.most) // 2 if self.rendered else self.fewest

    def next_chat(self) -> Conversation:
        turns, starts = self.chat.turns, round_starts(self.chat.turns)
        return replace(self.chat, turns=(*turns[: starts[0]], *turns[starts[self._next] :]))

    def take(self, rendered: Rendered | BadRow | int, max_tokens: int) -> None:
        """Takes the rendering of `next_chat`, or its number of tokens."""
        dropped = self._next
        self.rendered[dropped] = rendered
        length = len(rendered.ids) if isinstance(rendered, Rendered) else rendered
        if isinstance(length, BadRow) or length <= max_tokens:
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
