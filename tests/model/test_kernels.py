"""Kernels compute what transformers writes out."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import GELUTanh, NewGELUActivation

from onecard.model.build import build_model
from onecard.model.kernels import RMSNorm, TanhGelu, fuse_kernels

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


FAMILIES = ["llama", "qwen3", "qwen2", "mistral", "olmo2", "granite", "smollm3", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_by_its_kernel_is_the_one_written_out(family: str) -> None:
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = list(model.state_dict())
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    fuse_kernels(model)
    assert any(isinstance(module, RMSNorm) for module in model.modules())
    assert not any(type(module).__name__ == f"{family.capitalize()}RMSNorm" for module in model.modules())
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_norms_of_another_formula_are_left_alone() -> None:
    config = AutoConfig.for_model(
        "gemma", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = AutoModelForCausalLM.from_config(config)
    fuse_kernels(model)
    assert not any(isinstance(module, RMSNorm) for module in model.modules())
