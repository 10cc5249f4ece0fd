"""Keys and values of many texts at once, each in a row of its own, written in place.

    rows  0   k k k k k . . .      a text begins at its row's first column, so that nothing stands before it
          1   k k k . . . . .      . unused columns: masked
          2   k k k k . . . .
              └ extent ┘           what attention reads: a view, as wide as the longest text

Rows in use are always the first ones: where one ends, the last takes its place.
A decoder runs whole texts [R, T], or of texts that go on one token each, or as many as there are guesses to check; then
every token is a row of the decoder's input [N, 1], so that texts with fewer tokens cost no more. Attention alone fills
up each text to the T tokens of the longest.
Shapes: R rows in use, N new tokens of all rows, T new tokens of a row, H query heads, K key-value heads, G query heads
that share one, E extent, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Places:
    """Where new tokens of texts stand.

    `slots_N`: among the R * T of texts that are filled up to the longest; None where each text has one token.
    `tokens_S`: the token of each of those slots; where there is none, any.
    """

    rows_N: Tensor
    columns_N: Tensor
    slots_N: Tensor | None
    tokens_S: Tensor | None


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
        self._places: _Places | None = None
        self._extent = 0
        self._masks: dict[int | None, Tensor | None] = {}

    def begin(self, lengths: Sequence[int]) -> None:
        """Adds rows for texts of so many tokens, which the decoder runs next, padded on the right."""
        self._first_new = len(self.lengths)
        self.lengths += lengths
        self._places = None

    def advance(self, new: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Adds columns for new ids of each row, which the decoder runs next; gives the ids and their positions, [N]."""
        num_each, most = list(map(len, new)), max(map(len, new))
        ids = [token for row in new for token in row]
        rows = [row for row, num in enumerate(num_each) for _ in range(num)]
        offsets = [offset for num in num_each for offset in range(num)]
        columns = [self.lengths[row] + offset for row, offset in zip(rows, offsets, strict=True)]
        slots = [row * most + offset for row, offset in zip(rows, offsets, strict=True)]
        # One copy to the device for all.
        ids_N, rows_N, columns_N, slots_N = torch.tensor([ids, rows, columns, slots], device=device)
        self.lengths = [length + num for length, num in zip(self.lengths, num_each, strict=True)]
        self._extent = _round_up(max(self.lengths), _EXTENT_STEP[device_kind(device)])
        self._masks.clear()
        if most == 1:
            self._places = _Places(rows_N, columns_N, None, None)
        else:
            tokens_S = slots_N.new_zeros(len(new) * most)
            tokens_S[slots_N] = torch.arange(len(ids), device=device)
            self._places = _Places(rows_N, columns_N, slots_N, tokens_S)
        return ids_N, columns_N

    def cut(self, row: int, length: int) -> None:
        """Forgets what a row holds from a column on: the next token is written there."""
        self.lengths[row] = length

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
            if self._places is None:
                kept[self._first_new : len(self.lengths), :, : new_RKTD.shape[2]] = new_RKTD
                read.append(new_RKTD)
            else:
                kept[self._places.rows_N, :, self._places.columns_N] = new_RKTD[:, :, 0]
                read.append(kept[: len(self.lengths), :, : self._extent])
        return read[0], read[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Gives the columns in use; positions are told to the decoder, so that nothing depends on it."""
        return max(self.lengths, default=0)

    @property
    def is_new(self) -> bool:
        """Whether the decoder runs whole texts, not new tokens of each."""
        return self._places is None

    def spread(self, q_NHD: Tensor, num_shared: int) -> Tensor:
        """Gives queries [R, K, T * G, D] of rows, those that share keys beside each other: keys are never repeated."""
        assert self._places is not None
        rows, width = len(self.lengths), q_NHD.shape[-1]
        if self._places.tokens_S is None:
            return q_NHD.view(rows, -1, num_shared, width)
        q_RTKGD = q_NHD[self._places.tokens_S].view(rows, -1, q_NHD.shape[1] // num_shared, num_shared, width)
        return q_RTKGD.transpose(1, 2).flatten(2, 3)

    def collect(self, out_RKSD: Tensor, num_shared: int) -> Tensor:
        """Gives what attention found for the new tokens [N, H, D] from what it found for `spread` queries."""
        assert self._places is not None
        rows, kv_heads, _, width = out_RKSD.shape
        if self._places.slots_N is None:
            return out_RKSD.reshape(rows, -1, width)
        out_RTKGD = out_RKSD.view(rows, kv_heads, -1, num_shared, width).transpose(1, 2)
        return out_RTKGD.reshape(-1, kv_heads * num_shared, width)[self._places.slots_N]

    def mask(self, like: Tensor, window: int | None, num_shared: int) -> Tensor | None:
        """Gives zero or minus infinity [R, 1, T * G, E] for what queries see ([R, 1, 1, E] for one token a row).

        None where that is all.
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(like, window, num_shared)
        return self._masks[window]

    def _make_mask(self, like: Tensor, window: int | None, num_shared: int) -> Tensor | None:
        assert self._places is not None
        if window is not None and window >= max(self.lengths):
            window = None
        tokens_S = self._places.tokens_S
        if tokens_S is None and min(self.lengths) == self._extent and window is None:
            return None
        last_S = self._places.columns_N if tokens_S is None else self._places.columns_N[tokens_S]
        last_RT1 = last_S.view(len(self.lengths), -1, 1)
        index_E = torch.arange(self._extent, device=like.device)
        hidden_RTE = index_E > last_RT1
        if window is not None:
            hidden_RTE |= index_E <= last_RT1 - window
        mask_RTE = torch.zeros(hidden_RTE.shape, dtype=like.dtype, device=like.device)
        mask_RTE.masked_fill_(hidden_RTE, float("-inf"))
        if tokens_S is not None:
            mask_RTE = mask_RTE.repeat_interleave(num_shared, dim=1)
        return mask_RTE[:, None]

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
    """Attends whole texts causally, and new tokens to their rows of a cache. Returns [R, T, H, D] or [N, 1, H, D].

    Raises:
        UnsupportedAttentionError: the architecture wants something else.
    """
    if unknown := [name for name in _UNKNOWN if settings.get(name) is not None]:
        raise UnsupportedAttentionError(", ".join(unknown))
    scaling, sliding_window = settings.get("scaling"), settings.get("sliding_window")
    if row_cache.is_new:
        return attend_sdpa(module, q_RHTD, k_RKED, v_RKED, None, scaling=scaling, sliding_window=sliding_window)
    num_shared = q_RHTD.shape[1] // k_RKED.shape[1]
    out_RKSD = F.scaled_dot_product_attention(
        row_cache.spread(q_RHTD[:, :, 0], num_shared),
        k_RKED,
        v_RKED,
        attn_mask=row_cache.mask(q_RHTD, sliding_window, num_shared),
        scale=scaling,
    )
    return row_cache.collect(out_RKSD, num_shared)[:, None], None


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


# As with those of training, no mask function is registered: transformers then builds none.
AttentionInterface.register(NAME, attend_rows)
