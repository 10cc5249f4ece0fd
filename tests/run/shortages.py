"""Memory that runs out where a test says, as an allocator of the host tells it."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)


class FailsAt(TorchDispatchMode):
    """Lets an operator fail: the one after `num_operators` others for which `counts` was true; once."""

    def __init__(self, num_operators: int, counts: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self._remaining = num_operators
        self._counts = counts
        self.has_failed = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.has_failed and self._counts():
            self._remaining -= 1
            if self._remaining < 0:
                self.has_failed = True
                raise RuntimeError(MESSAGE)
        return function(*args, **(kwargs or {}))


def failing(function: Callable[..., Any], calls: Callable[[int], bool], num_operators: int) -> Callable[..., Any]:
    """Wraps a function so that memory runs out within the calls, counted from 1, that `calls` names."""
    number = [0]

    def call(*args: Any, **keywords: Any) -> Any:
        number[0] += 1
        if not calls(number[0]):
            return function(*args, **keywords)
        with FailsAt(num_operators):
            return function(*args, **keywords)

    return call
