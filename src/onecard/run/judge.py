"""Checkpoints of a run in training, scored by tasks with its own model, and the best of them chosen.

save ──► score over a fixed part of the items ──► … ──► end: finalists over all items ──► best.json

Nothing of the training state is touched before the end, so a run that is killed while it scores goes on as if it had
not scored: its checkpoint is scored first.
"""

import contextlib
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onecard.checkpoint import folder_of_step, read_checkpoint
from onecard.errors import CheckpointError
from onecard.evaluation.ranking import rank
from onecard.evaluation.task import Result, Subject, Task
from onecard.model.shortage import Shortage, attempt
from onecard.observe.detectors import as_event, make_finding, phrase
from onecard.observe.events import ChosenEvent, Event, FindingEvent, FinishReason, ScoredEvent
from onecard.run.crew import Crew, InterruptedWorkError
from onecard.run.folder import RunFolder
from onecard.run.marks import StoredResults, write_mark
from onecard.run.retention import remove_surplus
from onecard.run.scores import keep_responses, protocol_of, record_scores
from onecard.run.tasks import RunTask, RunTasks
from onecard.spec import CheckpointScores, Comparison
from onecard.training.assemble import DTYPES

# So many checkpoints are scored over all items of a task.
NUM_FINALISTS = 3
_SIGNIFICANT = 0.05


