"""The checkpoints of a run in training: when the clock asks for one, how it is written, what is told of it."""

import contextlib
import time
from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerBase

from onecard.checkpoint import folder_of_step
from onecard.observe.events import Event, FindingEvent, SavedEvent, SaveReason
from onecard.observe.jsonl import JsonlSink
from onecard.run.circumstances import circumstances_of
from onecard.run.clock import Clock
from onecard.run.folder import RunFolder
from onecard.run.retention import remove_surplus
from onecard.run.saver import SaveOrder, Saver, SaveResult
from onecard.run.wear import find_wear
from onecard.training.host_copy import LEAST_BYTES_IN_BACKGROUND, HostCopy
from onecard.training.snapshot import TokenizerFiles, snapshot, state_bytes
from onecard.training.state import TrainState

# Before a run gives up its last state: a share may come back, a user may free some space.
_LAST_PAUSES_S = (2.0, 8.0)
_LAST = frozenset({"final", "interrupted"})


class Checkpoints:
    """Saves a state. `record` is written so far; checkpoints say how far that is. `leading` are steps to be kept."""

    def __init__(
        self,
        state: TrainState,
        tokenizer: PreTrainedTokenizerBase,
        folder: RunFolder,
        clock: Clock,
        record: JsonlSink,
    ) -> None:
        self.root = folder.checkpoints
        self.leading: Callable[[], set[int]] = set
        self._state = state
        self._tokenizer = TokenizerFiles(tokenizer)
        self._circumstances = circumstances_of(state.plan, folder.recipe())
        self._elapsed = clock
        self._record = record
        self._saver = Saver()
        self._num_state_bytes = state_bytes(state)
        self._copy = HostCopy() if self._num_state_bytes >= LEAST_BYTES_IN_BACKGROUND else None
        self._saved_at_s = self._begun_at_s = clock()
        self._num_written_bytes = 0
        self._has_told_wear = False

    def is_overdue(self) -> bool:
        """Whether so many minutes of training have passed since the last checkpoint that the clock asks for one."""
        minutes = self._state.plan.save_minutes
        return minutes is not None and self._elapsed() - self._saved_at_s > 60 * minutes

    def save(self, reason: SaveReason) -> Iterator[Event]:
        """Writes the state; a large one in the background, the last one of a run before it returns.

        A disk that refuses is told, and the run goes on with the checkpoints it has.

        Raises:
            CheckpointError: the last state of a run could not be written, several times.
        """
        yield from self.settle()
        started = time.perf_counter()
        progress = self._state.progress
        progress.elapsed_s = self._saved_at_s = self._elapsed()
        target = folder_of_step(self.root, progress.step)
        masters_bytes = sum(tensor.nbytes for tensor in self._state.optimizer.masters.values())
        order = SaveOrder(progress.step, progress.elapsed_s, target, reason, started, masters_bytes)
        with contextlib.suppress(OSError):  # the same disk refuses the checkpoint below, or has room again for both
            self._record.write_all()
        record = {"events_bytes": self._record.num_bytes, "reason": reason}
        documents = {"record": record, "circumstances": self._circumstances}
        if self._copy is not None and reason not in _LAST:
            try:
                parts = snapshot(self._state, self._tokenizer, documents, self._copy)
            except MemoryError:
                self._copy = None  # the memory was planned for; what took it meanwhile costs time, not the run
            else:
                self._record.hold()
                self._saver.begin(order, parts)
                return
        result = self._saver.write(order, snapshot(self._state, self._tokenizer, documents))
        for pause_s in _LAST_PAUSES_S if reason in _LAST else ():
            if result.problem is None:
                break
            time.sleep(pause_s)
            result = self._saver.write(order, snapshot(self._state, self._tokenizer, documents))
        if result.problem is not None and reason in _LAST:
            raise result.problem
        yield from self._tell(result)

    def settle(self, *, waits: bool = True) -> Iterator[Event]:
        """Tells of the checkpoint in hand when it is written, waiting for it if asked to."""
        if (result := self._saver.take(waits=waits)) is not None:
            self._record.release()
            yield from self._tell(result)

    def _tell(self, result: SaveResult) -> Iterator[Event]:
        order = result.order
        if result.problem is not None:
            yield self._describe_failure(order, result.problem)
            return
        plan, progress = self._state.plan, self._state.progress
        remove_surplus(self.root, plan.save_total_limit, {progress.best_step, *self.leading()})
        yield SavedEvent(
            step=order.step,
            elapsed_s=order.elapsed_s,
            checkpoint=order.target.name,
            reason=order.reason,
            num_bytes=result.num_bytes,
            seconds=result.seconds,
            wait_s=result.wait_s,
        )
        self._num_written_bytes += result.num_bytes
        finding = find_wear(self._num_written_bytes, self._elapsed() - self._begun_at_s)
        if finding is not None and not self._has_told_wear:
            self._has_told_wear = True
            yield FindingEvent(step=progress.step, elapsed_s=self._elapsed(), **finding.model_dump())

    def _describe_failure(self, order: SaveOrder, problem: Exception) -> FindingEvent:
        return FindingEvent(
            step=order.step,
            elapsed_s=self._elapsed(),
            symptom=f"checkpoint {order.target.name} could not be written; the run goes on without it",
            evidence=str(problem),
            likely_cause="the disk is full or read-only, or a network share is gone",
            remedy="free some space or bring the disk back before the next checkpoint; until then a crash would repeat "
            "everything since the last one that is whole",
        )
