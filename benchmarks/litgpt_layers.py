"""Layers of LitGPT's fine-tuning: LoRA, LLaMA-Adapter 2, weights in NF4, RMSNorm in fp32. See published_litgpt.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NF4_BLOCK, _NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class Shape:
    """A model as litgpt/config.py has it; the defaults are StableLM Alpha 3B and what is common to the Llamas."""

    layers: int = 16
    width: int = 4096
    heads: int = 32
    groups: int = 32
    vocabulary: int = 50688
    rotary_share: float = 0.25
    is_parallel: bool = True
    shares_norm: bool = False
    has_bias: bool = True
    has_head_bias: bool = False
    # 0: two layers with a GELU and four times the width; otherwise three with a SiLU.
    gated_width: int = 0

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Tuning:
    """What is trained and how. `adapts_all` puts LoRA on every linear layer, the head too; rank 0 trains everything.

    `lengths` are those of the micro-batches of each update.
    """

    lengths: tuple[tuple[int, ...], ...]
    batch: int = 1
    rank: int = 8
    adapts_all: bool = False
    quantization: str = ""
    is_of_2023: bool = True
    # LLaMA-Adapter 1 or 2 in place of LoRA; 0 for none.
    adapter: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(max, self.lengths))


class _Dequantized(torch.autograd.Function):
    """bitsandbytes' `matmul_4bit` up to 0.42: unpacks the weight in both passes and keeps its input, though not as a
    saved tensor: it stays until the graph goes, not only until its gradient is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.input, ctx.unpack = x, unpack
        return F.linear(x, unpack(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.matmul(gradient, ctx.unpack()), None, None


class Linear4bit(nn.Module):
    """A frozen weight in NF4: half a byte per value and an fp32 scale per 64; `nested` packs the scales, too."""

    def __init__(self, inputs: int, outputs: int, bias: bool, nested: bool) -> None:
        super().__init__()
        size = inputs * outputs
        scales = size // _NF4_BLOCK
        self.shape, self.num_scales, self.nested = (outputs, inputs), scales, nested
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.packed = nn.Buffer(torch.empty(size // 2, dtype=torch.uint8))
        self.scales = nn.Buffer(torch.empty(scales, dtype=torch.uint8 if nested else torch.float32))
        self.code = nn.Buffer(torch.empty(16, dtype=torch.float32))
        if nested:
            self.scales_of_scales = nn.Buffer(torch.empty(-(-scales // _NESTED_BLOCK), dtype=torch.float32))
            self.nested_code = nn.Buffer(torch.empty(256, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantized.apply(x, self._unpack, self.bias)

    def _unpack(self) -> Tensor:
        scales = torch.empty(self.num_scales, dtype=torch.float32) if self.nested else self.scales
        # Fabric packs weights that it has turned into fp16 first, so they come back as that.
        weight = torch.empty(self.shape, dtype=torch.float16).to(torch.bfloat16)
        del scales
        return weight


def _linear(inputs: int, outputs: int, bias: bool, tuning: Tuning) -> nn.Module:
    if tuning.quantization:
        return Linear4bit(inputs, outputs, bias, nested=tuning.quantization == "nf4-dq")
    return nn.Linear(inputs, outputs, bias=bias)


class LoRA(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tuning: Tuning) -> None:
        super().__init__()
        self.linear = _linear(inputs, outputs, bias, tuning)
        self.is_adapted = tuning.adapts_all
        if self.is_adapted:
            self.lora_a = nn.Parameter(torch.empty(tuning.rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, tuning.rank))

    def forward(self, x: Tensor) -> Tensor:
        pretrained = self.linear(x)
        if not self.is_adapted:
            return pretrained
        update = (F.dropout(x, 0.05) @ self.lora_a.transpose(0, 1) @ self.lora_b.transpose(0, 1)) * 2.0
        return pretrained + update


class Scaled(nn.Module):
    """A linear layer of the second adapter: its outputs are moved and scaled, and that is trained."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tuning: Tuning) -> None:
        super().__init__()
        self.linear = _linear(inputs, outputs, bias, tuning)
        self.adapter_bias, self.adapter_scale = (nn.Parameter(torch.empty(outputs)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


def make_layer(inputs: int, outputs: int, bias: bool, tuning: Tuning) -> nn.Module:
    return (Scaled if tuning.adapter == 2 else LoRA)(inputs, outputs, bias, tuning)


class QKVLoRA(nn.Module):
    """Queries, keys and values in one; the updates of those that are adapted come from one grouped convolution."""

    def __init__(self, shape: Shape, tuning: Tuning) -> None:
        super().__init__()
        key_width = shape.groups * shape.head_width
        self.outputs = shape.width + 2 * key_width
        self.widths = [shape.width, *[key_width] * (2 if tuning.adapts_all else 1)]
        self.is_grouped = shape.heads != shape.groups
        self.is_of_2023 = tuning.is_of_2023
        self.linear = _linear(shape.width, self.outputs, shape.has_bias, tuning)
        self.rank = tuning.rank
        if self.rank:
            self.lora_a = nn.Parameter(torch.empty(tuning.rank * len(self.widths), shape.width))
            self.lora_b = nn.Parameter(torch.empty(sum(self.widths), tuning.rank))

    def forward(self, x: Tensor) -> Tensor:
        pretrained = self.linear(x)
        if not self.rank:
            return pretrained
        after_a = F.linear(F.dropout(x, 0.05), self.lora_a)
        after_b = self._convolve(after_a.transpose(-2, -1), self.lora_b.unsqueeze(-1)).transpose(-2, -1)
        update = self._pad(after_b) * 2.0
        return pretrained + update

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.is_grouped:
            return F.conv1d(x, weight, groups=len(self.widths))
        pairs = zip(x.chunk(len(self.widths), dim=1), weight.split(self.widths), strict=True)
        return torch.cat([F.conv1d(part, part_weight) for part, part_weight in pairs], dim=1)

    def _pad(self, x: Tensor) -> Tensor:
        if len(self.widths) == 3:
            return x
        index = torch.zeros(sum(self.widths), dtype=torch.int64)
        if not self.is_of_2023:
            return x.new_zeros(*x.shape[:-1], self.outputs).index_copy_(-1, index, x)
        x = x.transpose(0, 1)
        result = x.new_zeros(*x.shape[:-1], self.outputs)
        result = result.view(-1, self.outputs)
        result = result.index_copy(1, index, x.reshape(-1, sum(self.widths)))
        return result.view(*x.shape[:-1], self.outputs).transpose(0, 1)


class RMSNorm(nn.Module):
    """In fp32, as it is since 6178c7cc (24 October 2023): younger than the commit the tables name and older than the
    tables. Before, the norm was in bf16 and kept half as much, and the Llama rows would come out 3 to 5 % lower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        mean = torch.mean(x * x, dim=-1, keepdim=True)
        normed = x * torch.rsqrt(mean + 1e-5)
        return (normed * self.weight.float()).to(dtype)
