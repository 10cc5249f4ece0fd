"""Attention in which a document never sees another, on every backend.

    tokens     a a a b b | c c c c c          one row of a batch holds pieces of several documents
    documents  0 0 0 1 1 | 0 0 0 0 0          `Batch.documents`: index of the document within its row
    mask       causal AND same document       rows without an inner border need causality alone

The functions are registered with transformers' attention interface, so that every decoder that follows it calls them.
Borders reach them as keyword arguments of the decoder's forward (`document_mask`, `cumulative_lengths`).
For an attention without a mask function transformers builds no mask of its own, so none is registered: one that gives
nothing would still let it read position ids back from the device, in every forward pass.
Shapes: B batch, H query heads, K key-value heads, T tokens, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

PREFIX = "onecard_"


@dataclass(frozen=True)
class DocumentBorders:
    """Where documents end inside the rows of one micro-batch, in the form its backend reads.

    `mask_BTT`: True where a query may see a key, causality included (sdpa).
    `cumulative_lengths`: first token of each document over the flattened rows, closed by B * T and padded with it
    to a length that changes seldom, so that a compiled decoder is not compiled anew (varlen).
    """

    position_ids_BT: Tensor
    mask_BTT: Tensor | None = None
    cumulative_lengths: Tensor | None = None

    def as_keywords(self) -> dict[str, Tensor]:
        """Keyword arguments for the decoder; tensors rather than this object, so that a compiler sees them."""
        keywords = {"position_ids": self.position_ids_BT}
        if self.mask_BTT is not None:
            keywords["document_mask"] = self.mask_BTT
        if self.cumulative_lengths is not None:
            keywords["cumulative_lengths"] = self.cumulative_lengths
        return keywords


def find_borders(
    documents_BT: Tensor | None, shape: tuple[int, int], device: torch.device, backend: str
) -> DocumentBorders | None:
    """Turns document indices (on the CPU) into what `backend` reads; None where causality alone is right."""
    if documents_BT is None and backend != "varlen":
        return None
    if documents_BT is None:
        documents_BT = torch.zeros(shape, dtype=torch.int32)
    is_start_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index_T = torch.arange(documents_BT.shape[1])
    start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=1).values
    positions = (index_T - start_BT).to(device, non_blocking=True)
    if backend == "varlen":
        starts = is_start_BT.flatten().nonzero().flatten().to(torch.int32)
        padded = max(64, 1 << len(starts).bit_length())
        lengths = torch.full((padded + 1,), documents_BT.numel(), dtype=torch.int32)
        lengths[: len(starts)] = starts
        return DocumentBorders(positions, cumulative_lengths=lengths.to(device, non_blocking=True))
    documents_BT = documents_BT.to(device, non_blocking=True)
    causal_TT = torch.ones(len(index_T), len(index_T), dtype=torch.bool, device=device).tril()
    mask_BTT = (documents_BT[:, :, None] == documents_BT[:, None, :]) & causal_TT
    return DocumentBorders(positions, mask_BTT=mask_BTT)


def _windowed(mask_BTT: Tensor | None, num_tokens: int, window: int, device: torch.device) -> Tensor:
    index_T = torch.arange(num_tokens, device=device)
    distance_TT = index_T[:, None] - index_T[None, :]
    near_TT = (distance_TT >= 0) & (distance_TT < window)
    return near_TT[None] if mask_BTT is None else mask_BTT & near_TT


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends with PyTorch's own kernels; the plain causal case keeps the fast ones eligible. Returns [B, T, H, D]."""
    num_tokens = q_BHTD.shape[2]
    mask_BTT = document_mask
    if sliding_window is not None and sliding_window < num_tokens:
        mask_BTT = _windowed(mask_BTT, num_tokens, sliding_window, q_BHTD.device)
    out_dtype = q_BHTD.dtype
    if q_BHTD.device.type == "cpu" and out_dtype != torch.float32:
        # The CPU's flash kernel is slower on 16-bit input than on fp32, 49 against 27 ms at 16 x 8 x 256 x 32 (LOG.md).
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.float(), k_BKTD.float(), v_BKTD.float()
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
    return out_BHTD.transpose(1, 2).to(out_dtype), None


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


_BACKENDS = {"sdpa": attend_sdpa, "varlen": attend_varlen}
for _name, _function in _BACKENDS.items():
    AttentionInterface.register(PREFIX + _name, _function)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switches a model to another registered attention for the length of the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
