"""What happens at intervals: evaluation, samples, checkpoints."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from onecard.checkpoint import folder_of_step, write_checkpoint
from onecard.data import TrainingData
from onecard.evaluation.heldout import measure_heldout_loss
from onecard.model.generate import Sampling, complete
from onecard.observe.events import EvaluatedEvent, Event, FinishReason, Sample, SampledEvent, SavedEvent, SaveReason
from onecard.observe.jsonl import JsonlSink
from onecard.run.answers import answer
from onecard.run.clock import Clock
from onecard.run.folder import RunFolder
from onecard.run.judge import Judge
from onecard.spec import Plan
from onecard.training.snapshot import snapshot
from onecard.training.state import TrainState

_SAMPLE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Due:
    """What a step asks for."""

    evaluates: bool
    samples: bool
    saves: bool
    is_last: bool

    def __bool__(self) -> bool:
        return self.evaluates or self.samples or self.saves


class Milestones:
    """Evaluates, samples, saves and judges a state. `record` is written so far; checkpoints say how far that is."""

    def __init__(
        self,
        state: TrainState,
        corpus: TrainingData,
        folder: RunFolder,
        clock: Clock,
        record: JsonlSink,
        judge: Judge | None,
    ) -> None:
        self._state = state
        self._corpus = corpus
        self._judge = judge
        self._folder = folder
        self._elapsed = clock
        self._record = record

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
        )

    def reach(self, due: Due) -> Iterator[Event]:
        """Does what is due; a new best is saved even between two intervals, so that it can be kept."""
        is_best = False
        if due.evaluates:
            evaluated = self._evaluate()
            is_best = evaluated.is_best
            yield evaluated
        if due.samples:
            yield self._sample()
        if due.saves or is_best:
            yield self._save("final" if due.is_last else "interval" if due.saves else "best")
        if due.saves and self._judge is not None:
            yield from self._judge.score()

    def catch_up(self, saved: SavedEvent | None) -> Iterator[Event]:
        """Tells again of the checkpoint that a run goes on from, and scores it if that was due."""
        if saved is None:
            return
        yield saved
        if saved.reason != "best" and self._judge is not None:
            yield from self._judge.score()

    def finish(self, reason: FinishReason) -> Iterator[Event]:
        """Does what is left to do for a run that ends between two intervals."""
        step = self._state.progress.step
        if reason == "completed" or folder_of_step(self._folder.checkpoints, step).exists():
            return
        if reason == "time limit":
            yield from self.reach(self.due(step, is_last=True))
        else:
            yield self._save("interrupted" if reason == "interrupted" else "final")
            if reason != "interrupted" and self._judge is not None:
                yield from self._judge.score()

    def choose(self, reason: FinishReason) -> Generator[Event, None, FinishReason]:
        """Chooses the best checkpoint of a run that has come to its end; gives `reason`, or `interrupted` meanwhile."""
        if reason == "interrupted" or self._judge is None:
            return reason
        return (yield from self._judge.choose()) or reason

    def _evaluate(self) -> EvaluatedEvent:
        started, plan, progress = time.perf_counter(), self._plan, self._state.progress
        limit = None if plan.eval_batches is None else plan.eval_batches * plan.eval_batch_size
        batches = self._corpus.heldout_batches(plan.max_seq_length, plan.eval_batch_size, limit)
        result = measure_heldout_loss(self._state.model, self._state.head, batches, plan.attn_implementation)
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

    def _sample(self) -> SampledEvent:
        started, prompts = time.perf_counter(), self._plan.sample_prompts
        sampling = Sampling(self._plan.sample_max_new_tokens, temperature=_SAMPLE_TEMPERATURE, seed=self._plan.seed)
        write = answer if self._plan.task == "sft" else complete
        completions = write(self._state.model, self._corpus.tokenizer, prompts, sampling)
        return SampledEvent(
            step=self._state.progress.step,
            elapsed_s=self._elapsed(),
            samples=tuple(Sample(prompt=p, completion=c) for p, c in zip(prompts, completions, strict=True)),
            seconds=time.perf_counter() - started,
        )

    def _save(self, reason: SaveReason) -> SavedEvent:
        started, progress = time.perf_counter(), self._state.progress
        progress.elapsed_s = self._elapsed()
        target = folder_of_step(self._folder.checkpoints, progress.step)
        record = {"events_bytes": self._record.num_bytes, "reason": reason}
        num_bytes = write_checkpoint(target, snapshot(self._state, self._corpus.tokenizer, record))
        leading = self._judge.kept_steps() if self._judge is not None else set()
        self._folder.remove_surplus(self._plan.save_total_limit, {progress.best_step, *leading})
        return SavedEvent(
            step=progress.step,
            elapsed_s=self._elapsed(),
            checkpoint=target.name,
            reason=reason,
            num_bytes=num_bytes,
            seconds=time.perf_counter() - started,
        )
