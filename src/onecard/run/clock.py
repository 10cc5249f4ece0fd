"""Seconds of training."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def _awake_s() -> float:
    """Seconds that go on while the machine is awake: a laptop that slept over night has not trained for so long."""
    if sys.platform != "win32":
        return time.perf_counter()  # which stands still in sleep on Linux and macOS, but not on Windows
    ticks = ctypes.c_ulonglong()
    ctypes.windll.kernel32.QueryUnbiasedInterruptTime(ctypes.byref(ticks))
    return ticks.value * 1e-7


class Clock:
    """Seconds of training since the run began, across resumes; scoring checkpoints by tasks does not count."""

    def __init__(self, elapsed_s: float) -> None:
        self._started = _awake_s() - elapsed_s

    def __call__(self) -> float:
        return _awake_s() - self._started

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Lets the time in the block pass by."""
        before = _awake_s()
        try:
            yield
        finally:
            self._started += _awake_s() - before
