"""GELU in its tanh form (GPT-2, Gemma)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation

# gelu(x) = x sigmoid(LINEAR x + CUBIC x^3), because 0.5 (1 + tanh u) = sigmoid(2u)
# with u = sqrt(2 / pi) (x + 0.044715 x^3).
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


class TanhGelu(nn.Module):
    """GELU in its tanh form by PyTorch's kernel; compiled for a CPU, by a sigmoid of the same value.

    The compiler writes tanh on a CPU as a slow call, sigmoid as one exponential: a tenth of a compiled GPT-2 step
    (LOG.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return x * torch.sigmoid(x * (_LINEAR + _CUBIC * x * x))
        return F.gelu(x, approximate="tanh")


def fuse_activations(model: nn.Module) -> None:
    """Replaces GELU's tanh form, which GPT-2 writes as eight operations, by one kernel; the config stays."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | GELUTanh):
                setattr(module, name, TanhGelu())