class Judge:
    """Scores the checkpoints of a run and chooses the best of them."""

    def __init__(self, crew: Crew, folder: RunFolder, tasks: RunTasks) -> None:
        self._crew = crew
        self._state = crew.state
        self._folder = folder
        self._tasks = tasks
        self._clock = crew.clock
        self._control = crew.control
        self._parts = {task.name: StoredResults(folder.root, task.name, is_whole=False) for task in tasks.tasks}
        self._wholes = {task.name: StoredResults(folder.root, task.name, is_whole=True) for task in tasks.tasks}
        tasks.report = crew.refuse_interrupted
        self._found: dict[str, dict[str, Any]] = {}
        self._unwritten: list[tuple[StoredResults, int]] = []
        self.go_back()

    def score(self) -> Iterator[Event]:
        """Scores the model as it is, whose checkpoint has just been written; tells again what was scored before."""
        for task in self._tasks.tasks:
            yield from self._measured(task, task.part, self._parts[task.name], self._state.progress.step)
        yield from self._mark()

    def kept_steps(self) -> set[int]:
        """Steps whose checkpoints may become finalists: those that lead now. None that leads later is among others."""
        return {step for task in self._tasks.tasks for step in self._leading(task)}

    def go_back(self) -> None:
        """Forgets what belongs to steps after the one at which the state stands again."""
        for results in (*self._parts.values(), *self._wholes.values()):
            results.load(self._state.progress.step)
        self._unwritten = [(stored, step) for stored, step in self._unwritten if step <= self._state.progress.step]
        with contextlib.suppress(OSError):  # it is written again with the next score
            write_mark(self._folder.root, self._marked_step(), self._found)

    def choose(self) -> Generator[Event, None, FinishReason | None]:
        """Measures the finalists of each task over all items and marks the best; the model has other weights then.

        Returns `interrupted` where it could not be done to the end.
        """
        for task in self._tasks.tasks:
            yield from self._choose(task)
            if task.name not in self._found and self._control.stop:
                return "interrupted"
        yield from self._mark()
        remove_surplus(self._folder.checkpoints, self._state.plan.save_total_limit, {self._marked_step()})
        return None

    def _choose(self, task: RunTask) -> Iterator[Event]:
        parts, wholes = self._parts[task.name], self._wholes[task.name]
        steps = self._finalists(task)
        if task.is_part:
            for step in steps:
                if step not in wholes.by_step:
                    try:
                        self._load(step)
                    except CheckpointError as error:
                        yield self._left_out(task, step, error)
                        continue
                yield from self._measured(task, task.whole, wholes, step)
                if self._control.stop:
                    return
            results = {step: wholes.by_step[step] for step in steps if step in wholes.by_step}
        else:
            results = {step: parts.by_step[step] for step in steps}
        if not results:
            return
        step, comparisons = self._rank(task.whole, results, num_looked_at=len(parts.by_step))
        event = self._chosen(task, step, results, comparisons)
        self._found[task.name] = {
            "checkpoint": event.checkpoint,
            "step": step,
            "scores": [score.model_dump(mode="json") for score in results[step].scores],
            "comparisons": [comparison.model_dump(mode="json") for comparison in comparisons],
        }
        yield event

    def _chosen(
        self, task: RunTask, step: int, results: dict[int, Result], comparisons: list[Comparison]
    ) -> ChosenEvent:
        score = next(score for score in results[step].scores if score.name == task.whole.ranks_by)
        return ChosenEvent(
            step=self._state.progress.step,
            elapsed_s=self._clock(),
            task=task.name,
            metric=score.name,
            checkpoint=_name(step),
            value=score.value,
            standard_error=score.standard_error or 0.0,
            n=score.n,
            num_scored=len(self._parts[task.name].by_step),
            finalists=tuple(map(_name, results)),
            undecided=tuple(found.other for found in comparisons if found.corrected_p_value >= _SIGNIFICANT),
        )

    def _measured(self, task: RunTask, variant: Task, stored: StoredResults, step: int) -> Iterator[Event]:
        started = time.perf_counter()
        if step not in stored.by_step:
            try:
                with self._clock.stopped():
                    result = attempt(partial(self._measure, variant, step), self._state.device)
            except InterruptedWorkError:
                return
            if isinstance(result, Shortage):
                yield self._does_not_fit(task, result)
                return
            stored.by_step[step] = result
            self._unwritten.append((stored, step))
            yield from self._write()
        yield self._scored(task, stored, step, time.perf_counter() - started)

    def _write(self) -> Iterator[Event]:
        """Writes down what was found, and what a disk has refused before."""
        root = self._folder.root
        while self._unwritten:
            stored, step = self._unwritten[0]
            result, name = stored.by_step[step], _name(step)
            try:
                stored.write(step)
                keep_responses(root, f"{stored.name}-{name}", result)
                record_scores(root, CheckpointScores(name=name, step=step, scores=result.scores))
            except OSError as error:
                yield self._not_written(phrase("score-of", name=name, task=stored.name, error=error))
                return
            self._unwritten.pop(0)

    def _measure(self, task: Task, step: int) -> Result:
        self._crew.refuse_interrupted(0, 0)
        plan = self._state.plan
        folder = folder_of_step(self._folder.checkpoints, step)
        protocol = protocol_of(folder, DTYPES[plan.precision], plan.device)
        if plan.adapt is not None:
            protocol["adapter"] = "attached"
        try:
            return task.measure(Subject(self._state.model, self._crew.tokenizer, protocol, self._crew.perform))
        finally:
            if self._state.device.type == "cuda":
                torch.cuda.empty_cache()  # pieces of a cache of keys and values would be in the way of training

    def _scored(self, task: RunTask, stored: StoredResults, step: int, seconds: float) -> ScoredEvent:
        result, variant = stored.by_step[step], task.whole
        scores = {score.name: score for score in result.scores}
        ranked, _ = self._rank(variant, {s: found for s, found in stored.by_step.items() if s <= step})
        return ScoredEvent(
            step=self._state.progress.step,
            elapsed_s=self._clock(),
            checkpoint=_name(step),
            task=task.name,
            metric=variant.ranks_by,
            scores={name: score.value for name, score in scores.items()},
            standard_error=scores[variant.ranks_by].standard_error or 0.0,
            n=scores[variant.ranks_by].n,
            is_whole=stored is self._wholes[task.name],
            is_best=ranked == step,
            seconds=seconds,
        )

    def _does_not_fit(self, task: RunTask, shortage: Shortage) -> FindingEvent:
        finding = make_finding("score-left-out", f"{task.name}: {shortage.evidence}", "")
        return as_event(finding, self._state.progress.step, self._clock())

    def _left_out(self, task: RunTask, step: int, error: CheckpointError) -> FindingEvent:
        finding = make_finding("finalist-damaged", phrase("led-by", name=_name(step), task=task.name, error=error), "")
        return as_event(finding, self._state.progress.step, self._clock())

    def _not_written(self, evidence: str) -> FindingEvent:
        finding = make_finding("score-not-written", evidence, "")
        return as_event(finding, self._state.progress.step, self._clock())

    def _rank(self, task: Task, results: dict[int, Result], num_looked_at: int = 0) -> tuple[int, list[Comparison]]:
        steps = sorted(results)
        best, comparisons = rank(
            task.ranks_by,
            [_name(step) for step in steps],
            [results[step].items for step in steps],
            is_lower_better=task.is_lower_better,
            num_looked_at=num_looked_at,
            is_last_chosen=num_looked_at > 0,
        )
        return steps[best], comparisons

    def _leading(self, task: RunTask) -> list[int]:
        """The steps that score best over the part of the items, the best first; of equals the earlier."""
        remaining, found = dict(self._parts[task.name].by_step), list[int]()
        while remaining and len(found) < NUM_FINALISTS:
            best, _ = self._rank(task.part, remaining)
            found.append(best)
            del remaining[best]
        return found

    def _finalists(self, task: RunTask) -> list[int]:
        """Of the leading steps those that are not significantly worse than the best, in their order."""
        results, leading = self._parts[task.name].by_step, self._leading(task)
        if not leading:
            return []
        best, comparisons = self._rank(task.part, results)
        p_values = {found.other: found.corrected_p_value for found in comparisons}
        return sorted(step for step in leading if step == best or p_values[_name(step)] >= _SIGNIFICANT)

    def _load(self, step: int) -> None:
        """Puts the weights of a checkpoint into the model, on all ranks.

        Raises:
            CheckpointError: it is damaged, or holds another model.
        """
        folder = folder_of_step(self._folder.checkpoints, step)
        read_checkpoint(folder)  # a wrong bit in a weight would be measured as the model
        self._crew.load_weights(folder)

    def _marked_step(self) -> int | None:
        """The step that is best by the task which decides: as chosen, else the one that leads."""
        task = next((task for task in self._tasks.tasks if task.name == self._tasks.metric), None)
        if task is None:
            return None
        if (found := self._found.get(task.name)) is not None:
            return int(found["step"])
        return next(iter(self._leading(task)), None)

    def _mark(self) -> Iterator[Event]:
        try:
            write_mark(self._folder.root, self._marked_step(), self._found)
        except OSError as error:
            yield self._not_written(phrase("which-best", error=error))


def _name(step: int) -> str:
    return folder_of_step(Path(), step).name
