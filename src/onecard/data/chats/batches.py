"""Conversations to batches: the micro-batches of a step, and those of the held-out part.

ids      B u u A a s | B u A a s | . .     two conversations in a row of a batch, and padding
targets  - - a s - -   ...                 the next token where it counts (a answer, s stop), else -100
inputs   the last token of a conversation is only ever a target: it takes no place in the row
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onecard.data.batches import NO_TARGET, Batch
from onecard.data.chats.chat_file import Conversations
from onecard.data.chats.packing import Packing, pack
from onecard.data.sampler import IndexSampler

_WIDTH_MULTIPLE = 8  # what tensor cores like; few different shapes

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class BatchShape:
    """How steps are laid out: rows of at most `capacity` tokens, so many in a micro-batch, packed in one of the ways.

    `is_static`: every micro-batch is exactly `rows` x `capacity`, padded, so that a compiled model sees one shape.
    """

    capacity: int
    rows: int
    packing: Packing = "off"
    is_static: bool = False


class ChatSteps:
    """Lays out the conversations at given positions as the micro-batches of one step, in a fixed order."""

    def __init__(
        self, sources: Sequence[Conversations], sampler: IndexSampler, shape: BatchShape, padding_id: int
    ) -> None:
        self._sources = tuple(sources)
        self._sampler = sampler
        self._shape = shape
        self._padding_id = padding_id

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives source [n] and conversation [n] at positions [n]."""
        return self._sampler.locate(positions)

    def build(self, sources: np.ndarray, rows: np.ndarray) -> list[Batch]:
        """Reads the conversations [N] of a step and packs them into micro-batches."""
        located = zip(sources.tolist(), rows.tolist(), strict=True)
        pairs = [_shift(*self._sources[source].row(row)) for source, row in located]
        return lay_out(pairs, self._shape, self._padding_id)


def lay_out(pairs: Sequence[Pair], shape: BatchShape, padding_id: int) -> list[Batch]:
    """Packs conversations, each inputs and targets [n], into micro-batches."""
    lengths = np.array([len(inputs) for inputs, _ in pairs], dtype=np.int64)
    batches = []
    for micro_batch in pack(lengths, shape.capacity, shape.rows, shape.packing):
        rows = [[pairs[index] for index in row] for row in micro_batch]
        longest = max(int(lengths[row].sum()) for row in micro_batch)
        if shape.packing == "flat":
            size = 1, longest
        elif shape.is_static:
            size = shape.rows, shape.capacity
        else:
            size = len(rows), min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, shape.capacity)
        batches.append(_to_batch(rows, size, padding_id))
    return batches


def heldout_chats(
    chats: Conversations, shape: BatchShape, padding_id: int, limit_rows: int | None = None
) -> Iterator[Batch]:
    """Streams held-out conversations, one per row, those of like length together, each exactly once.

    A limit takes that many conversations spread evenly over the part, always the same ones. Which tokens
    count does not depend on the shape.
    """
    num_rows = chats.num_rows
    count = num_rows if limit_rows is None else min(num_rows, limit_rows)
    chosen = np.arange(count) * num_rows // count
    lengths = np.concatenate(list(chats.lengths()))[chosen]
    chosen = chosen[np.argsort(lengths, kind="stable")]
    for first in range(0, count, shape.rows):
        pairs = [_shift(*chats.row(row)) for row in chosen[first : first + shape.rows].tolist()]
        yield from lay_out(pairs, shape, padding_id)


def _shift(ids: np.ndarray, is_target: np.ndarray) -> Pair:
    return ids[:-1], np.where(is_target[1:], ids[1:], NO_TARGET)


def _to_batch(rows: list[list[Pair]], size: tuple[int, int], padding_id: int) -> Batch:
    import torch

    ids = np.full(size, padding_id, dtype=np.int64)
    targets = np.full(size, NO_TARGET, dtype=np.int64)
    documents = np.zeros(size, dtype=np.int32)
    num_tokens = 0
    for row, pairs in enumerate(rows):
        end = 0
        for number, (inputs, row_targets) in enumerate(pairs):
            start, end = end, end + len(inputs)
            ids[row, start:end], targets[row, start:end] = inputs, row_targets
            documents[row, start:end] = number
        num_tokens += end
        # Padding is a document of its own, so that it attends to none.
        documents[row, end:] = len(pairs)
    # Padding behind the only conversation of each row needs no border: causality keeps it out of all that counts.
    has_borders = any(len(pairs) > 1 for pairs in rows)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(documents) if has_borders else None,
        int((targets != NO_TARGET).sum()),
        ids.size - num_tokens,
    )
