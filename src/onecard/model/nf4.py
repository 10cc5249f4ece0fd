"""Frozen linear layers at rest in 4 bits: NormalFloat of QLoRA (arXiv 2305.14314) on bitsandbytes' operators.

    weight [out, in] ──quantize──► qweight  uint8, two values each
                                   absmax   one fp32 number per 64 values      double quantization: uint8 and
                                                                               one fp32 number per 256 of those
    forward    x @ dequantize(qweight).T        nothing of the weight's size is kept
    backward   g @ dequantize(qweight)          dequantized again

bitsandbytes' own `Params4bit` refuses tensors without storage; this is a plain module of plain buffers, so trainer,
tracer and compiler share it.
"""

import importlib
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.errors import InputError

# Whoever imports it, PEFT too: on some CPUs it reports that it looked for a kernel for generation, which nothing here
# calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# bitsandbytes' defaults, which everyone's QLoRA uses.
_BLOCK, _ABSMAX_BLOCK = 64, 256


def load_operators(needed_by: str = "method qlora", otherwise: str = "method lora") -> None:
    """Registers bitsandbytes' operators with PyTorch.

    Raises:
        InputError: bitsandbytes is not installed or does not load.
    """
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"{needed_by} needs bitsandbytes, which cannot be loaded here ({error}): install it with "
            f"pip install 'onecard[quant]', or use {otherwise}"
        ) from error


@cache
def dynamic_codebook(*, is_signed: bool) -> list[float]:
    """The 256 values in [-1, 1], or [0, 1], of bitsandbytes' dynamic 8-bit type, ascending."""
    functional = importlib.import_module("bitsandbytes.functional")
    with unset_fake_temporarily():  # it is computed with tensors whose values count
        values: list[float] = functional.create_dynamic_map(signed=is_signed).tolist()
    return values


# Mamba's kernels read their output projection, and its code the one of time steps (`dt_proj`, Jamba's, too): neither an
# adapter nor 4 bits would be noticed. PEFT refuses the former in the same families.
_READING_WEIGHTS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def find_linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a model by name: without its head, and without those whose weight is read past them."""
    head = model.get_output_embeddings()
    read_past = ("dt_proj", "out_proj") if model.config.model_type in _READING_WEIGHTS else ("dt_proj",)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rsplit(".", 1)[-1] not in read_past
    }


class NF4Linear(nn.Module):
    """A linear layer whose frozen weight rests in NF4 and is dequantized to the type of its input.

    Stands for `nn.Linear` (weight [out, in]) and for GPT-2's `Conv1D` (weight [in, out]); blocks run over the weight
    as it is stored. About 0.52 bytes per value with double quantization, 0.56 without.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, is_transposed: bool, double_quant: bool) -> None:
        super().__init__()
        load_operators()
        self.shape = tuple(weight.shape)
        self.is_transposed = is_transposed
        self.in_features, self.out_features = self.shape if is_transposed else reversed(self.shape)
        self.double_quant = double_quant
        qweight, absmax = torch.ops.bitsandbytes.quantize_4bit(weight.detach().contiguous(), _BLOCK, "nf4", torch.uint8)
        offset = codebook = absmax_8bit = None
        if double_quant:
            offset = absmax.mean()
            codebook = torch.tensor(dynamic_codebook(is_signed=True), device=weight.device)
            absmax_8bit, absmax = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, codebook, _ABSMAX_BLOCK)
        self.register_buffer("qweight", qweight)
        self.register_buffer("absmax", absmax)
        self.register_buffer("absmax_8bit", absmax_8bit)
        self.register_buffer("absmax_codebook", codebook)
        self.register_buffer("absmax_offset", offset)
        self.bias = bias

    @classmethod
    def from_linear(
        cls, module: nn.Linear | Conv1D, *, double_quant: bool = True, device: torch.device | None = None
    ) -> "NF4Linear":
        """Quantizes one layer on `device`, where nothing but this one weight is ever whole."""
        # From fp32, so that a weight stored in 16 bits becomes the same whoever reads it.
        weight = module.weight.detach().to(device or module.weight.device, torch.float32)
        return cls(weight, module.bias, is_transposed=isinstance(module, Conv1D), double_quant=double_quant)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear | Conv1D:
        """A plain layer of the kind it was made from, with the values it computes with."""
        with torch.device("meta"):  # the weight is put in below
            plain = (
                Conv1D(self.out_features, self.in_features)
                if self.is_transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        plain.weight = nn.Parameter(self.dequantized(dtype))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype))
        return plain

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as it was stored, [out, in] or [in, out], rounded to 16 levels per block."""
        return _dequantize(self._stored(), self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.bias, self.shape, self.is_transposed, *self._stored())
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, double_quant={self.double_quant}"

    def _stored(self) -> tuple[Any, ...]:
        return self.qweight, self.absmax, self.absmax_8bit, self.absmax_codebook, self.absmax_offset


def _dequantize(stored: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    qweight, absmax, absmax_8bit, codebook, offset = stored
    if absmax_8bit is not None:
        dequantize = torch.ops.bitsandbytes.dequantize_blockwise
        absmax = dequantize(absmax_8bit, absmax, codebook, _ABSMAX_BLOCK, torch.float32) + offset
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(qweight, absmax, _BLOCK, "nf4", list(shape), dtype)
    return weight


class _Product(torch.autograd.Function):
    """x @ weight + bias, which keeps the quantized weight for its backward pass and not the input."""

    @staticmethod
    def forward(ctx, x, bias, shape, is_transposed, *stored):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*stored)
        ctx.shape, ctx.is_transposed = shape, is_transposed
        weight = _dequantize(stored, shape, x.dtype)
        weight_IO = weight if is_transposed else weight.T
        x_NI = x.flatten(0, -2)
        out_NO = x_NI @ weight_IO if bias is None else torch.addmm(bias, x_NI, weight_IO)
        return out_NO.view(*x.shape[:-1], weight_IO.shape[1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_NO = grad.flatten(0, -2)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _dequantize(ctx.saved_tensors, ctx.shape, grad.dtype)
            weight_OI = weight.T if ctx.is_transposed else weight
            grad_x = (grad_NO @ weight_OI).view(*grad.shape[:-1], weight_OI.shape[1])
        if ctx.needs_input_grad[1]:
            grad_bias = grad_NO.sum(0)
        return grad_x, grad_bias, *([None] * 7)
