"""From the characters of an answer to its tokens."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from onecard.data.chats.answers import Span

if TYPE_CHECKING:
    from tokenizers import Encoding


def first_token(encoding: "Encoding", span: Span, special_ids: Collection[int]) -> int:
    """Finds the first token whose last character lies in the span."""
    for position in range(span.start, span.end):
        token = encoding.char_to_token(position)
        if token is not None:
            # A special token may swallow the white space after it; it is the prompt's all the same.
            begins_before = encoding.char_to_token(span.start - 1) == token if span.start else False
            return token + 1 if begins_before and encoding.ids[token] in special_ids else token
    return len(encoding.ids)


def end_token(encoding: "Encoding", span: Span, text_length: int) -> int | None:
    """Finds the token after the last one whose last character lies in the span; a stop token always belongs to it."""
    if span.stop:
        token = encoding.char_to_token(span.end - 1)
        return None if token is None else token + 1
    for position in range(span.end, text_length):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return len(encoding)
