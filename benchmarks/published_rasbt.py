"""The scripts of "LLMs from scratch", chapter 5, bonus 10 (training speed), as programs that can be recorded.

Written anew after github.com/rasbt/LLMs-from-scratch at 28c65cdfbc, ch05/10_llm-training-speed (00_orig.py is the first
row, 01_opt_single_gpu.py the last; the README lists the changes between them). What decides memory is kept as it is
there: which operator takes which tensor, what a function still holds while it runs, and that the gradients of a step
live until the next one begins, through the evaluation.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.planner.recorder import Recorder
from onecard.planner.trace import Program

_WIDTH, _HEADS, _LAYERS, _LENGTH, _DROPOUT = 768, 12, 12, 1024, 0.1
# "Every effort moves you" is 4 tokens; 50 are added one by one, so the longest pass has 53.
_LONGEST_SAMPLE = 53


@dataclass(frozen=True)
class Variant:
    """One row: what its script does differently."""

    batch: int = 8
    vocabulary: int = 50257
    keeps_mask: bool = False
    is_fused: bool = False
    is_bf16: bool = False
    has_torch_layers: bool = False
    has_sdpa: bool = False


class WrittenNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        normed = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.scale * normed + self.shift


class WrittenGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class WrittenAttention(nn.Module):
    def __init__(self, keeps_mask: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)
        self.mask: Tensor | None
        self.register_buffer("mask", _future(_LENGTH) if keeps_mask else None)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        keys, queries, values = (
            layer(x).view(batch, length, _HEADS, -1).transpose(1, 2) for layer in (self.key, self.query, self.value)
        )
        scores = queries @ keys.transpose(2, 3)
        is_future = (_future(length) if self.mask is None else self.mask).bool()[:length, :length]
        scores.masked_fill_(is_future, -torch.inf)
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        weights = self.dropout(weights)
        context = (weights @ values).transpose(1, 2)
        context = context.reshape(batch, length, _WIDTH)
        return self.out(context)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.out = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv
        context = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=_DROPOUT if self.training else 0.0, is_causal=True
        )
        context = context.transpose(1, 2).contiguous().view(batch, length, _WIDTH)
        return self.out(context)


class Block(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        norm = nn.LayerNorm if variant.has_torch_layers else WrittenNorm
        gelu = nn.GELU(approximate="tanh") if variant.has_torch_layers else WrittenGELU()
        self.attention = TorchAttention() if variant.has_sdpa else WrittenAttention(variant.keeps_mask)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), gelu, nn.Linear(4 * _WIDTH, _WIDTH))
        self.norm1, self.norm2 = norm(_WIDTH), norm(_WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm1(x)
        x = self.attention(x)
        x = self.dropout(x)
        x = x + shortcut
        shortcut = x
        x = self.norm2(x)
        x = self.mlp(x)
        x = self.dropout(x)
        return x + shortcut


class Model(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.tokens = nn.Embedding(variant.vocabulary, _WIDTH)
        self.positions = nn.Embedding(_LENGTH, _WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks = nn.Sequential(*[Block(variant) for _ in range(_LAYERS)])
        self.norm = (nn.LayerNorm if variant.has_torch_layers else WrittenNorm)(_WIDTH)
        self.head = nn.Linear(_WIDTH, variant.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.tokens(ids)
        positions = self.positions(torch.arange(ids.shape[1]))
        x = tokens + positions
        x = self.dropout(x)
        x = self.blocks(x)
        x = self.norm(x)
        return self.head(x)


def make_program(variant: Variant) -> Program:
    """Three steps with the evaluation and the sample between them, as one program: gradients outlive their step."""
    model = Model(variant)

    def run(recorder: Recorder) -> None:
        if variant.is_bf16:
            # The script moves fp32 weights to the card and converts them there, one by one.
            _to_bf16(model)
        options = {"fused": True} if variant.is_fused else {"foreach": True}
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, **options)
        for _ in range(3):
            train_step(recorder, model, optimizer, variant)
            _evaluate(recorder, model, variant)

    return Program({"weights": [*model.parameters(), *model.buffers()]}, None, run)


def make_compiled_program(variant: Variant) -> Program:
    """The same with the model compiled before the first step; a sample of another length would compile it anew."""
    model = Model(variant)
    _to_bf16(model)
    compiled = torch.compile(model, dynamic=False)
    ids, _ = _batch(variant)
    logits = compiled(ids)
    torch.autograd.grad(logits, list(model.parameters()), torch.empty_like(logits))
    del logits
    model.eval()
    with torch.no_grad():
        compiled(ids)
    model.train()

    def run(recorder: Recorder) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)
        for _ in range(3):
            train_step(recorder, compiled, optimizer, variant)
            _evaluate(recorder, compiled, variant, has_sample=False)

    return Program({"weights": [*model.parameters(), *model.buffers()]}, None, run)


def _to_bf16(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(torch.bfloat16)


def train_step(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, variant: Variant) -> None:
    """One iteration of the script's loop."""
    optimizer.zero_grad()
    recorder.phase = "forward"
    loss = _loss(model, *_batch(variant))
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _evaluate(recorder: Recorder, model: nn.Module, variant: Variant, *, has_sample: bool = True) -> None:
    recorder.phase = "evaluation"
    model.eval()
    for _ in range(2):
        _loss(model, *_batch(variant))
    if has_sample:
        model(torch.zeros(1, _LONGEST_SAMPLE, dtype=torch.int64))
    model.train()


def _loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _batch(variant: Variant) -> tuple[Tensor, Tensor]:
    ids, targets = (torch.zeros(variant.batch, _LENGTH, dtype=torch.int64) for _ in range(2))
    return ids, targets


def _future(length: int) -> Tensor:
    return torch.triu(torch.ones(length, length), diagonal=1)


_STEP_7 = Variant(is_fused=True, is_bf16=True, has_torch_layers=True, has_sdpa=True)
EAGER = {
    "P001": Variant(keeps_mask=True),
    "P002": Variant(),
    "P003": Variant(),
    "P004": Variant(is_fused=True),
    "P005": Variant(is_fused=True, is_bf16=True),
    "P006": Variant(is_fused=True, is_bf16=True, has_torch_layers=True),
    "P007": _STEP_7,
}
# `torch.compile(model)` alone; loss, gradients' lives and optimizer are as above.
COMPILED = {
    "P008": _STEP_7,
    "P009": replace(_STEP_7, vocabulary=50304),
    "P010": replace(_STEP_7, vocabulary=50304, batch=32),
}
