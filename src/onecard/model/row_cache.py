"""Keys and values of many texts at once, each in a row of its own, written in place.

    rows  0   k k k k k . . .      a text begins at its row's first column, so that nothing stands before it
          1   k k k . . . . .      . unused columns: masked
          2   k k k k . . . .
              └ extent ┘           what attention reads: a view, as wide as the longest text

Rows in use are always the first ones: where one ends, the last takes its place.
Shapes: R rows in use, H query heads, K key-value heads, T new tokens, E extent, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from onecard.model.attention import attend_sdpa
from onecard.model.families import PREFIX
from onecard.model.target import device_kind

NAME = PREFIX + "rows"

# What an attention may be asked for beside this; nobody computes it here.
_UNKNOWN = ("softcap", "s_aux", "position_bias")
# A GPU likes few different shapes, and masks whose rows begin at multiples of 16 bytes; a CPU does the least work.
_EXTENT_STEP = {"cpu": 1, "cuda": 64}


class UnsupportedAttentionError(Exception):
    """An architecture asks for an attention that reading rows in place does not know."""


class RowCache:
    """Keys and values of up to `num_rows` texts of up to `num_columns` tokens; what a decoder calls its past.

    Takes its memory at the first use, in the type and on the device of what it is given.
    """

    is_compileable = False

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.lengths: list[int] = []
        self._num_rows, self._num_columns = num_rows, _round_up(num_columns, max(_EXTENT_STEP.values()))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_new = 0
        self._places_2R: tuple[Tensor, Tensor] | None = None
        self._extent = 0
        self._masks: dict[int | None, Tensor | None] = {}

    def begin(self, lengths: Sequence[int]) -> None:
        """Adds rows for texts of so many tokens, which the decoder runs next, padded on the right."""
        self._first_new = len(self.lengths)
        self.lengths += lengths
        self._places_2R = None

    def advance(self, positions_R: Tensor) -> None:
        """Adds a column to every row, at the positions given, for the token that the decoder runs next."""
        step = _EXTENT_STEP[device_kind(positions_R.device)]
        self.lengths = [length + 1 for length in self.lengths]
        self._extent = _round_up(max(self.lengths), step)
        self._places_2R = torch.arange(len(self.lengths), device=positions_R.device), positions_R
        self._masks.clear()

    def remove(self, row: int) -> None:
        """Frees a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for tensor in (tensor for pair in self._layers.values() for tensor in pair):
                tensor[row, :, : self.lengths[last]] = tensor[last, :, : self.lengths[last]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def update(self, k_RKTD: Tensor, v_RKTD: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values of new tokens, and gives those that attention reads."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._allocate(k_RKTD), self._allocate(v_RKTD)
        read = []
        for new_RKTD, kept in zip((k_RKTD, v_RKTD), self._layers[layer_idx], strict=True):
            if self._places_2R is None:
                kept[self._first_new : len(self.lengths), :, : new_RKTD.shape[2]] = new_RKTD
                read.append(new_RKTD)
            else:
                rows_R, columns_R = self._places_2R
                kept[rows_R, :, columns_R] = new_RKTD[:, :, 0]
                read.append(kept[: len(self.lengths), :, : self._extent])
        return read[0], read[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Gives the columns in use; positions are told to the decoder, so that nothing depends on it."""
        return max(self.lengths, default=0)

    @property
    def is_new(self) -> bool:
        """Whether the decoder runs whole texts, not one token of each."""
        return self._places_2R is None

    def mask(self, like: Tensor, window: int | None) -> Tensor | None:
        """Gives zero or minus infinity [R, 1, 1, E] for what each row's newest token sees; None where that is all."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(like, window)
        return self._masks[window]

    def _make_mask(self, like: Tensor, window: int | None) -> Tensor | None:
        assert self._places_2R is not None
        if window is not None and window >= max(self.lengths):
            window = None
        if min(self.lengths) == self._extent and window is None:
            return None
        last_R1 = self._places_2R[1][:, None]
        index_E = torch.arange(self._extent, device=like.device)
        hidden_RE = index_E > last_R1
        if window is not None:
            hidden_RE |= index_E <= last_R1 - window
        mask_RE = torch.zeros(hidden_RE.shape, dtype=like.dtype, device=like.device)
        return mask_RE.masked_fill_(hidden_RE, float("-inf"))[:, None, None]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros: what is masked is multiplied by zero, and memory of others may hold what zero does not make zero.
        return like.new_zeros((self._num_rows, like.shape[1], self._num_columns, like.shape[3]))


def attend_rows(
    module: torch.nn.Module,
    q_RHTD: Tensor,
    k_RKED: Tensor,
    v_RKED: Tensor,
    attention_mask: Tensor | None,
    *,
    row_cache: RowCache,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attends whole texts causally, and single tokens to their rows of a cache. Returns [R, T, H, D].

    Raises:
        UnsupportedAttentionError: the architecture wants something else.
    """
    if unknown := [name for name in _UNKNOWN if settings.get(name) is not None]:
        raise UnsupportedAttentionError(", ".join(unknown))
    scaling, sliding_window = settings.get("scaling"), settings.get("sliding_window")
    if row_cache.is_new:
        return attend_sdpa(module, q_RHTD, k_RKED, v_RKED, None, scaling=scaling, sliding_window=sliding_window)
    rows, heads, _, width = q_RHTD.shape
    # Queries that share keys stand as tokens beside each other: the cache is read once, and never repeated.
    out_RKGD = F.scaled_dot_product_attention(
        q_RHTD.view(rows, k_RKED.shape[1], -1, width),
        k_RKED,
        v_RKED,
        attn_mask=row_cache.mask(q_RHTD, sliding_window),
        scale=scaling,
    )
    return out_RKGD.reshape(rows, 1, heads, -1), None


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


# As with those of training, no mask function is registered: transformers then builds none.
AttentionInterface.register(NAME, attend_rows)
