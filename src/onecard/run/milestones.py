"""What happens at intervals: evaluation, samples, checkpoints."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

from onecard.checkpoint import folder_of_step, write_checkpoint
from onecard.data import TrainingData
from onecard.errors import DoesNotFitError
from onecard.evaluation.heldout import measure_heldout_loss
from onecard.model.generate import Sampling, complete
from onecard.observe.events import EvaluatedEvent, Event, FinishReason, Sample, SampledEvent, SavedEvent, SaveReason
from onecard.observe.jsonl import JsonlSink
from onecard.run.answers import answer
from onecard.run.clock import Clock
from onecard.run.folder import RunFolder
from onecard.run.judge import Judge
from onecard.run.recovery import Instead, Recovery
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
        self._recovery = Recovery(state, clock)
        self._prompts_at_once = max(1, len(state.plan.sample_prompts))
        self._has_saved_again = False

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
            evaluated = yield from self._recovery.insist("evaluation", self._evaluate, self._recovery.shrink_evaluation)
            if evaluated is not None:
                is_best = evaluated.is_best
                yield evaluated
        if due.samples:
            sampled = yield from self._recovery.insist("samples", self._sample, self._fewer_prompts)
            if sampled is not None:
                yield sampled
        if due.saves or is_best:
            is_saved = yield from self._saved("final" if due.is_last else "interval" if due.saves else "best")
            if is_saved and due.saves and self._judge is not None:
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
            is_saved = yield from self._saved("interrupted" if reason == "interrupted" else "final")
            if is_saved and reason != "interrupted" and self._judge is not None:
                yield from self._judge.score()

    def choose(self, reason: FinishReason) -> Generator[Event, None, FinishReason]:
        """Chooses the best checkpoint of a run that has come to its end; gives `reason`, or `interrupted` meanwhile."""
        if reason == "interrupted" or self._judge is None:
            return reason
        return (yield from self._judge.choose()) or reason

    def go_back(self) -> None:
        """Forgets what was found after the step at which the state stands again."""
        if self._judge is not None:
            self._judge.go_back()

    def _saved(self, reason: SaveReason) -> Generator[Event, None, bool]:
        """Saves, once more where memory ran out; one that is left out is made up for at the next interval.

        Raises:
            DoesNotFitError: the last state of a run could not be saved.
        """
        self._has_saved_again = False
        saved = yield from self._recovery.insist("checkpoint", partial(self._save, reason), self._save_again)
        if saved is not None:
            yield saved
        elif reason not in ("interval", "best"):
            raise DoesNotFitError(
                f"there is no memory to save step {self._state.progress.step}: close what else uses it, and resume "
                "from the last checkpoint"
            )
        return saved is not None

    def _save_again(self) -> Instead | None:
        if self._has_saved_again:
            return None
        self._has_saved_again = True
        return Instead("saved again, with all unused memory given back")

    def _fewer_prompts(self) -> Instead | None:
        if self._prompts_at_once == 1:
            return None
        self._prompts_at_once = -(-self._prompts_at_once // 2)
        return Instead(f"repeated with {self._prompts_at_once} of the prompts at once")

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
        started, prompts, size = time.perf_counter(), self._plan.sample_prompts, self._prompts_at_once
        sampling = Sampling(self._plan.sample_max_new_tokens, temperature=_SAMPLE_TEMPERATURE, seed=self._plan.seed)
        write = answer if self._plan.task == "sft" else complete
        groups = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        model, tokenizer = self._state.model, self._corpus.tokenizer
        completions = [text for group in groups for text in write(model, tokenizer, group, sampling)]
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
