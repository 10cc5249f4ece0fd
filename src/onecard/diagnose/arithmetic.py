"""What training needs of PyTorch, tried out on a device and compared with fp32 on the CPU."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.diagnose.check import Check
from onecard.diagnose.measure_card import Effort, time_matmul
from onecard.hardware import Machine, card_of
from onecard.planner.device import find_compiler_problem, find_target

# bf16 has 8 bits: errors of sums of rounded products lie far below, wrong kernels far above.
_TOLERANCE = 0.02
# Of the catalogue's peak; healthy cards reach half of it and more with large matrices.
_LEAST_SHARE = 0.35
_NF4_TOLERANCE = 0.2


def check_product(device: str, machine: Machine) -> Check:
    """Multiplies bf16 matrices (fp16 on older cards) and compares the product; on a card also its speed."""
    dtype = _dtype_on(device, machine)
    name = f"matrix product in {_word(dtype)} on {device}"
    left, right = (_random(256, 512, seed=seed) for seed in (0, 1))
    product = (left.to(device, dtype) @ right.T.to(device, dtype)).float().cpu()
    off = _difference(product, left @ right.T)
    if not off < _TOLERANCE:
        return Check(name, "bad", f"the product is off by {off:.1%}", _BROKEN)
    if device == "cpu":
        rates = {
            kind: time_matmul(torch.device("cpu"), kind, Effort(1024, 0, 0, 0.1)) for kind in (dtype, torch.float32)
        }
        faster = "fp32" if rates[torch.float32] > rates[dtype] else _word(dtype)
        found = (
            f"right; {rates[dtype] / 1e9:.0f} GFLOP/s, fp32 {rates[torch.float32] / 1e9:.0f}: {faster} is faster here"
        )
        return Check(name, "good", found)
    rate = time_matmul(torch.device(device), dtype, Effort(4096, 0, 0, 0.3))
    card = card_of(machine.gpus[0]) if machine.gpus else None
    peak = card.flops_16bit if card is not None else None
    if card is None or peak is None:
        return Check(name, "good", f"right; {rate / 1e12:.1f} TFLOP/s")
    low = card.flops_16bit_range[0] if card.flops_16bit_range else peak
    found = f"right; {rate / 1e12:.1f} TFLOP/s, {rate / peak:.0%} of what the catalogue has for {card.name}"
    if rate < _LEAST_SHARE * low:
        return Check(name, "warning", found, "end other programs on the card; see temperature and power below")
    return Check(name, "good", found)


def check_attention(device: str, machine: Machine) -> Check:
    """Runs attention forward and backward and compares output and gradients."""
    dtype = _dtype_on(device, machine)
    name = f"attention in {_word(dtype)} on {device}"
    expected = _attend([_random(2, 4, 128, 64, seed=seed) for seed in range(3)])
    actual = _attend([_random(2, 4, 128, 64, seed=seed).to(device, dtype) for seed in range(3)])
    off = max(_difference(a.float().cpu(), b) for a, b in zip(actual, expected, strict=True))
    if not off < _TOLERANCE:
        return Check(name, "bad", f"output or gradients are off by {off:.1%}", _BROKEN)
    return Check(name, "good", f"forward and backward are right within {off:.1%}")


_BROKEN = (
    "install PyTorch anew from the index for this card (docs/installation.md); if it stays so, the device is faulty"
)


def check_compile(device: str, machine: Machine) -> Check:
    """Compiles a small function with its gradient and compares the result."""
    name = f"torch.compile on {device}"
    remedy = _compiler_remedy(device, machine)
    if problem := find_compiler_problem(find_target("cuda" if device != "cpu" else "cpu", machine)):
        return Check(name, "warning", f"{problem}; training runs without it, slower", remedy)

    def function(x: Tensor) -> Tensor:
        return (F.gelu(x) * torch.sigmoid(x)).sum(-1)

    eager, compiled = (_random(64, 64, seed=3).to(device).requires_grad_() for _ in range(2))
    started = time.perf_counter()
    function(eager).square().sum().backward()
    try:
        torch.compile(function)(compiled).square().sum().backward()
    except Exception as error:  # a compiler fails in as many ways as there are machines
        return Check(name, "warning", f"does not work: {_first_line(error)}; training runs without it, slower", remedy)
    assert eager.grad is not None
    assert compiled.grad is not None
    off = _difference(compiled.grad.cpu(), eager.grad.cpu())
    if not off < 1e-4:
        return Check(name, "bad", f"gradients are off by {off:.1%}", "set torch_compile: false")
    return Check(name, "good", f"works; a small function took {time.perf_counter() - started:.1f} s")


def check_bitsandbytes(device: str) -> Check:
    """Quantizes a matrix to NF4 and back."""
    name = f"bitsandbytes on {device}"
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        return Check(name, "not applicable", "not installed", "for method qlora: pip install 'onecard[quant]'")
    from onecard.errors import InputError
    from onecard.model.nf4 import NF4Linear

    linear = torch.nn.Linear(256, 256, bias=False)
    try:
        rest = NF4Linear.from_linear(linear, device=torch.device(device), double_quant=True)
        off = _difference(rest.dequantized(torch.float32).cpu(), linear.weight.detach())
    except (InputError, RuntimeError, OSError, NotImplementedError) as error:
        found = f"does not work: {_first_line(error)}"
        return Check(name, "warning", found, "pip install --upgrade bitsandbytes, or use method lora instead of qlora")
    if not off < _NF4_TOLERANCE:
        return Check(name, "bad", f"4-bit weights are off by {off:.0%}", "pip install --upgrade bitsandbytes")
    return Check(name, "good", f"weights in 4 bits are within {off:.0%}, as they should be")


def _attend(tensors: list[Tensor]) -> list[Tensor]:
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.float().square().sum().backward()
    return [out.detach(), *(tensor.grad for tensor in (q, k, v) if tensor.grad is not None)]


def _dtype_on(device: str, machine: Machine) -> torch.dtype:
    is_older = device != "cpu" and bool(machine.gpus) and not machine.gpus[0].supports_bf16
    return torch.float16 if is_older else torch.bfloat16


def _word(dtype: torch.dtype) -> str:
    return "fp16" if dtype is torch.float16 else "bf16"


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The distance of two tensors as a share of the size of the second; NaN where one is not finite."""
    return float((actual - expected).norm() / expected.norm())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _compiler_remedy(device: str, machine: Machine) -> str:
    windows = machine.platform == "windows"
    if device != "cpu":
        return "pip install triton-windows" if windows else "pip install triton, and a C compiler: apt install gcc"
    return "install the C++ build tools of Visual Studio" if windows else "install a C++ compiler: apt install g++"
