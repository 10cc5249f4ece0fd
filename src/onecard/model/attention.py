"""Attention in which a document never sees another, on every backend.

    tokens     a a a b b | c c c c c          one row of a batch holds pieces of several documents
    documents  0 0 0 1 1 | 0 0 0 0 0          `Batch.documents`: index of the document within its row
    mask       causal AND same document       rows without an inner border need causality alone

The functions are registered with transformers' attention interface, so that every decoder that follows it calls them.
Borders reach them as keyword arguments of the decoder's forward (`document_mask`, `document_lengths`,
`cumulative_lengths`). Families for which they do not do (`families.py`) run the eager attention of their own code, with
the same mask as their `attention_mask`, or a document at a time.
Shapes: B batch, H query heads, K key-value heads, T tokens, D head width.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, PreTrainedModel

from onecard.model.families import PREFIX
from onecard.model.target import device_kind

# Tokens, and the width of a head, from which the CPU's flash kernel is faster on 16-bit input than on fp32: 35 against
# 52 ms at 4 x 12 x 512 x 64, but 29 against 21 at 16 x 8 x 256 x 32 and 8.0 against 3.8 at 16 x 6 x 64 x 64 (LOG.md).
_LONG, _WIDE = 256, 64


@dataclass(frozen=True)
class DocumentBorders:
    """Where documents end inside the rows of one micro-batch, in the form its backend reads.

    `mask_BTT`: where a query may see a key, causality included (sdpa). True or False on a CPU; on a GPU zero or minus
    infinity in the type of the model, because its kernels would otherwise make and keep such a copy in every layer.
    `lengths`: tokens of each document of a single row, one after the other (sdpa on a CPU, not compiled).
    `cumulative_lengths`: first token of each document over the flattened rows, closed by B * T and padded with it
    to a length that changes seldom, so that a compiled decoder is not compiled anew (varlen).
    `attention_mask_B1TT`: zero or the least number, causality included; given for rows without borders, too (eager).
    `apart`: tokens of each document of each row, which the decoder runs one at a time (apart).
    """

    position_ids_BT: Tensor
    mask_BTT: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    cumulative_lengths: Tensor | None = None
    attention_mask_B1TT: Tensor | None = None
    apart: tuple[tuple[int, ...], ...] | None = None

    def as_keywords(self) -> dict[str, Any]:
        """Keyword arguments for the decoder; tensors rather than this object, so that a compiler sees them."""
        keywords: dict[str, Any] = {"position_ids": self.position_ids_BT}
        if self.mask_BTT is not None:
            keywords["document_mask"] = self.mask_BTT
        if self.lengths is not None:
            keywords["document_lengths"] = self.lengths
        if self.cumulative_lengths is not None:
            keywords["cumulative_lengths"] = self.cumulative_lengths
        if self.attention_mask_B1TT is not None:
            keywords["attention_mask"] = self.attention_mask_B1TT
        return keywords


def find_borders(
    documents_BT: Tensor | None, shape: tuple[int, int], like: Tensor, backend: str, *, by_mask: bool = False
) -> DocumentBorders | None:
    """Turns document indices (on the CPU) into what `backend` reads; None where causality alone is right.

    `like` is a parameter of the model: it tells device and type. `by_mask`: a mask also for a single row on a CPU, as a
    compiled decoder needs it, which lengths would have compiled anew for every batch.
    """
    device = like.device
    if documents_BT is None and backend not in ("varlen", "eager"):
        return None
    if documents_BT is None:
        documents_BT = torch.zeros(shape, dtype=torch.int32)
    is_start_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index_T = torch.arange(documents_BT.shape[1])
    start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=1).values
    positions = _send(index_T - start_BT, device)
    if backend == "varlen":
        starts = is_start_BT.flatten().nonzero().flatten().to(torch.int32)
        padded = max(64, 1 << len(starts).bit_length())
        lengths = torch.full((padded + 1,), documents_BT.numel(), dtype=torch.int32)
        lengths[: len(starts)] = starts
        return DocumentBorders(positions, cumulative_lengths=_send(lengths, device))
    if backend == "apart":
        return DocumentBorders(positions, apart=tuple(map(_lengths, is_start_BT)))
    if backend == "eager":
        mask_BTT = _mask(_send(documents_BT, device), like, to_add=True)
        return DocumentBorders(positions, attention_mask_B1TT=mask_BTT[:, None])
    if len(documents_BT) == 1 and device_kind(device) == "cpu" and not by_mask:
        return DocumentBorders(positions, lengths=_lengths(is_start_BT[0]))
    return DocumentBorders(positions, mask_BTT=_mask(_send(documents_BT, device), like))


def _lengths(is_start_T: Tensor) -> tuple[int, ...]:
    if isinstance(is_start_T, FakeTensor):
        return (len(is_start_T),)  # without values there are no borders: a plan counts one document
    starts = [*np.flatnonzero(is_start_T.numpy()).tolist(), len(is_start_T)]
    return tuple(end - start for start, end in pairwise(starts))


def _mask(documents_BT: Tensor, like: Tensor, *, to_add: bool = False) -> Tensor:
    num_tokens = documents_BT.shape[1]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=like.device).tril()
    mask_BTT = (documents_BT[:, :, None] == documents_BT[:, None, :]) & causal_TT
    if device_kind(like.device) == "cpu" and not to_add:
        return mask_BTT
    # Code of other people may take the softmax of a row before it looks for what is not a number.
    hidden = torch.finfo(like.dtype).min if to_add else float("-inf")
    return torch.zeros(mask_BTT.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask_BTT, hidden)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory would wait for the device.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _add_window(mask_BTT: Tensor | None, q_BHTD: Tensor, window: int | None) -> Tensor | None:
    num_tokens = q_BHTD.shape[2]
    if window is None or window >= num_tokens:
        return mask_BTT
    index_T = torch.arange(num_tokens, device=q_BHTD.device)
    distance_TT = index_T[:, None] - index_T[None, :]
    near_TT = (distance_TT >= 0) & (distance_TT < window)
    if mask_BTT is None:
        return near_TT[None]
    return mask_BTT & near_TT if mask_BTT.dtype == torch.bool else mask_BTT.masked_fill(~near_TT, float("-inf"))


def attend_sdpa(
    module: torch.nn.Module,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    document_mask: Tensor | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends with PyTorch's own kernels; the plain causal case keeps the fast ones eligible. Returns [B, T, H, D]."""
    out_dtype = q_BHTD.dtype
    longest = max(document_lengths or (q_BHTD.shape[2],))
    if (
        device_kind(q_BHTD.device) == "cpu"
        and out_dtype != torch.float32
        and (dropout or longest < _LONG or q_BHTD.shape[3] < _WIDE)
    ):
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.float(), k_BKTD.float(), v_BKTD.float()
    if document_lengths is None:
        mask_BTT = _add_window(document_mask, q_BHTD, sliding_window)
        return _attend(q_BHTD, k_BKTD, v_BKTD, mask_BTT, scaling, dropout).to(out_dtype), None
    # Document by document, in a tenth of the time that the whole row takes with a mask (LOG.md). Split rather than
    # sliced: each slice would hand back a gradient of the whole row.
    outputs = []
    for q, k, v in zip(*(x.split(document_lengths, dim=2) for x in (q_BHTD, k_BKTD, v_BKTD)), strict=True):
        outputs.append(_attend(q, k, v, _add_window(None, q, sliding_window), scaling, dropout).to(out_dtype))
    return torch.cat(outputs, dim=1), None


