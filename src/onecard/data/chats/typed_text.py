"""Special tokens that somebody typed into a prompt stay text: they must not end a turn or begin another.

Rows to train on that have them are refused instead, for what a model learns should be written by people who know.

    content   a <|im_end|> b      what was typed        a  M0  b      marked
    prompt    <|im_start|>user\\na  M0  b<|im_end|>…     as control tokens, M0 as the letters it stands for
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from onecard.data.chats.conversation import Turn
from onecard.data.chats.shape import has_marks, mark, split_marks
from onecard.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PromptEncoder:
    """Encodes prompts around what was typed. `specials` are the special tokens, by what they are written as."""

    def __init__(self, encoder: "Tokenizer", specials: Collection[str]) -> None:
        from tokenizers import Tokenizer

        self._encoder = encoder
        content = json.loads(encoder.to_str())
        for token in content["added_tokens"]:
            token["special"] |= token["content"] in specials
        self._letters = Tokenizer.from_str(json.dumps(content))
        self._letters.encode_special_tokens = True

    def encode(self, text: str, typed: Sequence[str]) -> list[int]:
        """Gives the ids of a prompt whose marks stand for `typed`."""
        if not typed:
            return list(self._encoder.encode(text, add_special_tokens=False).ids)
        parts, shown = split_marks(text)
        ids = list(self._encoder.encode(parts[0], add_special_tokens=False).ids)
        for index, part in zip(shown, parts[1:], strict=True):
            ids += self._letters.encode(typed[index], add_special_tokens=False).ids
            ids += self._encoder.encode(part, add_special_tokens=False).ids
        return ids


def mark_typed(turns: Sequence[Turn], specials: re.Pattern[str]) -> tuple[list[Turn], list[str]]:
    """Puts marks in place of special tokens in contents; gives the turns and what the marks stand for, in order.

    Raises:
        DataError: a content has such marks by itself.
    """
    typed: list[str] = []

    def put_mark(found: re.Match[str]) -> str:
        typed.append(found.group())
        return mark(len(typed) - 1)

    marked = [replace(turn, content=specials.sub(put_mark, turn.content)) for turn in turns]
    if typed and any(has_marks(turn.content) for turn in turns):
        raise DataError("a prompt has a special token and characters of the private plane 16: take the latter out")
    return marked, typed
