"""STUB, to be replaced."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onecard.data.chats.conversation import BadRow, Conversation, Example, Rendered
from onecard.data.tokenizer import encode_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        self.name = name
        self.new_tokens: tuple[str, ...] = ()
        self.stop_ids = (tokenizer.eos_token_id,)
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", source: str = "auto") -> "ChatTemplate":
        return cls(tokenizer, f"stub {source}")

    def render(self, examples: Sequence[Example]) -> list[Rendered | BadRow]:
        pieces: list[str] = []
        marks: list[list[bool]] = []
        for example in examples:
            if isinstance(example, Conversation):
                mine = []
                for turn in example.turns:
                    pieces += [f"{turn.role}: ", turn.content, "\n"]
                    counts = turn.role == "assistant" and turn.counts
                    mine += [False, counts, counts]
                marks.append(mine)
            else:
                pieces += [example.text, "\n"]
                marks.append([True, True])
        encoded = iter(encode_pieces(self._tokenizer, pieces))
        end = np.array([self._tokenizer.eos_token_id])
        rendered: list[Rendered | BadRow] = []
        for number, mine in enumerate(marks):
            ids, masks, size = [], [], 0
            example = examples[number]
            for index, counts in enumerate(mine):
                part = next(encoded)
                is_end = index % 3 == 2 if isinstance(example, Conversation) else index == 1
                part = end if is_end else part
                ids.append(part)
                masks.append(np.full(len(part), counts))
            if isinstance(example, Conversation):
                size = sum(len(t.content.encode()) for t in example.turns if t.role == "assistant")
            else:
                size = len(example.text.encode())
            rendered.append(Rendered(np.concatenate(ids).astype(np.int32), np.concatenate(masks), size))
        return rendered
