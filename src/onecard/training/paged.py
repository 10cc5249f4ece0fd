"""Optimizer state in CUDA's unified memory: on the card while there is room, else page by page on the host.

bitsandbytes reserves such memory and hands it out as a tensor of the CPU. Its address is as good on the card, so the
same memory is handed on as a tensor of the card, and every operator of PyTorch works on it. Outside PyTorch's caching
allocator; freed with the process.
"""

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onecard.model.nf4 import load_operators

# A tensor of zeros of this shape and type on this device.
Zeros = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]
# bitsandbytes' own limit: smaller tensors stay on the card.
_LEAST_ELEMENTS = 100_000


class PageableZeros:
    """Makes state and remembers which of it is paged. On a CPU, where all memory is the host's, nothing differs."""

    def __init__(self, *, is_paged: bool) -> None:
        self._is_paged = is_paged
        self.paged: list[Tensor] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self._is_paged or math.prod(shape) < _LEAST_ELEMENTS:
            return torch.zeros(shape, dtype=dtype, device=device)
        paged = _paged_zeros(shape, dtype, device) if device.type == "cuda" else torch.zeros(shape, dtype=dtype)
        self.paged.append(paged)
        return paged


class _CudaArray:
    """Memory as others describe it to PyTorch: the CUDA Array Interface, version 3."""

    def __init__(self, owner: Tensor) -> None:
        kind = {torch.float32: "<f4", torch.uint8: "|u1"}[owner.dtype]
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": tuple(owner.shape),
            "typestr": kind,
            "data": (owner.data_ptr(), False),
            "version": 3,
        }


def _paged_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    load_operators("paged optimizer state", "the same optim without paged_")
    functional = importlib.import_module("bitsandbytes.functional")
    with torch.cuda.device(device):
        on_host = functional.get_paged(*shape, dtype=dtype, device=device)
        paged = torch.as_tensor(_CudaArray(on_host), device=device)
    assert paged.data_ptr() == on_host.data_ptr(), "PyTorch made a copy"
    return paged.zero_()
