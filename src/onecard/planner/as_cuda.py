"""Tensors on the CPU that take the kernels CUDA would take.

A trace runs on fake CPU tensors. Where PyTorch's CPU path allocates or computes otherwise than its CUDA path, the calls
are rerouted here: attention, dropout and normalisation. Each of these operators ran forward and backward on fake CPU
tensors in PyTorch 2.13.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.planner.recorder import Scratch

_aten = torch.ops.aten


@contextmanager
def as_cuda(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Reroutes functions to what they do on a card of this compute capability.

    Replaces them in `torch.nn.functional`, where models look them up: a function mode would be off inside the backward
    pass, in which checkpointed layers run again.
    """
    rerouted = {
        "scaled_dot_product_attention": _Attention(compute_capability).attend,
        "dropout": _dropout,
        "rms_norm": _rms_norm,
    }
    before = {name: getattr(F, name) for name in rerouted}
    for name, function in rerouted.items():
        setattr(F, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


class _Attention:
    """`F.scaled_dot_product_attention` with PyTorch's choice among its CUDA kernels."""

    def __init__(self, compute_capability: tuple[int, int]) -> None:
        self._capability = compute_capability

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Takes flash without a mask, memory-efficient with one, the plain kernel otherwise."""
        dropout, scale = dropout_p, options.get("scale")
        width = query.shape[-1]
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if attn_mask is None and is_half and self._capability >= (8, 0) and width <= 256:
            padded = [F.pad(x, (0, -width % 8)) if width % 8 else x for x in (query, key, value)]
            scale = scale if scale is not None else 1 / math.sqrt(width)
            out = _aten._scaled_dot_product_flash_attention(*padded, dropout, is_causal, scale=scale)[0]
            return out[..., :width] if width % 8 else out
        if options.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            return _aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout, is_causal, scale=scale
            )[0]
        bias = _as_bias(attn_mask, query, key)
        return _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout, is_causal, scale=scale
        )[0]


def _as_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if torch.compiler.is_compiling():  # it writes the same out itself
        return torch.dropout(input, p, training)
    if p == 0.0 or not training:
        return input
    return _aten.native_dropout(input, p, True)[0]


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if torch.compiler.is_compiling():  # it takes the formula apart, on a card too
        return torch.rms_norm(input, normalized_shape, weight, eps)
    weight = torch.ones(normalized_shape, dtype=input.dtype) if weight is None else weight
    return _rms_norm_forward(input, weight)[0]


# On CUDA an RMSNorm is one kernel that keeps its input and one fp32 number per row. The CPU's is written out and keeps
# fp32 copies, on fake tensors too, so these operators stand for it; they have shapes and no values.
@torch.library.custom_op("onecard::rms_norm", mutates_args=())
def _rms_norm_forward(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("onecard::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, input: Tensor, row: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm_forward.register_fake
def _(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(gradient: Tensor, input: Tensor, row: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    input, weight, row = ctx.saved_tensors
    return _rms_norm_backward(gradient, input, row, weight)


_rms_norm_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def _flash_backward(args: tuple[Any, ...], _: Any) -> int:
    """FlashAttention-2 gathers the gradient of the queries in fp32, rows rounded to 128 and width to 32, and one fp32
    number per row; shared heads are expanded first (Tri Dao's kernel as PyTorch builds it; sizes not measured)."""
    query, key = args[1], args[2]
    batch, heads, tokens, width = query.shape
    rows = batch * heads * (-(-tokens // 128) * 128)
    expanded = 0 if key.shape[1] == heads else 2 * query.numel() * query.element_size()
    return rows * (-(-width // 32) * 32) * 4 + rows * 4 + expanded


def _efficient_backward(args: tuple[Any, ...], _: Any) -> int:
    """The memory-efficient kernel gathers 16-bit gradients of the queries in fp32, and one fp32 number per row."""
    query = args[1]
    rows = query.numel() // query.shape[-1]
    return (query.numel() * 4 if query.element_size() < 4 else 0) + rows * 4


def _embedding_backward(args: tuple[Any, ...], out: Tensor) -> int:
    """Sorts the indices and sums rows of equal ones in fp32 (more than 3,072 indices)."""
    num_indices, width = args[1].numel(), out.shape[-1]
    if num_indices <= 3072:
        return 0
    segments = min(num_indices, out.shape[0]) + num_indices // 10
    return 4 * num_indices * 8 + segments * width * 4


def _log_sum_exp(args: tuple[Any, ...], _: Any) -> int:
    return args[0].numel() * args[0].element_size()


SCRATCH: dict[str, Scratch] = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "embedding_dense_backward": _embedding_backward,
    "logsumexp": _log_sum_exp,
}
