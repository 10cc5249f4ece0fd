"""The model of LitGPT around the layers of its fine-tuning. See published_litgpt.py."""

import torch
import torch.nn.functional as F
from litgpt_layers import QKVLoRA, RMSNorm, Shape, Tuning, make_layer
from torch import Tensor, nn

_PROMPT_LENGTH, _FIRST_PROMPTED = 10, 2


class Attention(nn.Module):
    def __init__(self, shape: Shape, tuning: Tuning, index: int) -> None:
        super().__init__()
        self.shape = shape
        is_scaled = tuning.adapter == 2
        self.qkv = (
            make_layer(shape.width, 3 * shape.width, shape.has_bias, tuning) if is_scaled else QKVLoRA(shape, tuning)
        )
        self.out = make_layer(shape.width, shape.width, shape.has_bias, tuning)
        self.is_prompted = tuning.adapter > 0 and index >= _FIRST_PROMPTED
        if self.is_prompted:
            self.adapter_prompt = nn.Parameter(torch.empty(_PROMPT_LENGTH, shape.width))
            self.adapter_gate = nn.Parameter(torch.empty(1, 1, shape.heads, 1))
            # The script's first validation, which is without gradients, caches these, and training goes on with them.
            size = (1, shape.heads, _PROMPT_LENGTH, shape.head_width)
            self.keys, self.values = (nn.Buffer(torch.empty(size)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = self.shape
        per_group, width = shape.heads // shape.groups, shape.head_width
        qkv = self.qkv(x)
        qkv = qkv.view(batch, length, shape.groups, per_group + 2, width).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((per_group, 1, 1), dim=2)
        if per_group > 1:
            k = k.expand(batch, shape.groups, per_group, length, width)
            v = v.expand(batch, shape.groups, per_group, length, width)
        q = q.reshape(batch, -1, length, width)
        k = k.reshape(batch, -1, length, width)
        v = v.reshape(batch, -1, length, width)
        rotated = cos.shape[-1]
        q_rotated = _rotate(q[..., :rotated], cos, sin)
        k_rotated = _rotate(k[..., :rotated], cos, sin)
        q = torch.cat((q_rotated, q[..., rotated:]), dim=-1)
        k = torch.cat((k_rotated, k[..., rotated:]), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if self.is_prompted:
            mask = torch.ones(length, _PROMPT_LENGTH, dtype=torch.bool)
            prompted = F.scaled_dot_product_attention(q, self.keys, self.values, mask).transpose(1, 2)
            y = y + self.adapter_gate * prompted
        y = y.reshape(batch, length, shape.width)
        return self.out(y)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = torch.cat((-second, first), dim=-1)
    return ((x * cos) + (rotated * sin)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, shape: Shape, tuning: Tuning) -> None:
        super().__init__()
        inner = shape.gated_width or 4 * shape.width
        self.up = make_layer(shape.width, inner, shape.has_bias, tuning)
        self.gate = make_layer(shape.width, inner, shape.has_bias, tuning) if shape.gated_width else None
        self.down = make_layer(inner, shape.width, shape.has_bias, tuning)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            x = self.up(x)
            x = F.gelu(x)
            return self.down(x)
        gate, up = self.gate(x), self.up(x)
        x = F.silu(gate) * up
        return self.down(x)


class Block(nn.Module):
    def __init__(self, shape: Shape, tuning: Tuning, index: int) -> None:
        super().__init__()
        self.shape = shape
        self.norm1 = _norm(shape)
        self.attention = Attention(shape, tuning, index)
        self.norm2 = None if shape.shares_norm else _norm(shape)
        self.mlp = MLP(shape, tuning)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm1(x)
        attended = self.attention(normed, cos, sin)
        if self.shape.is_parallel:
            normed = normed if self.norm2 is None else self.norm2(x)
            return self.mlp(normed) + attended + x
        x = attended + x
        return self.mlp(self.norm2(x)) + x


class Model(nn.Module):
    def __init__(self, shape: Shape, tuning: Tuning) -> None:
        super().__init__()
        self.head = make_layer(shape.width, shape.vocabulary, shape.has_head_bias, tuning)
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, tuning, index) for index in range(shape.layers))
        self.norm = _norm(shape)
        angles = (tuning.longest, int(shape.rotary_share * shape.head_width))
        self.cos, self.sin = (nn.Buffer(torch.empty(angles, dtype=torch.float32)) for _ in range(2))

    def forward(self, ids: Tensor, chunk: int = 0) -> Tensor | list[Tensor]:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        return [self.head(part) for part in x.split(chunk, dim=1)] if chunk else self.head(x)


def _norm(shape: Shape) -> nn.Module:
    return RMSNorm(shape.width) if shape.gated_width else nn.LayerNorm(shape.width)
