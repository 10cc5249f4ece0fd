"""The fixed text that a chat template writes around contents, and where in it an answer begins and ends.

A template is a program; what it does is found by running it. Contents are replaced by marks, one private character for
each turn, and the fixed text stays between them:

    <|im_start|>user\n  M0  <|im_end|>\n<|im_start|>assistant\n  M1  <|im_end|>\n
                            '------------ header ------------'   '- closing'

An answer begins where the generation prompt, rendered from the turns before it, ends; it ends with the first special
token after its content. Templates look at roles far more than at contents, so shapes are kept by roles and tools.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from onecard.data.chats.conversation import BadRow, Conversation, Turn

# Plane 16 is private use: no text means anything by it.
_FIRST_MARK = 0x100000
_MARKS = re.compile("([\U00100000-\U0010fffd])")
_PADDING = " \n "
# Answers after the same text, beyond which not every one is looked at by itself.
_MANY_ALIKE = 8

Render = Callable[[Sequence[Turn], bool], str | BadRow]


@dataclass(frozen=True)
class Answer:
    """Where an answer lies between the marks: `header` ends the prompt, `closing` goes on to the end of the stop token.

    `prompt_rest` is what the generation prompt writes beyond the header (`<think>` of models that always think);
    `stop` is the stop token at the end of `closing`, empty where the template has none there.
    """

    header: str
    prompt_rest: str
    closing: str
    stop: str


@dataclass(frozen=True)
class Shape:
    """What a template writes for one sequence of roles: `fixed[k]` before content `order[k]`, the last part at the end.

    `is_trimmed[k]` tells of white space that the template takes from the left and right of that content.
    """

    order: tuple[int, ...]
    fixed: tuple[str, ...]
    is_trimmed: tuple[tuple[bool, bool], ...]
    answers: dict[int, Answer]

    def place_of(self, turn: int) -> int:
        return self.order.index(turn)


def mark(index: int) -> str:
    return chr(_FIRST_MARK + index)


def split_marks(text: str) -> tuple[list[str], list[int]]:
    """Cuts a rendering at its marks: n + 1 parts and the n indices between them."""
    parts = _MARKS.split(text)
    return parts[::2], [ord(found) - _FIRST_MARK for found in parts[1::2]]


def has_marks(text: str) -> bool:
    return _MARKS.search(text) is not None


def find_shape(conversation: Conversation, render: Render, stops: re.Pattern[str]) -> Shape | BadRow:
    """Finds the shape of a conversation's roles; costs two renderings and one for each answer, three for many alike.

    `stops` finds tokens that can end an answer. BadRow where an answer's place is not the same for every content.
    """
    turns = [replace(turn, content=mark(index)) for index, turn in enumerate(conversation.turns)]
    text = render(turns, False)
    if isinstance(text, BadRow):
        return text
    fixed, order = split_marks(text)
    answers: dict[int, Answer] = {}
    shown = Counter(order)
    place_of = {index: place for place, index in enumerate(order)}
    alike: dict[tuple[str, str], list[int]] = {}
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            if shown[index] != 1:
                return BadRow("unclear template", f"the chat template does not show turn {index + 1} once")
            alike.setdefault((turns[index - 1].role if index else "", fixed[place_of[index]]), []).append(index)

    def find_header(index: int) -> tuple[str, str] | BadRow:
        prompt = render(turns[:index], True)
        if isinstance(prompt, BadRow):
            return prompt
        reason = f"the generation prompt does not lead to the answer in turn {index + 1}"
        return _header(prompt, fixed, order, place_of[index]) or BadRow("unclear template", reason)

    for indices in alike.values():
        for index, header in zip(indices, _find_headers(indices, find_header), strict=True):
            if isinstance(header, BadRow):
                return header
            is_last = index == len(turns) - 1
            answers[index] = Answer(*header, *_closing(fixed[place_of[index] + 1], stops, is_last))
    answers = dict(sorted(answers.items()))
    is_trimmed = _find_trimming(turns, render, fixed, order)
    return Shape(tuple(order), tuple(fixed), is_trimmed, answers)


def _find_headers(
    indices: list[int], find: Callable[[int], tuple[str, str] | BadRow]
) -> list[tuple[str, str] | BadRow]:
    """Finds the headers of answers that follow the same text and role; of many alike, by the ends and the middle.

    A prompt is rendered for each otherwise, which for a chat of 6,000 turns takes the square of their number (LOG.md).
    """
    if len(indices) > _MANY_ALIKE:
        tried = [find(index) for index in (indices[0], indices[len(indices) // 2], indices[-1])]
        if tried[0] == tried[1] == tried[2]:
            return [tried[0]] * len(indices)
    return [find(index) for index in indices]


def _header(prompt: str, fixed: list[str], order: list[int], place: int) -> tuple[str, str] | None:
    """Compares what follows the last content before an answer, in the prompt and in the whole."""
    parts, shown = split_marks(prompt)
    before = order[place - 1 : place] if place else []
    if shown[-1:] != before:
        return None
    one, other = parts[-1], fixed[place]
    shorter = min(len(one), len(other))
    end = next((index for index in range(shorter) if one[index] != other[index]), shorter)
    common, rest, left = one[:end], one[end:], other[end:]
    # Either may go on: a prompt with <think>, or an answer that begins with fixed text. Both never do.
    if rest.strip() and left.strip():
        return None
    return common, rest


def _common_beginning(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _closing(after: str, stops: re.Pattern[str], is_last: bool) -> tuple[str, str]:
    found = stops.search(after)
    if found is not None:
        return after[: found.end()], found.group()
    # With no token to stop at, the end-of-text token will follow the whole, so all of the rest is to be written.
    return (after if is_last else ""), ""


def _find_trimming(
    turns: list[Turn], render: Render, fixed: list[str], order: list[int]
) -> tuple[tuple[bool, bool], ...]:
    """Finds which white space the template takes away; where that is unclear, none, and such rows are marked singly."""
    nothing = tuple((False, False) for _ in order)
    text = render([replace(turn, content=f"{_PADDING}{turn.content}{_PADDING}") for turn in turns], False)
    if isinstance(text, BadRow):
        return nothing
    padded, shown = split_marks(text)
    if shown != order:
        return nothing
    lefts, rights = [], []
    for place, (part, plain) in enumerate(zip(padded, fixed, strict=True)):
        # The first part has no content before it, the last none after it.
        before = [True] if place == 0 else [True, False]
        after = [True] if place == len(order) else [True, False]
        for right, left in product(before, after):
            if part == ("" if right else _PADDING) + plain + ("" if left else _PADDING):
                break
        else:
            return nothing
        rights.append(right)
        lefts.append(left)
    return tuple(zip(lefts[:-1], rights[1:], strict=True))
