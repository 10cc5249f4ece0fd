"""What share of its peak rates a card reaches, by kind of operator.

Matrix products in 16 bits: at sizes 8192 and 10240, as a share of the catalogue's rate, from the rows and issues of
zzc0721/torch-performance-test-data (read 2026-11-22): V100 0.71 to 0.78, A100 PCIe 0.63 to 0.69, A40 0.73 to 0.82, RTX
3060 1.00, RTX 4060 0.99 to 1.01, RTX 4090 0.96, RTX 5090 1.05 to 1.13. GeForce cards pass 1 because they boost above
the clock that their rate is quoted at. Its table has only the best of five sizes, which those sizes stay 8 % below
(median): A100 SXM 0.79 to 0.85, T4 0.65, RTX 2080 0.97, A6000 0.80, L40S 0.74, H100 and H200 0.80, B200 0.75. Shapes of
language models reach 0.73 of an H100 (SemiAnalysis, 2024-12-22) and 0.64 to 0.69 of a B200 (arXiv 2604.23466).
In fp32: 0.92 where an SM has 64 fp32 lanes (V100, A100), 0.51 to 0.70 where half of 128 lanes share their issue slot
with integers (since the RTX 3060), 0.78 H100. TF32: A100 0.62 to 0.69, H100 NVL 0.63, RTX 0.98 to 1.16, A40 0.80.

Flash attention, not causal, width 64, 1024 to 2048 tokens, by its own benchmark: RTX A5000 0.73 forward and 0.56 to
0.63 backward of 111 TFLOP/s (gpu-mode/ring-attention#10), B200 0.16 and 0.13 (flash-attention#1589), 311 and 270
TFLOP/s on what can only be an H100 (flash-attention#2688), A100 0.6 and 0.45 (arXiv 2307.08691, as remembered). The
memory-efficient kernel beside it: 0.6 to 0.8 of it forward, 0.45 to 0.52 backward (flash-attention#416).

Memory: a copy reaches 0.906 of an H100 NVL (published with its script, 2026). What other kinds of operators reach below
that is judgement, not measurement: they are what `calibrate` is for.
"""

from dataclasses import dataclass, replace
from typing import Any

from onecard.hardware import Card

# What a long copy reaches of the bandwidth on the data sheet. A row measured here holds what was reached.
_COPY_SHARE = 0.9
# Slot-powered cards cannot hold their clock: the T4 (70 W) reaches 0.65 in fp16 and 0.53 in fp32, where other Turing
# cards reach 0.97 and 0.92. Of the L4 (72 W) no measurement was found; it is taken to be like the T4.
_SLOT_POWER_W = 75.0
_SLOT_SHARE = 0.65
# The launch that the default `dispatch_s` belongs to.
_LAUNCH_S = 4.2e-6
# A GeForce card sums in fp32 at half rate: 2 times its fp32 rate since the RTX 3060, where others have 4.
_GEFORCE_RATIO = 3.0
_TURING_GEFORCE_RATIO = 6.0


@dataclass(frozen=True)
class Efficiencies:
    """Shares of peak arithmetic (first seven) and of peak bandwidth (the next six), and times in seconds.

    `misaligned` multiplies matrix products whose rows are not multiples of 16 bytes. `kernel_s` is the least time of a
    kernel on the card, `dispatch_s` what an operator costs Python in training, `fused_dispatch_s` in compiled code.
    `low` and `high` bound the true time as factors of the predicted one.
    """

    gemm_16bit: float
    gemm_tf32: float
    gemm_fp32: float
    flash_forward: float = 0.6
    flash_backward: float = 0.45
    efficient_forward: float = 0.4
    efficient_backward: float = 0.22
    pointwise: float = 0.85
    reduction: float = 0.6
    optimizer: float = 0.8
    embedding: float = 0.5
    copy: float = 0.8
    fused: float = 0.8
    # Judgement for cards with wide tensor cores: an odd vocabulary costs an A100 8.8 ms where the aligned products take
    # about 8, and that is compiled, which pads (rasbt/LLMs-from-scratch, ch05/10). GeForce cards are below.
    misaligned: float = 0.47
    # 1.3 us between kernels of a recorded graph (H100 NVL), and the time to fill and drain a card.
    kernel_s: float = 2.5e-6
    # One operation in a loop takes 4.2 us (H100 NVL). In training a layer adds views, module calls and autograd: tiny
    # models of transformers take 18 to 24 us per recorded operator on a busy 2-core server, tiny kernels included.
    dispatch_s: float = 14e-6
    dispatch_range: tuple[float, float] = (0.5, 1.7)
    fused_dispatch_s: float = 4e-6
    uses_tf32: bool = False
    # All 54 rows of benchmarks/planner_time.py took 0.86 to 1.58 times the prediction; no GeForce card is among them.
    low: float = 0.8
    high: float = 1.6


def default_efficiencies(card: Card) -> Efficiencies:
    """What cards of this generation and market reach before anything was measured on this one."""
    found = _of_generation(card)
    if card.tdp_w is not None and card.tdp_w <= _SLOT_POWER_W and card.compute_capability >= (7, 5):
        found = _scaled(found, ("gemm_16bit", "gemm_tf32", "gemm_fp32", "flash_forward", "flash_backward"), _SLOT_SHARE)
    if card.is_local:
        # Its rates are what large operations reached, so only what smaller ones lose is left.
        found = replace(found, gemm_16bit=1.0, gemm_tf32=1.0, gemm_fp32=1.0)
        found = _scaled(found, ("pointwise", "reduction", "optimizer", "embedding", "copy", "fused"), 1 / _COPY_SHARE)
    if card.launch_s is not None:
        dispatch_s = found.dispatch_s / _LAUNCH_S * card.launch_s
        found = replace(found, dispatch_s=dispatch_s, dispatch_range=(0.7, 1.4))
    return found


def is_geforce(card: Card) -> bool:
    """Whether the tensor cores of a card sum in fp32 at half rate, as those of consumer cards do."""
    if card.flops_16bit is None:
        return True
    limit = _TURING_GEFORCE_RATIO if card.compute_capability == (7, 5) else _GEFORCE_RATIO
    return card.flops_16bit / card.fp32_flops < limit


def _of_generation(card: Card) -> Efficiencies:
    capability = card.compute_capability
    if capability < (7, 5):
        return Efficiencies(0.74, 0.92, 0.92)
    if capability < (8, 0):
        return Efficiencies(0.9, 0.92, 0.92)
    if capability == (8, 0):
        return Efficiencies(0.75, 0.65, 0.92)
    if capability[0] == 9:
        return Efficiencies(0.73, 0.65, 0.75, flash_forward=0.31, flash_backward=0.27)
    if capability[0] in (10, 11):
        return Efficiencies(0.67, 0.6, 0.75, flash_forward=0.16, flash_backward=0.13)
    if is_geforce(card):
        # RTX 4090: 156 TFLOP/s at size 2040, 107 to 116 at 2055 and 2057 (pytorch#181718).
        found = Efficiencies(1.06 if capability[0] == 12 else 0.98, 1.0, 0.63, misaligned=0.72)
    else:
        found = Efficiencies(0.75 if capability == (8, 6) else 0.68, 0.74, 0.58)
    return replace(found, flash_forward=0.73, flash_backward=0.58, efficient_forward=0.5, efficient_backward=0.28)


def _scaled(efficiencies: Efficiencies, names: tuple[str, ...], factor: float) -> Efficiencies:
    shares: dict[str, Any] = {name: min(1.0, factor * getattr(efficiencies, name)) for name in names}
    return replace(efficiencies, **shares)
