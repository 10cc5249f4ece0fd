"""Weights in 4 bits are bitsandbytes' own, and what is computed with them is what their values say."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from onecard.errors import InputError
from onecard.model import nf4
from onecard.model.nf4 import NF4Linear
from onecard.planner.recorder import Recorder

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def make_layer(kind: str = "linear", width: int = 64, dtype: torch.dtype = torch.float32) -> nn.Linear | Conv1D:
    torch.manual_seed(0)
    layer = nn.Linear(width, 48) if kind == "linear" else Conv1D(48, width)
    return layer if dtype == torch.float32 else layer.to(dtype)  # fake tensors cannot be converted in place


@pytest.mark.parametrize("width", [64, 65], ids=["even", "odd"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_values_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype, double_quant: bool, width: int) -> None:
    from bitsandbytes import functional

    layer = make_layer(kind, width, dtype)
    quantized = functional.quantize_4bit(
        layer.weight.detach(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    expected = functional.dequantize_4bit(*quantized)
    found = NF4Linear.from_linear(layer, double_quant=double_quant).dequantized(dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_products_and_gradients_are_those_of_the_dequantized_weight(kind: str, dtype: torch.dtype) -> None:
    layer = NF4Linear.from_linear(make_layer(kind, dtype=dtype))
    assert layer.bias is not None
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    plain_x, plain_bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    weight = layer.dequantized(dtype)

    out = layer(x)
    out.square().sum().backward()
    expected = F.linear(plain_x, weight.T if kind == "conv1d" else weight, plain_bias)
    expected.square().sum().backward()

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(x.grad, plain_x.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, plain_bias.grad, rtol=5e-2, atol=5e-2)


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    layer = NF4Linear.from_linear(make_layer(width=1024))
    x = torch.randn(2, 1024, requires_grad=True)
    with Recorder() as recorder:
        out = layer(x)
        alive = {number for number in recorder.record.order if number >= 0}
        alive -= {~number for number in recorder.record.order if number < 0}
    assert sum(recorder.record.sizes[number] for number in alive) == out.untyped_storage().nbytes()
    assert sum(recorder.record.sizes) > 4 * 1024 * 48, "the weight was whole for a moment"
    at_rest = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    codebook_bytes = 1024
    assert at_rest - codebook_bytes < 0.53 * 1024 * 48


def test_a_plain_layer_comes_back_with_the_values_computed_with() -> None:
    for kind in ("linear", "conv1d"):
        layer = NF4Linear.from_linear(make_layer(kind))
        plain = layer.to_linear()
        assert type(plain) is (nn.Linear if kind == "linear" else Conv1D)
        x = torch.randn(3, 64)
        torch.testing.assert_close(plain(x), layer(x), rtol=1e-6, atol=1e-6)
        # The values are a fixed point: rounding them again changes nothing beyond the scales.
        again = NF4Linear.from_linear(plain, double_quant=False).dequantized(torch.float32)
        torch.testing.assert_close(again, plain.weight.detach(), rtol=0, atol=1e-6)


# Dynamo instantiates torch.autograd.Function, which warns against that (PyTorch 2.13).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_compiles_without_a_graph_break(kind: str) -> None:
    layer = NF4Linear.from_linear(make_layer(kind))
    x = torch.randn(2, 5, 64, requires_grad=True)
    compiled_x = x.detach().clone().requires_grad_()
    expected, found = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(compiled_x)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled_x.grad, x.grad)


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_without_storage_it_has_the_same_buffers(double_quant: bool) -> None:
    real = NF4Linear.from_linear(make_layer(width=72), double_quant=double_quant)
    nf4.dynamic_codebook.cache_clear()
    with FakeTensorMode():
        fake = NF4Linear.from_linear(make_layer(width=72), double_quant=double_quant)
        x = torch.randn(2, 72, requires_grad=True)
        fake(x).sum().backward()
        assert x.grad is not None
    shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in real.named_buffers()}
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in fake.named_buffers()} == shapes


def test_without_bitsandbytes_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install 'onecard\[quant\]', or use method lora"):
        NF4Linear.from_linear(make_layer())
