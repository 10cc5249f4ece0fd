"""Seconds of one kernel: the larger of its arithmetic and its memory traffic at the rates that a card reaches.

    time = max(least time of a kernel, operations / (peak x share), bytes / (bandwidth x share))

A matrix product is cut into tiles that SMs take in waves; the last wave is rarely full (NVIDIA, Matrix Multiplication
Background User's Guide, DU-09799-001, chapter 3).

    tiles:  ■■■■■■■■   wave 1, every SM busy
            ■■■·····   wave 2 takes as long
"""

import math
from dataclasses import dataclass
from typing import Literal

from onecard.hardware import Card
from onecard.planner.efficiency import Efficiencies
from onecard.planner.recorder import Work

Limit = Literal["arithmetic", "bandwidth", "launches"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Rows and columns of the tiles that cuBLAS chooses from, and what smaller ones reach of the largest: they load more
# per operation. The guide ranks them so; the sizes of the steps are judgement.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
# Long products with few tiles are cut along K as well; each part must be worth it.
_SPLITS = (1, 2, 4, 8)
_LEAST_SPLIT_DEPTH = 512
_SPLIT_SHARE = 0.95
# 16-byte loads need rows that are multiples of 16 bytes.
_ALIGNMENT_BYTES = 16
_ATTENTION_BLOCK = 128
_REDUCTIONS = ("norm", "softmax", "sum", "amax", "amin", "mean", "nll", "var", "argmax", "topk", "sort")
_LOOKUPS = ("embedding", "gather", "scatter", "index")
_COPIES = ("_to_copy", "copy_", "clone", "cat", "stack", "constant_pad_nd", "repeat", "contiguous", "split")


@dataclass(frozen=True)
class KernelTime:
    """Seconds of all calls together, and what they wait for."""

    seconds: float
    limit: Limit


def classify(work: Work) -> str:
    """The field of `Efficiencies` that tells how fast an operator runs, but for the precision of matrix products."""
    name = work.name
    if name.removesuffix("_") in _PRODUCTS:
        return "gemm"
    if "attention" in name or "varlen_attn" in name:
        kernel = "efficient" if "efficient" in name else "flash"
        return f"{kernel}_{'backward' if 'backward' in name else 'forward'}"
    if name.startswith(("_foreach", "_fused")):
        return "optimizer"
    if "fused" in name:
        return "fused"
    if any(part in name for part in _LOOKUPS):
        return "embedding"
    if any(part in name for part in _REDUCTIONS):
        return "reduction"
    return "copy" if name in _COPIES else "pointwise"


def is_fused(work: Work) -> bool:
    """Whether an operator is a kernel of compiled code."""
    return classify(work) == "fused"


def time_kernel(work: Work, card: Card, efficiencies: Efficiencies, sequence_length: int) -> KernelTime:
    """Time of a recorded operator on a card; `sequence_length` says how far causal attention skips."""
    kind = classify(work)
    floor = work.num_calls * efficiencies.kernel_s
    bandwidth = card.bandwidth_bytes_per_s
    if kind == "gemm":
        rate = _peak(work.dtype, card, efficiencies) * _share_of_product(work, card, efficiencies)
        arithmetic = work.flops / rate
        memory = work.num_bytes / (bandwidth * efficiencies.pointwise)
    elif kind.startswith(("flash", "efficient")):
        peak = _peak(work.dtype, card, efficiencies)
        arithmetic = _attention_flops(work, kind, sequence_length) / (peak * getattr(efficiencies, kind))
        memory = work.num_bytes / (bandwidth * efficiencies.pointwise)
    else:
        arithmetic = 0.0
        memory = work.num_bytes / (bandwidth * getattr(efficiencies, kind))
    seconds = max(floor, arithmetic, memory)
    limit: Limit = "launches" if seconds == floor else "arithmetic" if seconds == arithmetic else "bandwidth"
    return KernelTime(seconds, limit)


def class_of(work: Work, efficiencies: Efficiencies) -> str:
    """The field of `Efficiencies` for an operator."""
    kind = classify(work)
    if kind != "gemm":
        return kind
    if work.dtype in ("bfloat16", "float16"):
        return "gemm_16bit"
    return "gemm_tf32" if efficiencies.uses_tf32 else "gemm_fp32"


def fill_share(rows: int, columns: int, depth: int, num_products: int, num_sms: int) -> float:
    """Share of a card's rate that is left when a product is cut into tiles and waves, for the best cut."""
    best = 0.0
    for tile_rows, tile_columns, tile_share in _TILES:
        down, across = math.ceil(rows / tile_rows), math.ceil(columns / tile_columns)
        used = rows * columns / (down * tile_rows * across * tile_columns)
        for split in _SPLITS:
            if split > 1 and depth < split * _LEAST_SPLIT_DEPTH:
                break
            parts = num_products * down * across * split
            waves = parts / num_sms
            share = tile_share * used * waves / math.ceil(waves) * (_SPLIT_SHARE if split > 1 else 1.0)
            best = max(best, share)
    return best


def _share_of_product(work: Work, card: Card, efficiencies: Efficiencies) -> float:
    num_products, rows, columns, depth = _product_shape(work)
    share: float = getattr(efficiencies, class_of(work, efficiencies))
    share *= fill_share(rows, columns, depth, num_products, card.num_sms)
    uses_tensor_cores = work.dtype != "float32" or efficiencies.uses_tf32
    multiple = _ALIGNMENT_BYTES // (2 if work.dtype != "float32" else 4)
    # Of each operand one dimension lies along memory; which one the record does not tell.
    if uses_tensor_cores and any(size % multiple for size in (columns, depth)):
        share *= efficiencies.misaligned
    return share


def _product_shape(work: Work) -> tuple[int, int, int, int]:
    shape = work.shape
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], shape[3]
    return 1, shape[0], shape[1], shape[2]


def _peak(dtype: str, card: Card, efficiencies: Efficiencies) -> float:
    if dtype in ("bfloat16", "float16"):
        return card.flops_16bit or card.fp16_flops or card.fp32_flops
    if efficiencies.uses_tf32 and card.tf32_flops:
        return card.tf32_flops
    return card.fp32_flops


def _attention_flops(work: Work, kind: str, length: int) -> float:
    """Operations that the kernel makes; training is causal, and flash skips blocks behind the diagonal.

    A mask hides what could be skipped, so the memory-efficient kernel computes all of it.
    """
    flops: float = work.flops
    if "varlen" in work.name and not flops:
        # Tokens of all rows x heads x width; PyTorch has no formula for it.
        flops = 4.0 * math.prod(work.shape) * length * work.num_calls * (2.5 if "backward" in work.name else 1.0)
    if kind.startswith("efficient"):
        return flops
    return flops * min(1.0, (1 + _ATTENTION_BLOCK / length) / 2)
