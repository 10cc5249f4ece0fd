"""Memory that runs out, by whichever name it is told, and what held it."""

import errno
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from onecard.hardware.page_file import is_page_file_full

Result = TypeVar("Result")

# PyTorch's allocator of a GPU has a type for it. Its allocator of the host (on Linux, on Windows), page-locked memory,
# NVIDIA's libraries, which take memory of their own, and weights that are mapped to memory say it in words only.
_PHRASES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cannot allocate memory (12)",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error, or one that caused it, is memory that could not be had, on a GPU or on the host."""
    return any(_is_shortage(one) for one in _with_causes(error))


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_page_file_full(error):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


@dataclass(frozen=True)
class Shortage:
    """Memory that ran out: what the allocator said, and bytes by who held them at that moment."""

    evidence: str
    held_bytes: dict[str, int]


def attempt(do: Callable[[], Result], device: torch.device) -> Result | Shortage:
    """Does something; where memory runs out meanwhile, gives a `Shortage` and lets go of all that was begun."""
    try:
        return do()
    except Exception as error:  # told apart by what is said, too
        if not is_out_of_memory(error):
            raise
        shortage = Shortage(_first_line(error), _held_bytes(device))
    # Out here the error is gone, and with it the frames that held what was begun.
    release_memory(device)
    return shortage


def release_memory(device: torch.device) -> None:
    """Gives back what nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    # The error that a compiler wraps says more than its wrapping.
    told = next(one for one in _with_causes(error) if _is_shortage(one))
    lines = str(told).strip().splitlines()
    return (lines[0] if lines else type(told).__name__)[:200]


def _held_bytes(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"process": psutil.Process().memory_info().rss, "free": psutil.virtual_memory().available}
    stats, (free, total) = torch.cuda.memory_stats(device), torch.cuda.mem_get_info(device)
    kinds = {
        "tensors": "allocated_bytes.all.current",
        "tensors at most": "allocated_bytes.all.peak",
        "reserved": "reserved_bytes.all.current",
        "unusable pieces": "inactive_split_bytes.all.current",
    }
    return {name: int(stats.get(key, 0)) for name, key in kinds.items()} | {"free": free, "card": total}