def _attend(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask_BTT: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    shares_heads = q_BHTD.shape[1] != k_BKTD.shape[1]
    if shares_heads and mask_BTT is not None:
        # With a mask only the memory-efficient kernel is left, and it takes no shared heads: the alternative is the
        # plain one, which holds all T x T scores.
        k_BKTD, v_BKTD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in (k_BKTD, v_BKTD))
        shares_heads = False
    out_BHTD = F.scaled_dot_product_attention(
        q_BHTD,
        k_BKTD,
        v_BKTD,
        attn_mask=None if mask_BTT is None else mask_BTT[:, None],
        dropout_p=dropout,
        is_causal=mask_BTT is None,
        scale=scaling,
        enable_gqa=shares_heads,
    )
    return out_BHTD.transpose(1, 2)


def attend_varlen(
    module: torch.nn.Module,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cumulative_lengths: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends with PyTorch's variable-length flash kernel (CUDA, compute capability 8.0, 16-bit, no dropout)."""
    from torch.nn.attention.varlen import varlen_attn

    assert cumulative_lengths is not None, "varlen attention needs the borders that find_borders gives"
    batch, heads, num_tokens, width = q_BHTD.shape
    # Shared heads are repeated here: older versions of the kernel do not know them.
    k_BHTD, v_BHTD = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BKTD, v_BKTD))
    query, key, value = (x.transpose(1, 2).reshape(batch * num_tokens, -1, width) for x in (q_BHTD, k_BHTD, v_BHTD))
    out = varlen_attn(
        query,
        key,
        value,
        cumulative_lengths,
        cumulative_lengths,
        num_tokens,
        num_tokens,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )
    assert isinstance(out, Tensor)
    return out.reshape(batch, num_tokens, heads, width), None


def attend_eager(
    module: torch.nn.Module,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends by the eager function of the family, which knows its softcap or sinks. Returns [B, T, H, D], weights."""
    if attention_mask is None:
        attention_mask = _mask(q_BHTD.new_zeros(1, q_BHTD.shape[2]), q_BHTD, to_add=True)[:, None]
    # transformers takes a mask as it is given, for layers with a window, too.
    mask_BTT = _add_window(attention_mask[:, 0], q_BHTD, sliding_window)
    assert mask_BTT is not None
    attend = sys.modules[type(module).__module__].eager_attention_forward
    found: tuple[Tensor, Tensor | None] = attend(
        module, q_BHTD, k_BKTD, v_BKTD, mask_BTT[:, None], sliding_window=sliding_window, **settings
    )
    return found


# No mask function is registered with them: transformers then builds none, and does not look into the position ids for
# packed documents, which would wait for the device in every micro-batch.
AttentionInterface.register(PREFIX + "sdpa", attend_sdpa)
AttentionInterface.register(PREFIX + "varlen", attend_varlen)
AttentionInterface.register(PREFIX + "eager", attend_eager)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switches a model to another registered attention for the length of the block; `sdpa` is eager where it lacks."""
    before = model.config._attn_implementation
    name = "eager" if name == "sdpa" and not model._supports_sdpa else name
    if name == before:  # models of older code cannot be switched, and say so
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
