"""What one forward and backward pass takes."""

from dataclasses import dataclass

from torch import Tensor

from onecard.model.attention import DocumentBorders


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device of the model: ids and targets [B, T], and the borders of its documents.

    `target_index`: which of the flattened tokens have a target, [n] int64, or None where the head runs on all tokens.
    `seed`: of its dropout, which is then the same on any rank; without one it goes on where the batch before ended.
    """

    ids: Tensor
    targets: Tensor
    borders: DocumentBorders | None
    target_index: Tensor | None = None
    seed: int | None = None
