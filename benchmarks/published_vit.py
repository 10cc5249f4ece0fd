"""A vision transformer fine-tuned on one GPU, from another author's hand than the planner's models: a check.

Written anew after github.com/rasbt/pytorch-memory-optim at 14 July 2023 (01_pytorch-vit.py, 03_bfloat16.py and
04_lower-batchsize.py; results in logs.md) and torchvision's ViT-L/16: 224 x 224 pixels in patches of 16, Adam with its
default (foreach) update. Gradients live through the next forward pass, because the script clears them after it. The
nightly of June 2023 had FlashAttention 1, which always wrote its output in one order, so that `nn.MultiheadAttention`
had to copy it; FlashAttention 2 takes the order of the queries. The bf16 rows come out lower for that.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.planner.recorder import Recorder
from onecard.planner.trace import Program

_WIDTH, _HEADS, _LAYERS, _PIXELS, _PATCH, _CLASSES = 1024, 16, 24, 224, 16, 10


@dataclass(frozen=True)
class Variant:
    """One row: rows per batch, and whether Fabric's bf16-true is used."""

    batch: int
    is_bf16: bool


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(_WIDTH, eps=1e-6) for _ in range(2))
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        x = self.norm1(given)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = x + given
        y = self.norm2(x)
        y = self.mlp(y)
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        num_patches = (_PIXELS // _PATCH) ** 2
        self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
        self.class_token = nn.Parameter(torch.empty(1, 1, _WIDTH))
        self.positions = nn.Parameter(torch.empty(1, num_patches + 1, _WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(_LAYERS)])
        self.norm = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.head = nn.Linear(_WIDTH, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        x = x.reshape(images.shape[0], _WIDTH, -1)
        x = x.permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(images.shape[0], -1, -1), x], dim=1)
        x = x + self.positions
        x = self.norm(self.blocks(x))
        x = x[:, 0]
        return self.head(x)


def make_program(variant: Variant) -> Program:
    """Three steps as one program."""
    torch.set_default_dtype(torch.bfloat16 if variant.is_bf16 else torch.float32)
    try:
        model = Model()
    finally:
        torch.set_default_dtype(torch.float32)

    def run(recorder: Recorder) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, foreach=True)
        for _ in range(3):
            images = torch.zeros(variant.batch, 3, _PIXELS, _PIXELS)
            targets = torch.zeros(variant.batch, dtype=torch.int64)
            recorder.phase = "forward"
            logits = model(images.to(model.head.weight.dtype)).float()
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Program({"weights": [*model.parameters()]}, None, run)


# Published GB beside each.
ROWS = {
    "ViT-L/16 fp32": (Variant(64, is_bf16=False), 26.79),
    "ViT-L/16 bf16": (Variant(64, is_bf16=True), 13.82),
    "ViT-L/16 bf16, 16 rows": (Variant(16, is_bf16=True), 5.69),
}
