"""A batch of conversations to blocks of tokens, with what the audit counts in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from onecard.data.chats.chat_file import ChatCounts, Flaws
from onecard.data.chats.conversation import BadRow, Conversation, Example, Rendered
from onecard.data.chats.examples import ExampleBatch, content_hash
from onecard.data.chats.rounds import fit
from onecard.data.chats.template import ChatTemplate
from onecard.data.split import Split
from onecard.data.tokenizer import vocabulary_size
from onecard.errors import DataError
from onecard.spec.mask_audit import SampleRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_CHARACTERS = 240
_SHOWN_SPANS = 16


@dataclass(frozen=True)
class Block:
    """Conversations of one part: `ids` and `is_target` of all of them back to back; `lengths`, `hashes` of each [n]."""

    ids: np.ndarray
    is_target: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    target_bytes: int

    @property
    def counts(self) -> ChatCounts:
        return ChatCounts(len(self.lengths), len(self.ids), int(self.is_target.sum()), self.target_bytes)


@dataclass(frozen=True)
class RenderedBatch:
    """A batch as blocks to train on and to hold out, and what was found in it."""

    train: Block
    heldout: Block
    flaws: Flaws
    bad: list[tuple[str, BadRow]]
    samples: list[SampleRow]


class Renderer:
    """Renders batches with one tokenizer, template and length; a pure function of its batch."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatTemplate,
        split: Split,
        max_tokens: int,
        max_rounds: int | None,
    ) -> None:
        self.vocab_size = vocabulary_size(tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        self._split = split
        self._max_tokens = max_tokens
        self._max_rounds = max_rounds
        self._stop_ids = np.array(template.stop_ids, dtype=np.int64)

    def render(self, batch: ExampleBatch, num_samples: int = 0) -> RenderedBatch:
        """Renders a batch; raises DataError where the tokenizer gives ids beyond its vocabulary."""
        fitted = fit(batch.examples, self._template, max_tokens=self._max_tokens, max_rounds=self._max_rounds)
        bad, rows, kept = list(batch.bad), list[Rendered](), list[int]()
        for index, found in enumerate(fitted):
            if isinstance(found, Rendered) and not found.is_target[1:].any():
                found = BadRow("nothing counts", "no token of it is to be learned")
            if isinstance(found, BadRow):
                bad.append((batch.origins[index], found))
            else:
                rows.append(found)
                kept.append(index)
        examples = [batch.examples[index] for index in kept]
        contents = [batch.contents[index] for index in kept]
        is_heldout = np.array([self._split.holds_out(content) for content in contents], dtype=bool)
        hashes = np.array([content_hash(content) for content in contents], dtype=np.uint64)
        return RenderedBatch(
            train=self._block(rows, hashes, ~is_heldout),
            heldout=self._block(rows, hashes, is_heldout),
            flaws=replace(self._flaws(rows), empty_system_rows=sum(map(_had_empty_system, examples))),
            bad=bad,
            samples=[
                self._sample(batch.origins[index], row)
                for index, row in zip(kept[:num_samples], rows[:num_samples], strict=True)
            ],
        )

    def _block(self, rows: Sequence[Rendered], hashes: np.ndarray, is_chosen: np.ndarray) -> Block:
        chosen = [row for row, takes in zip(rows, is_chosen.tolist(), strict=True) if takes]
        # Behind the last target nothing is learned: it would only take room.
        ends = [int(np.flatnonzero(row.is_target)[-1]) + 1 for row in chosen]
        ids = np.concatenate([np.empty(0, np.int32), *(row.ids[:end] for row, end in zip(chosen, ends, strict=True))])
        is_target = np.concatenate(
            [np.empty(0, bool), *(row.is_target[:end] for row, end in zip(chosen, ends, strict=True))]
        )
        lengths = np.array(ends, dtype=np.int64)
        # The first token has nothing before it to be predicted from.
        is_target[np.cumsum(lengths) - lengths] = False
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise DataError(
                f"the tokenizer gave id {ids.max()}, its vocabulary has {self.vocab_size:,} tokens. Use a tokenizer"
                " whose files belong together."
            )
        return Block(ids, is_target, lengths, hashes[is_chosen], sum(row.target_bytes for row in chosen))

    def _flaws(self, rows: Sequence[Rendered]) -> Flaws:
        bos = self._tokenizer.bos_token_id
        return Flaws(
            cut_rows=sum(row.is_cut for row in rows),
            dropped_rounds=sum(row.lost_rounds for row in rows),
            lost_tokens=sum(row.lost_tokens for row in rows),
            double_bos_rows=0 if bos is None else sum(row.ids[:2].tolist() == [bos, bos] for row in rows),
            partial_rows=sum(row.is_partial for row in rows),
            # What was cut has lost its stop token with its end, and is told as cut.
            rows_without_stop=self._count_without_stop([row for row in rows if not row.is_cut]),
        )

    def _count_without_stop(self, rows: Sequence[Rendered]) -> int:
        """Counts rows in which some run of targets holds no token that ends a turn."""
        if not rows:
            return 0
        # A gap before each row keeps its first run apart from the row before.
        ids = np.concatenate([part for row in rows for part in ([-1], row.ids)])
        counts = np.concatenate([part for row in rows for part in ([False], row.is_target)] + [[False]]).astype(bool)
        row_of = np.repeat(np.arange(len(rows)), [len(row.ids) + 1 for row in rows])
        stops = np.concatenate([[0], np.cumsum(np.isin(ids, self._stop_ids))])
        starts = np.flatnonzero(counts[1:-1] & ~counts[:-2]) + 1
        ends = np.flatnonzero(counts[1:-1] & ~counts[2:]) + 2
        return len(np.unique(row_of[starts[stops[ends] == stops[starts]]]))

    def _sample(self, origin: str, row: Rendered) -> SampleRow:
        borders = [0, *(np.flatnonzero(np.diff(row.is_target)) + 1).tolist(), len(row.ids)]
        spans = []
        for start, end in pairwise(borders[: _SHOWN_SPANS + 1]):
            text = self._tokenizer.decode(row.ids[start:end].tolist(), skip_special_tokens=False)
            spans.append((_shortened(text), bool(row.is_target[start])))
        if len(borders) - 1 > _SHOWN_SPANS:
            spans.append((" …", False))
        return SampleRow(origin=origin, spans=tuple(spans))


def _had_empty_system(example: Example) -> bool:
    return isinstance(example, Conversation) and example.had_empty_system


def _shortened(text: str) -> str:
    if len(text) <= 2 * _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … {text[-_SHOWN_CHARACTERS:]}"
