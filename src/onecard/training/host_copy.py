"""A copy of what training changes in the memory of the host, so that it can be written while training goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from onecard.units import MIB

# A smaller state is on the disk sooner than a thread is started and waited for.
LEAST_BYTES_IN_BACKGROUND = 64 * MIB
# Page-locked buffers are rounded up to powers of two, and a system without memory left ends a process unasked.
_ROOM = 2


def has_room(num_bytes: int, free_bytes: int) -> bool:
    """Whether a host with so much free memory bears a copy of a state of `num_bytes`, with some left."""
    return _ROOM * num_bytes < free_bytes


class HostCopy:
    """Buffers that are filled again at every checkpoint. On a CPU a copy costs the memory of weights and moments.

    Of a GPU the copies are queued behind the update that made the state, and the next update behind them: Python does
    not wait, and whoever reads them calls `wait` first.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies named tensors of named parts; nothing may read the copies of an earlier call any more.

        Raises:
            MemoryError: the host has no room for them.
        """
        copies = {
            part: {name: self._copy((part, name), tensor) for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }
        self._copied = None
        if any(tensor.is_cuda for tensors in parts.values() for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Returns when the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """Gives the memory back; page-locked buffers would stay with PyTorch, for the next ones of their size."""
        is_pinned = any(buffer.is_pinned() for buffer in self._buffers.values())
        if is_pinned:
            torch.cuda.synchronize()  # copies that broke off may still be on their way
        self._buffers.clear()
        if is_pinned and hasattr(torch.accelerator, "empty_host_cache"):  # not in torch 2.11
            torch.accelerator.empty_host_cache()

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _make_buffer(tensor)
        buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda and buffer.is_pinned())
        return buffer


def _make_buffer(tensor: Tensor) -> Tensor:
    try:
        # Page-locked memory is filled at the full speed of the bus, while the GPU goes on to its next work.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError:  # how torch says that there is no memory, page-locked or at all
        pass
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    except RuntimeError as error:
        raise MemoryError(str(error)) from error
