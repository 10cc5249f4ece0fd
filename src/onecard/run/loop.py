"""The loop: a generator of events that writes nothing but checkpoints.

batches ──► train_step ──► stats (on the device)
                             │ read one update late, so the device never waits for Python
                             ▼
             StepEvent ... EvaluatedEvent, SampledEvent, SavedEvent at their intervals
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from onecard.errors import DivergedError, DoesNotFitError
from onecard.model.shortage import Shortage, attempt
from onecard.observe.detectors import as_event, make_finding
from onecard.observe.events import Event, FindingEvent, FinishedEvent, FinishReason, StepEvent
from onecard.run.clock import Clock
from onecard.run.control import Control
from onecard.run.feed import Feed
from onecard.run.keeping_up import KeepingUp
from onecard.run.milestones import Milestones
from onecard.run.recovery import Recovery
from onecard.run.refusals import Refusals
from onecard.run.rests import Rests
from onecard.run.retreat import Retreat, Trouble
from onecard.run.stepping import make_step, to_host
from onecard.run.together import agree_on_end, find_sick
from onecard.spec import Plan
from onecard.training.schedule import rate_at
from onecard.training.state import TrainState
from onecard.training.step import StepStats, place

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
    values: Tensor  # loss, gradient norm, number of targets, finite, own part finite: one copy for all
    copied: torch.cuda.Event | None


@dataclass(frozen=True)
class _Made:
    """A step that has been launched on the device."""

    learning_rate: float
    num_tokens: int
    stats: StepStats


class Loop:
    """Trains a state until its plan is done."""

    def __init__(
        self, state: TrainState, milestones: Milestones, control: Control, clock: Clock, retreat: Retreat
    ) -> None:
        self._state = state
        self._milestones = milestones
        self._control = control
        self._elapsed = clock
        self._retreat = retreat
        self._recovery = Recovery(state, clock)
        self._refusals = Refusals(state, clock)
        self._keeping_up = KeepingUp(state, clock)
        self._rests = Rests(state.plan.max_power_share, lambda: control.stop)
        self._begun_s, self._last_read = clock(), time.perf_counter()
        self._tokens_before = state.progress.tokens_seen
        self._pending: _Pending | None = None

    def run(self, feed: Feed) -> Iterator[Event]:
        """Yields what happens, in order; ends with a FinishedEvent.

        Raises:
            DivergedError: update after update had to be refused, and going back did not help.
            DoesNotFitError: memory ran out, and nothing is left to be made smaller.
        """
        while True:
            while (reason := self._end()) is None:
                if (yield from self._update(feed)):
                    yield from self._at_intervals(is_last=self._state.progress.step == self._plan.schedule.num_steps)
            if (yield from self._drain()):
                break
        yield from self._milestones.finish(reason)
        reason = yield from self._milestones.choose(reason)
        yield self._finished(reason)

    @property
    def _plan(self) -> Plan:
        return self._state.plan

    def _update(self, feed: Feed) -> Generator[Event, None, bool]:
        """Makes a step, and tells of the one before; false where the run went back instead."""
        while isinstance(made := attempt(partial(self._step, feed), self._state.device), Shortage):
            if self._state.is_updating:
                yield from self._go_back(self._torn(made))
                return False
            if not (yield from self._drain()):
                return False
            yield self._recovery.split_step(made)
            feed.reopen()
        yield from self._tell_of_compiler()
        state, progress = self._state, self._state.progress
        progress.step += 1
        progress.position += self._plan.total_batch_size
        progress.tokens_seen += made.num_tokens
        launched = _Pending(
            progress.step, made.learning_rate, made.num_tokens, progress.tokens_seen, feed.wait_s, *to_host(made.stats)
        )
        # Where the step before sends the run back, the one that was launched meanwhile is made anew.
        if not (yield from self._drain()):
            return False
        self._pending = launched
        if self._rests.are_taken:
            _wait_for(launched)  # a device that still computes would not rest
            self._rests.take()
        # A CPU is never ahead of Python, so waiting would only blur the step's time.
        elif state.device.type != "cpu":
            return True
        return (yield from self._drain())

    def _step(self, feed: Feed) -> _Made:
        """Takes a step's samples and makes its update; nothing else changes, so that it can be made again."""
        batches, state = next(feed), self._state
        self._keeping_up.add_share(batches, feed.wait_s)
        micro_batches = [place(batch, state) for batch in batches]
        learning_rate = self._plan.optimizer.learning_rate * rate_at(self._plan.schedule, state.progress.step)
        learning_rate *= state.progress.rate_factor
        stats = make_step(state, micro_batches, learning_rate)
        return _Made(learning_rate, feed.num_tokens, stats)

    def _tell_of_compiler(self) -> Iterator[FindingEvent]:
        """Tells once that the compiler was given up, in the step that was just made or in the probe."""
        decoder = self._state.decoder
        if decoder.failure is None:
            return
        reason, decoder.failure = decoder.failure.strip() or "no reason given", None
        finding = make_finding("compile-failed", reason.splitlines()[0][:200], "")
        yield as_event(finding, self._state.progress.step, self._elapsed())

    def _torn(self, shortage: Shortage) -> Trouble:
        """An update that broke off: what it had changed is not known, so all of it is taken back."""
        if self._retreat.is_exhausted:
            raise DoesNotFitError(
                f"memory ran out again and again while the update of step {self._state.progress.step + 1} was applied "
                f"({shortage.evidence}): close what else uses the memory and resume, or use a smaller optim"
            )
        held_bytes = self._recovery.held(shortage)
        # What a smaller step lets go of is there for the update.
        self._recovery.shrink_step()
        step = self._state.progress.step
        return Trouble("out of memory", "update", shortage.evidence, False, step, held_bytes)

    def _go_back(self, trouble: Trouble) -> Iterator[Event]:
        self._pending = None
        yield from self._retreat.go_back(trouble)
        self._last_read = time.perf_counter()
        self._tokens_before = min(self._tokens_before, self._state.progress.tokens_seen)

    def _drain(self) -> Generator[Event, None, bool]:
        """Reads the statistics of the update before, waiting for them if need be; false where the run goes back."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        _wait_for(pending)
        loss, gradient_norm, num_targets, is_finite, own_is_finite = pending.values.tolist()
        now = time.perf_counter()
        step_s, self._last_read = now - self._last_read, now
        tokens_per_s = pending.num_tokens / step_s
        event = StepEvent(
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
        yield event
        yield from self._keeping_up.add_step(event.step, step_s)
        yield from self._refusals.watch(event)
        if not self._refusals.are_too_many:
            return True
        if self._plan.on_nonfinite == "stop" or self._retreat.is_exhausted:
            finding = self._refusals.last_finding(event, find_sick(self._state.ranks, bool(own_is_finite)))
            yield finding
            yield self._finished("diverged")
            raise DivergedError(f"{finding.symptom}: {finding.evidence}. {finding.remedy}")
        yield from self._go_back(self._refusals.trouble(event))
        return False

    def _at_intervals(self, *, is_last: bool) -> Iterator[Event]:
        yield from self._milestones.look()
        due = self._milestones.due(self._state.progress.step, is_last=is_last)
        if due:
            if not (yield from self._drain()):
                return
            yield from self._milestones.reach(due)
            if not is_last:
                self._rests.take()
            # The next step's time starts here: what happened in between has its own seconds.
            self._last_read = time.perf_counter()

    def _end(self) -> FinishReason | None:
        """What all ranks agree on: clocks and signals do not reach each at the same step."""
        return agree_on_end(self._state.ranks, self._own_end())

    def _own_end(self) -> FinishReason | None:
        """Says why the run ends here; asked before each update, so that a resumed run ends where the first would."""
        patience, progress = self._plan.early_stopping_patience, self._state.progress
        if patience is not None and progress.num_evaluations_without_gain >= patience:
            return "early stopping"
        if progress.step >= self._plan.schedule.num_steps:
            return "completed"
        if self._plan.max_hours is not None and self._elapsed() > 3600 * self._plan.max_hours * _OVERTIME:
            return "time limit"
        return self._control.reason if self._control.stop else None

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


def _wait_for(pending: _Pending) -> None:
    if pending.copied is not None:
        pending.copied.synchronize()


def _reserved_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
