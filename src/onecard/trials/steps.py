"""Bare steps of a run: its batches, its update, its clock, and nothing of what a run does beside them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onecard.data import Batch
from onecard.run.stepping import make_step, to_host
from onecard.training.state import TrainState
from onecard.training.step import place


class Batches(Protocol):
    """Where steps come from: the `Feed` of a run, or random tokens."""

    def __next__(self) -> list[Batch]: ...

    @property
    def wait_s(self) -> float: ...


@dataclass(frozen=True)
class Step:
    """What an update was like. Its seconds reach from the statistics of the one before to its own."""

    loss: float
    is_finite: bool
    num_tokens: int
    seconds: float
    wait_s: float


@dataclass(frozen=True)
class _Launched:
    num_tokens: int
    wait_s: float
    values: Tensor
    copied: torch.cuda.Event | None


def make_steps(state: TrainState, batches: Batches, rate_after: Callable[[int], float]) -> Iterator[Step]:
    """Trains for as long as it is asked, and yields each update when its statistics are there.

    They are read one update late on a GPU, as in a run, so that it never waits for Python. `rate_after` gives the
    learning rate of the update that follows so many.
    """
    is_cpu, last = state.device.type == "cpu", time.perf_counter()
    waiting: deque[_Launched] = deque()
    while True:
        found = next(batches)
        micro_batches = [place(batch, state) for batch in found]
        stats = make_step(state, micro_batches, rate_after(state.progress.step))
        state.progress.step += 1
        state.progress.position += state.plan.total_batch_size
        waiting.append(_Launched(sum(batch.num_tokens for batch in found), batches.wait_s, *to_host(stats)))
        # A CPU is never ahead of Python, so waiting would only blur the step's time.
        if is_cpu or len(waiting) > 1:
            launched = waiting.popleft()
            if launched.copied is not None:
                launched.copied.synchronize()
            loss, _, _, is_finite, _ = launched.values.tolist()
            now = time.perf_counter()
            yield Step(loss, bool(is_finite), launched.num_tokens, now - last, launched.wait_s)
            # What is done with a step counts for none on a CPU; a GPU works on meanwhile.
            last = time.perf_counter() if is_cpu else now
