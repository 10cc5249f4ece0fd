"""Token files to batches: ids, targets shifted by one, and which document each token belongs to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onecard.data.sampler import BlockSampler, heldout_blocks
from onecard.data.token_file import TokenFile

if TYPE_CHECKING:
    import torch

NO_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows and T tokens.

    `ids` [B, T] int64; `targets` [B, T] int64, the next token or -100 for none; `documents` [B, T] int32, the running
    number of the document within the row, or None where no row has a border inside, so that plain causal attention is
    right. `num_targets` counts the targets that are not -100; `num_padding` the places that stand for no token.
    """

    ids: "torch.Tensor"
    targets: "torch.Tensor"
    documents: "torch.Tensor | None"
    num_targets: int
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        return self.ids.numel() - self.num_padding

    def pin(self) -> "Batch":
        """Copies the tensors to page-locked memory, from where a copy to the GPU does not block."""
        pinned = None if self.documents is None else self.documents.pin_memory()
        return replace(self, ids=self.ids.pin_memory(), targets=self.targets.pin_memory(), documents=pinned)


class BlockSteps:
    """Reads the blocks at given positions as the micro-batches of one step."""

    def __init__(
        self, token_files: Sequence[TokenFile], sampler: BlockSampler, separator_id: int, micro_batch_size: int
    ) -> None:
        self._token_files = tuple(token_files)
        self._sampler = sampler
        self._separator_id = separator_id
        self._micro_batch_size = micro_batch_size

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives source [n] and first token [n] of the blocks at positions [n]."""
        return self._sampler.locate(positions)

    def build(self, sources: np.ndarray, starts: np.ndarray) -> list[Batch]:
        """Reads blocks [n] as micro-batches, the last of which may be smaller."""
        size = self._micro_batch_size
        rows = read_rows(self._token_files, sources, starts, self._sampler.block_length)
        return [rows_to_batch(rows[first : first + size], self._separator_id) for first in range(0, len(rows), size)]


def gather_batch(
    token_files: Sequence[TokenFile], sampler: BlockSampler, positions: np.ndarray, separator_id: int
) -> Batch:
    """Reads the blocks at the given positions [B] as one batch of B rows; a pure function of its arguments."""
    sources, starts = sampler.locate(positions)
    return rows_to_batch(read_rows(token_files, sources, starts, sampler.block_length), separator_id)


def read_rows(
    token_files: Sequence[TokenFile], sources: np.ndarray, starts: np.ndarray, block_length: int
) -> np.ndarray:
    """Reads blocks [n], each with the token after it: int64 [n, block_length + 1]."""
    rows = np.empty((len(starts), block_length + 1), dtype=np.int64)
    for row, source, start in zip(rows, sources.tolist(), starts.tolist(), strict=True):
        row[:] = token_files[source][start : start + len(row)]
    return rows


def rows_to_batch(rows: np.ndarray, separator_id: int) -> Batch:
    """Turns rows [B, T + 1] into ids and targets [B, T]."""
    return _build(rows[:, :-1].copy(), rows[:, 1:].copy(), separator_id, rows[:, 1:].size)


def heldout_batches(
    token_file: TokenFile,
    block_length: int,
    batch_size: int,
    separator_id: int,
    limit_rows: int | None = None,
) -> Iterator[Batch]:
    """Streams the held-out part in blocks that do not overlap: every token but the first is a target exactly once.

    Which targets count does not depend on the batch size. The last row may be padded (target -100), the last batch may
    have fewer rows. A limit takes that many blocks spread evenly over the part, always the same ones.
    """
    starts, lengths = heldout_blocks(token_file.num_tokens, block_length)
    if limit_rows is not None and limit_rows < len(starts):
        chosen = np.arange(limit_rows) * len(starts) // limit_rows
        starts, lengths = starts[chosen], lengths[chosen]
    for first in range(0, len(starts), batch_size):
        picked = slice(first, first + batch_size)
        ids = np.full((len(starts[picked]), block_length), separator_id, dtype=np.int64)
        targets = np.full_like(ids, NO_TARGET)
        for row, (start, length) in enumerate(zip(starts[picked].tolist(), lengths[picked].tolist(), strict=True)):
            block = token_file[start : start + length + 1]
            ids[row, :length], targets[row, :length] = block[:-1], block[1:]
        yield _build(ids, targets, separator_id, int(lengths[picked].sum()))


def share_rows(sizes: Sequence[int], limit: int | None) -> list[int | None]:
    """Divides a number of rows among held-out parts by their size, at least one each; None leaves all whole."""
    if limit is None:
        return [None] * len(sizes)
    total = sum(sizes)
    return [max(1, round(limit * size / total)) for size in sizes]


def _build(ids: np.ndarray, targets: np.ndarray, separator_id: int, num_targets: int) -> Batch:
    import torch

    # Padding looks like separators, but is no border: behind the last target nothing can be attended to that counts.
    borders = (ids == separator_id) & (targets != NO_TARGET)
    borders[:, 0] = False
    documents = torch.from_numpy(borders.cumsum(axis=1, dtype=np.int32)) if borders.any() else None
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), documents, num_targets)
