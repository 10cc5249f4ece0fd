"""Where the answers lie in a rendered conversation, as positions of characters.

Most renderings are their shape with the contents put in: one comparison proves it. The others come from templates that
look into contents (Qwen3 takes earlier thoughts out). Those are rendered again with marks inside the contents, then by
prefixes; a place that neither proves is not guessed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onecard.data.chats.conversation import BadRow, Turn
from onecard.data.chats.shape import Answer, Render, Shape, has_marks, mark, split_marks


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` are to be written; `stop` is the token they end with, or empty."""

    start: int
    end: int
    stop: str


def match_shape(text: str, turns: Sequence[Turn], shape: Shape) -> list[Span] | None:
    """Gives the spans of all answers that count; None where the text is not the shape with these contents."""
    pieces: list[str] = []
    spans, position = [], 0
    for place, index in enumerate(shape.order):
        turn, fixed = turns[index], shape.fixed[place]
        left, right = shape.is_trimmed[place]
        content = turn.content
        if left:
            content = content.lstrip()
        if right:
            content = content.rstrip()
        begin = position + len(fixed)
        if turn.role == "assistant" and turn.counts:
            answer = shape.answers[index]
            start = _after_prompt(text, position + len(answer.header), answer)
            spans.append(Span(start, begin + len(content) + len(answer.closing), answer.stop))
        pieces += (fixed, content)
        position = begin + len(content)
    pieces.append(shape.fixed[-1])
    return spans if "".join(pieces) == text else None


def search_answers(text: str, turns: Sequence[Turn], shape: Shape, render: Render) -> list[Span] | BadRow:
    """Finds the spans of a text that is not its shape; costs up to two renderings and two for each answer."""
    unclear = BadRow("unclear template", "the chat template changes its contents so that the answers cannot be told")
    if has_marks(text):
        return BadRow("private characters", "it has characters of the private plane 16, which mark contents here")
    everyone, answering = range(len(turns)), [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for marked in (everyone, answering):
        spans = _search_by_marks(text, turns, shape, render, set(marked))
        if spans is not None:
            return spans
    return _search_by_prefixes(text, turns, shape, render) or unclear


def find_by_prefixes(text: str, turns: Sequence[Turn], stops: re.Pattern[str], render: Render) -> list[Span] | BadRow:
    """Finds the spans of a conversation with calls of tools or reasoning, which are answers as contents are.

    An answer begins where the prompt before it ends, and ends with the last stop token of its own turn. Where a
    template drops from an earlier turn what it shows in the last one, it ends with the first. Two renderings for each.
    """
    unclear = BadRow("unclear template", "the chat template shows its calls or reasoning where they cannot be told")
    spans = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant" or not turn.counts:
            continue
        prompt, whole = render(turns[:index], True), render(turns[: index + 1], False)
        for rendered in (prompt, whole):
            if isinstance(rendered, BadRow):
                return rendered
        assert isinstance(prompt, str)
        assert isinstance(whole, str)
        start = next((len(begin) for begin in (prompt, prompt.rstrip()) if text.startswith(begin)), None)
        if start is None:
            return unclear
        found = list(stops.finditer(whole if text.startswith(whole) else text, start))
        if found:
            last = found[-1] if text.startswith(whole) else found[0]
            spans.append(Span(start, last.end(), last.group()))
        elif index == len(turns) - 1:
            spans.append(Span(start, len(text), ""))
        else:
            return unclear
    return spans


def _after_prompt(text: str, start: int, answer: Answer) -> int:
    has_rest = answer.prompt_rest and text.startswith(answer.prompt_rest, start)
    return start + len(answer.prompt_rest) if has_rest else start


def _search_by_marks(
    text: str, turns: Sequence[Turn], shape: Shape, render: Render, marked: set[int]
) -> list[Span] | None:
    """Puts a mark behind the last letter of contents; holds where the rendering is otherwise the same."""
    with_marks = [
        replace(turn, content=_insert_mark(turn.content, index)) if index in marked else turn
        for index, turn in enumerate(turns)
    ]
    rendered = render(with_marks, False)
    if isinstance(rendered, BadRow):
        return None
    parts, shown = split_marks(rendered)
    if "".join(parts) != text:
        return None
    ends, position = {}, 0
    for part, index in zip(parts[:-1], shown, strict=True):
        position += len(part)
        ends[index] = position
    spans = []
    for index, answer in shape.answers.items():
        if not turns[index].counts:
            continue
        if shown.count(index) != 1:
            return None
        start = _start_after(text, turns, shape, index, ends)
        if start is None:
            start = _prompt_length(text, turns, index, render)
        end = _skip_white_space(turns, shape, index, ends[index])
        if start is None or start > end or not text.startswith(answer.closing, end):
            return None
        spans.append(Span(start, end + len(answer.closing), answer.stop))
    return spans


def _start_after(text: str, turns: Sequence[Turn], shape: Shape, index: int, ends: dict[int, int]) -> int | None:
    """Goes on from the end of the content before an answer, by the header of the shape."""
    place, answer = shape.place_of(index), shape.answers[index]
    before = shape.order[place - 1] if place else None
    if before is not None and before not in ends:
        return None
    position = 0 if before is None else _skip_white_space(turns, shape, before, ends[before])
    if not text.startswith(answer.header, position):
        return None
    return _after_prompt(text, position + len(answer.header), answer)


def _search_by_prefixes(text: str, turns: Sequence[Turn], shape: Shape, render: Render) -> list[Span] | None:
    """Renders the turns up to an answer and with it; holds where both begin the whole."""
    spans, tail = [], shape.fixed[-1]
    for index, answer in shape.answers.items():
        if not turns[index].counts:
            continue
        start, whole = _prompt_length(text, turns, index, render), render(turns[: index + 1], False)
        if start is None or isinstance(whole, BadRow) or not (text.startswith(whole) and whole.endswith(tail)):
            return None
        end = len(whole) - len(tail)
        if start > end or not text.startswith(answer.closing, end):
            return None
        spans.append(Span(start, end + len(answer.closing), answer.stop))
    return spans


def _prompt_length(text: str, turns: Sequence[Turn], index: int, render: Render) -> int | None:
    prompt = render(turns[:index], True)
    return None if isinstance(prompt, BadRow) or not text.startswith(prompt) else len(prompt)


def _insert_mark(content: str, index: int) -> str:
    end = len(content.rstrip())
    return f"{content[:end]}{mark(index)}{content[end:]}"


def _skip_white_space(turns: Sequence[Turn], shape: Shape, index: int, position: int) -> int:
    content = turns[index].content
    _, is_trimmed = shape.is_trimmed[shape.place_of(index)]
    return position if is_trimmed else position + len(content) - len(content.rstrip())
