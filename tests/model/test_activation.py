"""GELU's tanh form, eager and compiled."""

import torch
import torch.nn.functional as F
from transformers.activations import GELUTanh, NewGELUActivation

from onecard.model.activation import TanhGelu
from onecard.model.build import build_model

TINY_GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 5}


def _value_and_slope(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    value.sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


def test_compiled_gelu_equals_the_kernel_far_out_too() -> None:
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-1e4, -60.0, 60.0, 1e4])])
    compiled = torch.compile(TanhGelu(), backend="aot_eager", fullgraph=True)
    reference = _value_and_slope(lambda x: F.gelu(x, approximate="tanh"), x.double())
    for own, expected in zip(_value_and_slope(compiled, x), reference, strict=True):
        assert torch.allclose(own.double(), expected, rtol=1e-5, atol=3e-6)


def test_eager_gelu_is_the_kernel_bit_for_bit() -> None:
    x = torch.linspace(-8, 8, 4001)
    assert torch.equal(TanhGelu()(x), F.gelu(x, approximate="tanh"))


def test_no_other_tanh_gelu_is_left_in_a_model() -> None:
    model = build_model(TINY_GPT2, dropout=0.0, init="transformers", seed=1)
    kinds = [type(module) for module in model.modules()]
    assert TanhGelu in kinds
    assert NewGELUActivation not in kinds
    assert GELUTanh not in kinds
