"""How well the processes of a run keep up with one another.

All come to the end of a step together, so its time says nothing of any of them. Forward passes do: within one, no rank
waits for another, or only between its layers, which then are what is measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.data import Batch
from onecard.observe.events import RanksEvent
from onecard.run.clock import Clock
from onecard.training.state import TrainState

# As often as detectors are asked: what is gathered more often, nobody looks at.
_LEAST_INTERVAL, _MOST_INTERVAL, _NUM_TIMES = 10, 200, 500


class KeepingUp:
    """Measures the own work of this rank, and gathers that of all at intervals; one process alone measures nothing."""

    def __init__(self, state: TrainState, clock: Clock) -> None:
        self._state, self._elapsed = state, clock
        self._stopwatch = Stopwatch(state.device)
        self._interval = min(_MOST_INTERVAL, max(_LEAST_INTERVAL, state.plan.schedule.num_steps // _NUM_TIMES))
        if state.ranks.is_several:
            _watch(state, self._stopwatch)
        self._begin()

    def _begin(self) -> None:
        self._num_steps, self._num_tokens, self._data_s, self._steps_s = 0, 0, 0.0, 0.0
        self._stopwatch.total_s()

    def add_share(self, batches: Sequence[Batch], data_s: float) -> None:
        """Counts what this rank is about to do for a step, and how long it waited for it."""
        self._num_tokens += sum(batch.ids.numel() for batch in batches)
        self._data_s += data_s

    def add_step(self, step: int, step_s: float) -> Iterator[RanksEvent]:
        """Counts a step that is done; at intervals tells of all ranks, which all have to come to it."""
        if not self._state.ranks.is_several:
            return
        self._num_steps += 1
        self._steps_s += step_s
        if step % self._interval != 0:
            return
        own = [self._stopwatch.total_s(), self._data_s, self._num_tokens]
        rows = self._state.ranks.gather_rows(torch.tensor([own], dtype=torch.float64)) / self._num_steps
        forward_s, data_s, num_tokens = (tuple(column.tolist()) for column in rows.T)
        yield RanksEvent(
            step=step,
            elapsed_s=self._elapsed(),
            num_steps=self._num_steps,
            step_s=self._steps_s / self._num_steps,
            forward_s=forward_s,
            data_s=data_s,
            num_tokens=num_tokens,
        )
        self._begin()


class Stopwatch:
    """Adds up seconds between `start` and `stop`; of a GPU those that its own work takes."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started_s = self._total_s = 0.0

    def start(self) -> None:
        if not self._is_gpu:
            self._started_s = time.perf_counter()
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._pairs.append((begin, end))

    def stop(self) -> None:
        if not self._is_gpu:
            self._total_s += time.perf_counter() - self._started_s
        elif self._pairs:
            self._pairs[-1][1].record()

    def total_s(self) -> float:
        """Gives the seconds since it was asked last."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
            self._total_s += sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000
            self._pairs.clear()
        total, self._total_s = self._total_s, 0.0
        return total


def _watch(state: TrainState, stopwatch: Stopwatch) -> None:
    if not state.is_in_parts:
        state.decoder.watch_calls(lambda call: _timed(call, stopwatch))
        return

    @torch.compiler.disable
    def start(*_: Any) -> None:
        if torch.is_grad_enabled():
            stopwatch.start()

    @torch.compiler.disable
    def stop(*_: Any) -> None:
        if torch.is_grad_enabled():
            stopwatch.stop()

    # Registered after those that gather a layer, and so within them.
    for layer in _layers(state.model):
        layer.register_forward_pre_hook(start)
        layer.register_forward_hook(stop)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _timed(call: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    def timed(**keywords: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation
            return call(**keywords)
        stopwatch.start()
        try:
            return call(**keywords)
        finally:
            stopwatch.stop()

    return timed
