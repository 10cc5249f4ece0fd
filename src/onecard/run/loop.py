"""The loop: a generator of events that writes nothing but checkpoints.

batches ──► train_step ──► stats (on the device)
                             │ read one update late, so the device never waits for Python
                             ▼
             StepEvent ... EvaluatedEvent, SampledEvent, SavedEvent at their intervals
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from onecard.data import BatchStream
from onecard.errors import DivergedError
from onecard.model.decoder import CompilerError
from onecard.observe.events import Event, FindingEvent, FinishedEvent, FinishReason, StepEvent
from onecard.run.clock import Clock
from onecard.run.control import Control
from onecard.run.milestones import Milestones
from onecard.spec import Plan
from onecard.training.schedule import rate_at
from onecard.training.state import TrainState
from onecard.training.step import MicroBatch, StepStats, place, train_step

_MAX_REFUSED_IN_A_ROW = 25
# Hours become steps by a short measurement; a machine that slows down afterwards may take so many times as long.
_OVERTIME = 1.25


@dataclass(frozen=True)
class _Pending:
    """An update whose statistics are still on their way from the device."""

    step: int
    learning_rate: float
    num_tokens: int
    tokens_seen: int
    wait_s: float
    values: Tensor  # loss, gradient norm, number of targets, finite: one copy for all
    copied: torch.cuda.Event | None


class Loop:
    """Trains a state until its plan is done."""

    def __init__(self, state: TrainState, milestones: Milestones, control: Control, clock: Clock) -> None:
        self._state = state
        self._milestones = milestones
        self._control = control
        self._elapsed = clock
        self._begun_s, self._last_read = clock(), time.perf_counter()
        self._tokens_before = state.progress.tokens_seen
        self._pending: _Pending | None = None

    def run(self, stream: BatchStream) -> Iterator[Event]:
        """Yields what happens, in order; ends with a FinishedEvent.

        Raises:
            DivergedError: update after update had to be refused.
        """
        while (reason := self._end()) is None:
            yield from self._update(stream)
            yield from self._at_intervals(is_last=self._state.progress.step == self._plan.schedule.num_steps)
        yield from self._drain()
        yield from self._milestones.finish(reason)
        reason = yield from self._milestones.choose(reason)
        yield self._finished(reason)

    @property
    def _plan(self) -> Plan:
        return self._state.plan

    def _update(self, stream: BatchStream) -> Iterator[Event]:
        state, progress = self._state, self._state.progress
        batches = next(stream)
        micro_batches = [place(batch, state) for batch in batches]
        learning_rate = self._plan.optimizer.learning_rate * rate_at(self._plan.schedule, progress.step)
        try:
            stats = self._train_step(micro_batches, learning_rate)
        except CompilerError as error:
            yield self._give_up_compiling(error)
            stats = self._train_step(micro_batches, learning_rate)
        progress.step += 1
        progress.position += self._plan.total_batch_size
        num_tokens = sum(batch.num_tokens for batch in batches)
        progress.tokens_seen += num_tokens
        launched = _Pending(
            progress.step, learning_rate, num_tokens, progress.tokens_seen, stream.wait_s, *_to_host(stats)
        )
        yield from self._drain()
        self._pending = launched
        if launched.copied is None:  # a CPU is never ahead of Python, so waiting would only blur the step's time
            yield from self._drain()

    def _train_step(self, micro_batches: list[MicroBatch], learning_rate: float) -> StepStats:
        seed_step(self._plan.seed, self._state.progress.step)
        limit = self._plan.optimizer.max_grad_norm
        try:
            return train_step(self._state, micro_batches, learning_rate, max_grad_norm=limit)
        except TorchDynamoException as error:  # the backward pass is compiled when it first runs
            raise CompilerError(str(error)) from error

    def _give_up_compiling(self, error: Exception) -> FindingEvent:
        self._state.decoder.to_eager()
        self._state.optimizer.zero_grad()
        self._state.plan = self._plan.model_copy(update={"torch_compile": False})
        return FindingEvent(
            step=self._state.progress.step,
            elapsed_s=self._elapsed(),
            symptom="torch.compile failed; the run goes on without it",
            evidence=str(error).strip().splitlines()[0][:200],
            likely_cause="the compiler or Triton does not work on this machine",
            remedy="set torch_compile: false to save the attempt, or repair the compiler",
        )

    def _drain(self) -> Iterator[Event]:
        """Reads the statistics of the update before, waiting for them if need be."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        loss, gradient_norm, num_targets, is_finite = pending.values.tolist()
        now = time.perf_counter()
        step_s, self._last_read = now - self._last_read, now
        tokens_per_s = pending.num_tokens / step_s
        yield StepEvent(
            step=pending.step,
            elapsed_s=self._elapsed(),
            loss=loss,
            learning_rate=pending.learning_rate,
            grad_norm=gradient_norm,
            num_target_tokens=int(num_targets),
            tokens_seen=pending.tokens_seen,
            is_finite=bool(is_finite),
            step_s=step_s,
            tokens_per_s=tokens_per_s,
            wait_s=pending.wait_s,
            share_of_peak=tokens_per_s * self._plan.flops_per_token / self._plan.peak_flops,
            memory_bytes=_reserved_bytes(self._state.device),
        )
        yield from self._watch_refusals(pending.step, bool(is_finite))

    def _watch_refusals(self, step: int, is_finite: bool) -> Iterator[Event]:
        progress = self._state.progress
        progress.num_refused_in_a_row = 0 if is_finite else progress.num_refused_in_a_row + 1
        # Of a short run, half.
        limit = min(_MAX_REFUSED_IN_A_ROW, max(2, self._plan.schedule.num_steps // 2))
        if progress.num_refused_in_a_row < limit:
            return
        finding = FindingEvent(
            step=step,
            elapsed_s=self._elapsed(),
            symptom="loss or gradient is not finite",
            evidence=f"{limit} updates in a row were refused, the last at step {step}",
            likely_cause="the learning rate is too high, or precision fp16 overflows",
            remedy="start a new run with half the learning_rate, or with precision bf16 or fp32",
            stops_run=True,
        )
        yield finding
        yield self._finished("diverged")
        raise DivergedError(f"{finding.symptom}: {finding.evidence}. {finding.remedy}")

    def _at_intervals(self, *, is_last: bool) -> Iterator[Event]:
        yield from self._milestones.look()
        due = self._milestones.due(self._state.progress.step, is_last=is_last)
        if due:
            yield from self._drain()
            yield from self._milestones.reach(due)
            # The next step's time starts here: what happened in between has its own seconds.
            self._last_read = time.perf_counter()

    def _end(self) -> FinishReason | None:
        """Says why the run ends here; asked before each update, so that a resumed run ends where the first would."""
        patience, progress = self._plan.early_stopping_patience, self._state.progress
        if patience is not None and progress.num_evaluations_without_gain >= patience:
            return "early stopping"
        if progress.step >= self._plan.schedule.num_steps:
            return "completed"
        if self._plan.max_hours is not None and self._elapsed() > 3600 * self._plan.max_hours * _OVERTIME:
            return "time limit"
        return "interrupted" if self._control.stop else None

    def _finished(self, reason: FinishReason) -> FinishedEvent:
        progress, seconds = self._state.progress, self._elapsed() - self._begun_s
        return FinishedEvent(
            step=progress.step,
            elapsed_s=self._elapsed(),
            reason=reason,
            loss=progress.heldout_loss,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            tokens_seen=progress.tokens_seen,
            num_steps=self._plan.schedule.num_steps,
            tokens_per_s=(progress.tokens_seen - self._tokens_before) / max(seconds, 1e-9),
            seconds=seconds,
        )


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout of one step from (seed, step), so that a resumed run draws what an uninterrupted one would."""
    torch.manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF)


def _to_host(stats: StepStats) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts one copy of all statistics; the event tells when it has arrived."""
    values = torch.stack([stats.loss, stats.gradient_norm, stats.num_targets.float(), stats.is_finite.float()])
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _reserved_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
