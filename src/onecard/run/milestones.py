"""What happens at intervals: evaluation, samples, checkpoints."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from onecard.checkpoint import folder_of_step
from onecard.data import TrainingData
from onecard.model.generate import Sampling, complete
from onecard.model.shortage import Shortage
from onecard.observe.events import (
    CLOCK_REASONS,
    EvaluatedEvent,
    Event,
    FinishReason,
    Sample,
    SampledEvent,
    SavedEvent,
    SaveReason,
)
from onecard.run.answers import answer
from onecard.run.crew import Crew
from onecard.run.judge import Judge
from onecard.run.recovery import Instead, Recovery
from onecard.run.retention import saved_reason
from onecard.spec import Plan

_SAMPLE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Due:
    """What a step asks for."""

    evaluates: bool
    samples: bool
    saves: bool
    is_last: bool
    saves_by_clock: bool = False

    def __bool__(self) -> bool:
        return self.evaluates or self.samples or self.saves or self.saves_by_clock


class Keeper(Protocol):
    """What keeps the checkpoints of a run; `leading` gives the steps that must stay."""

    root: Path
    leading: Callable[[], set[int]]

    def is_overdue(self) -> bool:
        """Whether the clock asks for a checkpoint."""

    def save(self, reason: SaveReason) -> Iterator[Event]:
        """Writes the state."""

    def settle(self, *, waits: bool = True) -> Iterator[Event]:
        """Tells of a checkpoint that has been written meanwhile."""


class Milestones:
    """Evaluates, samples, saves and judges a state."""

    def __init__(
        self,
        crew: Crew,
        corpus: TrainingData,
        checkpoints: Keeper,
        judge: Judge | None,
    ) -> None:
        self._crew = crew
        self._state = crew.state
        self._corpus = corpus
        self._judge = judge
        self._checkpoints = checkpoints
        if judge is not None:
            checkpoints.leading = judge.kept_steps
        self._elapsed = crew.clock
        self._recovery = Recovery(crew.state, crew.clock)
        self._prompts_at_once = max(1, len(self._plan.sample_prompts))

    @property
    def _plan(self) -> Plan:
        return self._state.plan

    def due(self, step: int, *, is_last: bool) -> Due:
        """What is to be done after `step` updates; all of it after the last."""
        return Due(
            evaluates=self._corpus.has_heldout and (is_last or step % self._plan.eval_steps == 0),
            samples=bool(self._plan.sample_prompts) and (is_last or step % self._plan.sample_steps == 0),
            saves=is_last or step % self._plan.save_steps == 0,
            is_last=is_last,
            saves_by_clock=bool(self._state.ranks.largest(self._checkpoints.is_overdue())),
        )

    def look(self, *, waits: bool = False) -> Iterator[Event]:
        """Tells of a checkpoint that has been written meanwhile, or waits for it."""
        yield from self._checkpoints.settle(waits=waits)

    def reach(self, due: Due) -> Iterator[Event]:
        """Does what is due; a new best is saved even between two intervals, so that it can be kept."""
        # First: an evaluation may find another best, and until it is saved the one before must stay.
        yield from self._checkpoints.settle()
        is_best = False
        if due.evaluates:
            evaluated = yield from self._recovery.insist("evaluation", self._evaluate, self._recovery.shrink_evaluation)
            if evaluated is not None:
                is_best = evaluated.is_best
                yield evaluated
        if due.samples:
            yield from self._sample()
        if due.saves or is_best or due.saves_by_clock:
            reason: SaveReason = "best" if is_best else "clock"
            yield from self._checkpoints.save("final" if due.is_last else "interval" if due.saves else reason)
        if due.saves and self._judge is not None:
            yield from self._checkpoints.settle()
            if self._saved_for() is not None:
                yield from self._judge.score()
        self._crew.rejoin()

    def catch_up(self, saved: SavedEvent | None) -> Iterator[Event]:
        """Tells again of the checkpoint that a run goes on from, and scores it if that was due."""
        if saved is not None and saved.reason not in CLOCK_REASONS:
            yield saved
        if saved is not None and saved.reason in ("interval", "final") and self._judge is not None:
            yield from self._judge.score()
        self._crew.rejoin()

    def finish(self, reason: FinishReason) -> Iterator[Event]:
        """Does what is left to do for a run that ends between two intervals."""
        yield from self._checkpoints.settle()
        saved_for = self._state.ranks.as_leader_says(self._saved_for())
        # One that only the clock or a new best asked for does not count: what is told and scored at the end must not
        # depend on whether it happens to be there.
        if reason == "completed" or saved_for in ("interval", "final") or (saved_for and reason == "interrupted"):
            return
        if reason == "time limit" and saved_for is None:
            yield from self.reach(self.due(self._state.progress.step, is_last=True))
        else:
            yield from self._checkpoints.save("interrupted" if reason == "interrupted" else "final")
            if reason != "interrupted" and self._judge is not None:
                yield from self._judge.score()
            self._crew.rejoin()

    def choose(self, reason: FinishReason) -> Generator[Event, None, FinishReason]:
        """Chooses the best checkpoint of a run that has come to its end; gives `reason`, or `interrupted` meanwhile."""
        if reason == "interrupted":
            return reason
        ended = (yield from self._judge.choose()) if self._judge is not None else None
        self._crew.rejoin()
        return ended or reason

    def go_back(self) -> None:
        """Forgets what was found after the step at which the state stands again."""
        if self._judge is not None:
            self._judge.go_back()

    def _saved_for(self) -> str | None:
        """Why the state as it is was saved; None where it was not."""
        return saved_reason(folder_of_step(self._checkpoints.root, self._state.progress.step))

    def _fewer_prompts(self) -> Instead | None:
        if self._prompts_at_once == 1 or self._state.is_in_parts:  # in parts no rank can try again by itself
            return None
        self._prompts_at_once = -(-self._prompts_at_once // 2)
        return Instead(f"repeated with {self._prompts_at_once} of the prompts at once")

    def _evaluate(self) -> EvaluatedEvent:
        started, plan, progress = time.perf_counter(), self._plan, self._state.progress
        limit = None if plan.eval_batches is None else plan.eval_batches * plan.eval_batch_size
        batches = self._corpus.heldout_batches(plan.max_seq_length, plan.eval_batch_size, limit)
        result = self._crew.measure_heldout_loss(batches)
        progress.heldout_loss = result.loss
        is_best = math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss)
        if is_best:
            progress.best_loss, progress.best_step, progress.num_evaluations_without_gain = (
                result.loss,
                progress.step,
                0,
            )
        else:
            progress.num_evaluations_without_gain += 1
        return EvaluatedEvent(
            step=progress.step,
            elapsed_s=self._elapsed(),
            loss=result.loss,
            bits_per_byte=result.bits_per_byte(
                plan.corpus.num_heldout_target_tokens or plan.corpus.num_heldout_tokens, plan.corpus.heldout_bytes
            ),
            standard_error=result.standard_error,
            num_target_tokens=result.num_target_tokens,
            is_best=is_best,
            seconds=time.perf_counter() - started,
        )

    def _sample(self) -> Iterator[Event]:
        """Writes samples, each rank its share of them; they are the same however many ranks and prompts at once."""
        started, prompts = time.perf_counter(), self._plan.sample_prompts
        own = self._crew.share(range(len(prompts)))
        texts = yield from self._recovery.insist("samples", partial(self._write, own), self._fewer_prompts)
        try:
            completions = self._crew.join(texts)
        except MemoryError as error:
            if texts is not None:  # else it was told
                yield self._recovery.left_out("samples", Shortage(str(error), {}))
            return
        yield SampledEvent(
            step=self._state.progress.step,
            elapsed_s=self._elapsed(),
            samples=tuple(Sample(prompt=p, completion=c) for p, c in zip(prompts, completions, strict=True)),
            seconds=time.perf_counter() - started,
        )

    def _write(self, indices: Sequence[int]) -> list[str]:
        """Writes the samples of some prompts."""
        prompts, size = self._plan.sample_prompts, self._prompts_at_once
        sampling = Sampling(self._plan.sample_max_new_tokens, temperature=_SAMPLE_TEMPERATURE, seed=self._plan.seed)
        write = answer if self._plan.task == "sft" else complete
        model, tokenizer = self._state.model, self._corpus.tokenizer

        def write_all() -> list[str]:
            texts: list[str] = []
            for first in range(0, len(indices), size):
                some = tuple(indices[first : first + size])
                chosen = [prompts[index] for index in some]
                texts += write(model, tokenizer, chosen, replace(sampling, streams=some))
            return texts

        return self._state.inside(write_all)
