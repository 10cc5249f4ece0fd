"""The checkpoints of a run in training: when the clock asks for one, how it is written, what is told of it."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onecard.checkpoint import folder_of_step
from onecard.errors import DoesNotFitError
from onecard.hardware import probe_machine
from onecard.model.shortage import Shortage, attempt
from onecard.observe.detectors import as_event, make_finding
from onecard.observe.events import Event, FindingEvent, SavedEvent, SaveReason
from onecard.observe.jsonl import JsonlSink
from onecard.run.circumstances import circumstances_of
from onecard.run.clock import Clock
from onecard.run.folder import RunFolder
from onecard.run.recovery import Instead, Recovery
from onecard.run.retention import remove_surplus
from onecard.run.saver import SaveOrder, Saver, SaveResult
from onecard.run.wear import find_wear
from onecard.training.host_copy import LEAST_BYTES_IN_BACKGROUND, HostCopy, has_room
from onecard.training.snapshot import TokenizerFiles, snapshot, state_bytes
from onecard.training.state import TrainState
from onecard.units import format_bytes

log = logging.getLogger("onecard.run")

# Before a run gives up its last state: a share may come back, a user may free some space.
_LAST_PAUSES_S = (2.0, 8.0)
_LAST = frozenset({"final", "interrupted"})
_AGAIN = Instead("saved again, with all unused memory given back")


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
        self._recovery = Recovery(state, clock)
        self._is_repeated = False
        # Of a state in parts, gathered whole for the checkpoint in hand.
        self._whole: dict[str, dict[str, Tensor]] | None = None
        self._is_copied = not state.is_in_parts and state_bytes(state) >= LEAST_BYTES_IN_BACKGROUND
        self._copy: HostCopy | None = None
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
            DoesNotFitError: there was no memory to write it.
        """
        yield from self.settle()
        self._whole = self._state.gather()
        started = time.perf_counter()
        progress = self._state.progress
        progress.elapsed_s = self._saved_at_s = self._elapsed()
        target = folder_of_step(self.root, progress.step)
        is_good = progress.num_refused_in_a_row == 0
        masters = self._state.optimizer.masters if self._whole is None else self._whole["masters"]
        masters_bytes = sum(tensor.nbytes for tensor in masters.values())
        order = SaveOrder(progress.step, progress.elapsed_s, target, reason, started, masters_bytes, is_good)
        with contextlib.suppress(OSError):  # the same disk refuses the checkpoint below, or has room again for both
            self._record.force_to_disk()
        record = {"events_bytes": self._record.num_bytes, "reason": reason}
        documents = {"record": record, "circumstances": self._circumstances}
        if reason not in _LAST and self._begin(order, documents):
            return
        yield from self._save_now(order, documents)
        self._whole = None

    def settle(self, *, waits: bool = True) -> Iterator[Event]:
        """Tells of the checkpoint in hand when it is written, waiting for it if asked to."""
        order = self._saver.ended(waits=waits)
        if order is None:
            return
        result = taken = attempt(self._saver.take, self._state.device)
        if isinstance(taken, Shortage):
            result = attempt(self._saver.write_again, self._state.device)
            self._give_up_copy()  # there is no room for it beside the training
        # What comes next has its place before all that happened meanwhile.
        self._record.release()
        if isinstance(result, Shortage):
            yield self._recovery.left_out("checkpoint", result, order.step)
            return
        yield from self._tell(result)
        if isinstance(taken, Shortage) and result.problem is None:
            yield self._recovery.tell("checkpoint", taken, _AGAIN, self._recovery.held(taken), order.step)

    def _host_copy(self) -> HostCopy | None:
        """What a state is copied to; looked for at the first save, when training has taken the memory it needs."""
        if self._is_copied and self._copy is None:
            num_bytes, free_bytes = state_bytes(self._state), probe_machine().free_ram_bytes
            if has_room(num_bytes, free_bytes):
                self._copy = HostCopy()
            else:
                self._is_copied = False
                log.warning(
                    "checkpoints are written while training waits: the host has %s free, and a copy of the state takes "
                    "%s and more",
                    *(format_bytes(free_bytes), format_bytes(num_bytes)),
                )
        return self._copy

    def _give_up_copy(self) -> None:
        """From now on without: memory that was planned for has been taken by something else."""
        self._is_copied = False
        self._saver.let_go()
        if self._copy is not None:
            self._copy.release()
            self._copy = None

    def _begin(self, order: SaveOrder, documents: dict[str, Any]) -> bool:
        """Begins to write in the background; false where there is no copy of the state to write from."""
        copy = self._host_copy()
        if copy is None:
            return False
        parts = attempt(partial(snapshot, self._state, self._tokenizer, documents, copy), self._state.device)
        if isinstance(parts, Shortage):
            self._give_up_copy()
            return False
        if not self._saver.begin(order, parts):
            return False
        self._record.hold()
        return True

    def _save_now(self, order: SaveOrder, documents: dict[str, Any]) -> Iterator[Event]:
        def write() -> SaveResult:
            return self._saver.write(order, snapshot(self._state, self._tokenizer, documents, whole=self._whole))

        self._is_repeated = False
        result = yield from self._recovery.insist("checkpoint", write, self._repeat)
        is_last = order.reason in _LAST
        if result is None:
            if is_last:
                raise DoesNotFitError(
                    f"there is no memory to save step {order.step}: close what else uses it, and resume from the last "
                    "checkpoint"
                )
            return
        for pause_s in _LAST_PAUSES_S if is_last else ():
            if result.problem is None:
                break
            time.sleep(pause_s)
            result = write()
        if result.problem is not None and is_last:
            raise result.problem
        yield from self._tell(result)

    def _repeat(self) -> Instead | None:
        if self._is_repeated:
            return None
        self._is_repeated = True
        return _AGAIN

    def _tell(self, result: SaveResult) -> Iterator[Event]:
        order = result.order
        if result.problem is not None:
            yield self._describe_failure(order, result.problem)
            return
        plan, progress = self._state.plan, self._state.progress
        if order.is_good:  # else the checkpoints that a run may have to go back to are older than this one
            remove_surplus(self.root, plan.save_total_limit, self.leading())
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
            yield as_event(finding, progress.step, self._elapsed())

    def _describe_failure(self, order: SaveOrder, problem: Exception) -> FindingEvent:
        finding = make_finding("checkpoint-not-written", f"{order.target.name}: {problem}", "")
        return as_event(finding, order.step, self._elapsed())
