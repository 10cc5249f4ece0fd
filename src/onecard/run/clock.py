"""Seconds of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training since the run began, across resumes; scoring checkpoints by tasks does not count."""

    def __init__(self, elapsed_s: float) -> None:
        self._started = time.perf_counter() - elapsed_s

    def __call__(self) -> float:
        return time.perf_counter() - self._started

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Lets the time in the block pass by."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - before
