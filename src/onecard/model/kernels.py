"""Parts of models by one kernel each: GELU in its tanh form, RMSNorm."""

import inspect
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation

from onecard.model.target import device_kind

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
        if torch.compiler.is_compiling() and device_kind(x.device) == "cpu":
            return x * torch.sigmoid(x * (_LINEAR + _CUBIC * x * x))
        return F.gelu(x, approximate="tanh")


class RMSNorm(nn.Module):
    """Llama's norm by PyTorch's kernel, with the weight of one that is written out."""

    def __init__(self, written_out: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, written_out.weight)
        self.variance_epsilon = cast(float, written_out.variance_epsilon)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.rms_norm(hidden_BTD, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_kernels(model: nn.Module) -> None:
    """Replaces what transformers writes out, operation by operation, by the kernel of the same formula.

    GPT-2's GELU is eight operations, an RMSNorm six with fp32 copies of its input: without them a layer of Qwen3 keeps
    a third less for its backward pass. Names, parameters and config stay as they are.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | GELUTanh):
                setattr(module, name, TanhGelu())
            elif _is_plain_rms_norm(child):
                setattr(module, name, RMSNorm(child))


def _is_plain_rms_norm(module: nn.Module) -> bool:
    """Tells Llama's formula, which most families share and store so, from those with a gate or 1 + weight."""
    return (
        type(module).__name__.endswith("RMSNorm")
        and {*vars(module), *module._parameters} >= {"weight", "variance_epsilon"}
        and len(module._parameters) == 1
        and len(inspect.signature(module.forward).parameters) == 1
    )
