"""Training steps from any position on, prepared ahead in the background."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

from onecard.data.batches import Batch
from onecard.data.chats.packing import Packing
from onecard.errors import InputError

_LOOKED_UP_SAMPLES = 1024


class Steps(Protocol):
    """What a stream draws from: blocks of text or conversations."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives source [n] and place there [n] of the samples at positions [n]."""

    def build(self, sources: np.ndarray, places: np.ndarray) -> list[Batch]:
        """Gives the samples of one step as micro-batches."""


@dataclass(frozen=True)
class StreamSettings:
    """How a stream cuts and prepares its steps.

    A step has `samples_per_step` blocks in micro-batches of `micro_batch_size` (the last may be smaller); of chats, so
    many conversations in micro-batches of at most so many rows, packed as `packing` says, and with `static_shapes` all
    of the same shape. With `num_workers` 0 a step is built when it is asked for; otherwise that many threads keep
    `prefetch_factor` steps each ready. `pin_memory` puts batches into page-locked memory (needs a CUDA device).
    """

    samples_per_step: int
    micro_batch_size: int
    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool = False
    packing: Packing = "off"
    static_shapes: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, it must be at least {least}"
            for name, value, least in (
                ("samples_per_step", self.samples_per_step, 1),
                ("micro_batch_size", self.micro_batch_size, 1),
                ("dataloader_num_workers", self.num_workers, 0),
                ("dataloader_prefetch_factor", self.prefetch_factor, 1),
            )
            if value < least
        ]
        if problems:
            raise InputError("; ".join(problems) + ".")


class BatchStream:
    """An endless iterator of training steps: each item is the list of micro-batches of one optimizer update.

    `position` counts the samples handed out; a stream that starts at a position gives what one from 0 would give there.
    `wait_s` is how long the latest item kept its caller waiting. Workers are threads: a gather is microseconds of
    numpy copying, so processes would only add their start and the transport. Close it, or use it in a `with` block.
    """

    def __init__(self, steps: Steps, settings: StreamSettings, position: int = 0) -> None:
        self.position = position
        self.wait_s = 0.0
        self._steps = steps
        self._settings = settings
        self._ahead: deque[Future[list[Batch]]] = deque()
        self._next_position = position
        self._located = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._executor: ThreadPoolExecutor | None = None
        if settings.num_workers:
            self._executor = ThreadPoolExecutor(settings.num_workers, thread_name_prefix="onecard-data")
            self._fill()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        if self._settings.num_workers == 0:
            step = self._build_step(*self._next_samples())
        elif not self._ahead:
            raise StopIteration
        else:
            # Taken off only when it is there: an interrupted wait loses no step.
            step = self._ahead[0].result()
            self._ahead.popleft()
            self._fill()
        self.position += self._settings.samples_per_step
        self.wait_s = time.perf_counter() - started
        return step

    def close(self) -> None:
        """Stops the workers; steps prepared ahead are dropped."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None
        self._ahead.clear()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        wanted = self._settings.num_workers * self._settings.prefetch_factor
        while self._executor is not None and len(self._ahead) < wanted:
            self._ahead.append(self._executor.submit(self._build_step, *self._next_samples()))

    def _next_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives source and place of each sample of the next step, looked up for many steps at once: one look-up costs
        about the same for 10 positions as for 1,000."""
        count = self._settings.samples_per_step
        sources, places = self._located
        if not len(places):
            end = self._next_position + count * max(1, _LOOKED_UP_SAMPLES // count)
            sources, places = self._steps.locate(np.arange(self._next_position, end))
        self._located = sources[count:], places[count:]
        self._next_position += count
        return sources[:count], places[:count]

    def _build_step(self, sources: np.ndarray, places: np.ndarray) -> list[Batch]:
        batches = self._steps.build(sources, places)
        return [batch.pin() for batch in batches] if self._settings.pin_memory else batches
