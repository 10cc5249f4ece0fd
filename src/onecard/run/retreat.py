"""The way back: a run whose weights or whose update cannot be trusted stands again where a good checkpoint stood.

    save 100 ── save 200 ── … 230, 231, 232: refused, one after the other
                   ▲────────────────────────┘
                   skip         goes on with the samples after those of step 232
                   lower_rate   sees the same samples again at half the learning rate

The same is done where memory runs out while an update is applied. All of it happens in place: the device has no room
for a second model. If going back did not help, the next time leads to the checkpoint before that one.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from onecard.checkpoint import (
    Checkpoint,
    folder_of_step,
    is_checkpoint,
    list_checkpoints,
    read_checkpoint,
    step_of_folder,
)
from onecard.errors import CheckpointError, DoesNotFitError
from onecard.model.folder import is_finite
from onecard.model.shortage import Shortage, attempt, is_out_of_memory
from onecard.observe.events import Event, RecoveredEvent, RecoveredProblem, SavedEvent, StepEvent
from onecard.observe.jsonl import JsonlSink
from onecard.observe.lines import parse_event
from onecard.run.clock import Clock
from onecard.run.disk_loss import is_share_lost
from onecard.run.feed import Feed
from onecard.run.folder import RunFolder
from onecard.run.milestones import Milestones
from onecard.run.retention import set_aside_after
from onecard.spec.fallback import settings_in_force
from onecard.training.assemble import start_again
from onecard.training.snapshot import restore
from onecard.training.state import Progress, TrainState

log = logging.getLogger("onecard.run")

# Without an update in between that helped: an older checkpoint each time.
MAX_RETREATS = 3
_LOWER = 0.5


@dataclass(frozen=True)
class Trouble:
    """Why a run goes back from a step; `is_poisoned` means that the weights before it are not to be trusted either."""

    problem: RecoveredProblem
    during: str
    evidence: str
    is_poisoned: bool
    step: int
    held_bytes: dict[str, int] = field(default_factory=dict)


class Retreat:
    """Puts a running state, its record and its batches back to where a checkpoint stood, or to the beginning."""

    def __init__(
        self, state: TrainState, folder: RunFolder, record: JsonlSink, feed: Feed, milestones: Milestones, clock: Clock
    ) -> None:
        self._state = state
        self._folder = folder
        self._record = record
        self._feed = feed
        self._milestones = milestones
        self._elapsed = clock

    @property
    def is_exhausted(self) -> bool:
        """Whether going back has been tried often enough."""
        progress = self._state.progress
        return progress.num_retreats >= MAX_RETREATS and not self._has_helped(
            list_checkpoints(self._folder.checkpoints)
        )

    def go_back(self, trouble: Trouble) -> Iterator[Event]:
        """Goes back and says so; the record is cut where the checkpoint's was, as by a resume."""
        yield from self._milestones.look(waits=True)
        failed = self._state.progress
        # First: on a GPU going back would need more memory than what has just failed.
        self._state.optimizer.forget_gradients()
        checkpoint = self._restored(trouble)
        progress = self._state.progress
        progress.num_retreats = self._count(failed, checkpoint)
        progress.failed_step, progress.retreat_step = trouble.step, progress.step
        progress.num_refused_in_a_row = 0
        remedy = f"back to step {progress.step}"
        if trouble.problem == "not finite":
            remedy += f", {self._change_course(failed, trouble)}"
        self._state.is_updating = False
        self._cut_after(checkpoint)
        before = self._folder.plan(checkpoint.folder if checkpoint is not None else None)
        self._feed.reopen()
        self._milestones.go_back()
        yield from self._milestones.catch_up(saved_event(self._state, checkpoint))
        yield RecoveredEvent(
            step=progress.step,
            elapsed_s=self._elapsed(),
            problem=trouble.problem,
            during=trouble.during,
            evidence=trouble.evidence,
            remedy=remedy,
            # Also those whose own event has just been cut off: they stay.
            settings=settings_in_force(before, self._state.plan),
            held_bytes=trouble.held_bytes,
            returned_from=trouble.step,
            position=progress.position,
        )

    def _cut_after(self, checkpoint: Checkpoint | None) -> None:
        """Sets aside what was saved and recorded since a checkpoint.

        Raises:
            CheckpointError: the disk refuses; a resume does it again.
        """
        # The beginning is a checkpoint that was never written.
        folder = checkpoint.folder if checkpoint is not None else folder_of_step(self._folder.checkpoints, 0)
        try:
            set_aside_after(folder)
            self._record.cut(recorded_bytes(checkpoint) if checkpoint is not None else 0)
        except OSError as error:
            raise CheckpointError(
                f"the run went back to step {step_of_folder(folder)}, and what came after it cannot be set aside "
                f"({error}). No checkpoint is lost: see to the disk, then go on with `onecard resume "
                f"{self._folder.root}`"
            ) from error

    def _change_course(self, failed: Progress, trouble: Trouble) -> str:
        progress = self._state.progress
        if self._state.plan.on_nonfinite == "lower_rate":
            progress.rate_factor = failed.rate_factor * _LOWER
            return f"at {progress.rate_factor:g} of the learning rate"
        # On a GPU another step has been launched before this one was read.
        position = failed.position - (failed.step - trouble.step) * self._state.plan.total_batch_size
        num_skipped = position - progress.position
        progress.position, progress.rate_factor = position, failed.rate_factor
        # As PaLM's makers did, whose spikes came from samples and weights together (arXiv 2204.02311, section 5.1).
        return f"going on after the {num_skipped} samples that led here"

    def _count(self, failed: Progress, checkpoint: Checkpoint | None) -> int:
        has_helped = checkpoint is not None and step_of_folder(checkpoint.folder) > failed.failed_step
        return 1 if has_helped else failed.num_retreats + 1

    def _has_helped(self, found: list[Path]) -> bool:
        """Whether a checkpoint lies behind the step from which the run went back the last time."""
        failed_step = self._state.progress.failed_step
        return any(step_of_folder(folder) > failed_step and _was_finite(folder) for folder in found)

    def _restored(self, trouble: Trouble) -> Checkpoint | None:
        found = attempt(partial(self._restore, trouble), self._state.device)
        if isinstance(found, Shortage):
            # That there is no memory to read them says nothing against the checkpoints: they stay as they are.
            raise DoesNotFitError(
                f"memory ran out while the run went back from step {trouble.step} to a checkpoint ({found.evidence}): "
                "close what else uses the memory, and resume; no checkpoint is lost"
            )
        return found

    def _restore(self, trouble: Trouble) -> Checkpoint | None:
        """Restores the newest checkpoint that is whole and good; None where the run had to begin again.

        Raises:
            CheckpointError: those that are there cannot be read, or they are gone.
        """
        # As at a resume: a run whose checkpoints cannot be read must not look like one that has yet to begin.
        problem: Exception | None = None
        try:
            self._folder.refuse_lost_checkpoints()
        except (CheckpointError, OSError) as error:
            problem = error
        for folder in self._candidates(trouble):
            try:
                checkpoint = read_checkpoint(folder)
                restore(self._state, checkpoint)
                recorded_bytes(checkpoint)
            except (CheckpointError, OSError) as error:
                if is_out_of_memory(error):  # of a page file that is full a system tells as of a file
                    raise
                problem = error
                if is_share_lost(error):
                    break
                log.warning("%s. Going back further", error)
                continue
            if all(map(is_finite, self._state.optimizer.masters.values())):
                return checkpoint
        problem = problem or self._find_loss(trouble)
        if problem is not None:
            raise CheckpointError(
                f"the run has to go back from step {trouble.step} ({trouble.evidence}), and cannot: {problem}. Nothing "
                f"was set aside: see to the disk, then go on with `onecard resume {self._folder.root}`"
            ) from problem
        start_again(self._state)
        return None

    def _find_loss(self, trouble: Trouble) -> Exception | None:
        """Says that the checkpoint to go back to, which was saved, is gone; None where none was.

        A share that vanished may be an empty folder by now, in which only the newest was saved.
        """
        try:
            name = last_saved(self._record.read(), is_good=trouble.is_poisoned)
        except OSError as error:
            return error
        if name is None or is_checkpoint(self._folder.checkpoints / name):
            return None
        return CheckpointError(f"{self._folder.checkpoints / name} was saved and is gone: restore it")

    def _candidates(self, trouble: Trouble) -> list[Path]:
        """Checkpoints to go back to, the best choice first."""
        newest_first = list_checkpoints(self._folder.checkpoints)[::-1]
        if not trouble.is_poisoned:
            return newest_first
        # One that cannot be read may be good: that is told where it is tried.
        good = [folder for folder in newest_first if _was_finite(folder) is not False]
        progress = self._state.progress
        if progress.num_retreats == 0 or self._has_helped(good):
            return good
        older = [folder for folder in good if step_of_folder(folder) < progress.retreat_step]
        # Where there is none further back: the same again rather than to lose all.
        return older or good


def _was_finite(folder: Path) -> bool | None:
    """Whether the updates before a checkpoint were applied; None where it cannot be read."""
    try:
        progress = Checkpoint(folder, 0).document("progress")
    except (OSError, ValueError):
        return None
    return progress.get("num_refused_in_a_row") == 0 if isinstance(progress, dict) else None


def recorded_bytes(checkpoint: Checkpoint) -> int:
    """How long the record was when a checkpoint was written.

    Raises:
        CheckpointError: it does not say so.
    """
    record = checkpoint.document("record")
    if isinstance(record, dict) and isinstance(record.get("events_bytes"), int) and record["events_bytes"] >= 0:
        return int(record["events_bytes"])
    raise CheckpointError(
        f"{checkpoint.folder}/record.json does not say how far the record went: delete this folder and resume from the "
        "checkpoint before it"
    )


def last_saved(record: bytes, *, is_good: bool) -> str | None:
    """Name of the last checkpoint that a record tells of; `is_good`: of those after an update that was applied."""
    found, is_applied = None, True
    for line in record.splitlines():
        if not line.startswith((b'{"event": "step"', b'{"event": "saved"')):
            continue
        try:
            event = parse_event(line.decode("utf-8"))
        except (CheckpointError, UnicodeDecodeError):  # a damaged line; the report counts them
            continue
        if isinstance(event, StepEvent):
            is_applied = event.is_finite
        elif isinstance(event, SavedEvent) and (is_applied or not is_good):
            found = event.checkpoint
    return found


def saved_event(state: TrainState, checkpoint: Checkpoint | None) -> SavedEvent | None:
    """The event of the checkpoint itself, which the record was cut before."""
    if checkpoint is None:
        return None
    reason = checkpoint.document("record")["reason"]
    return SavedEvent(
        step=state.progress.step,
        elapsed_s=state.progress.elapsed_s,
        checkpoint=checkpoint.folder.name,
        reason=reason,
        num_bytes=checkpoint.num_tensor_bytes,
        seconds=0.0,
    )


class NoRetreat(Retreat):
    """Several ranks do not go back in place: they end together, and are started again from a checkpoint."""

    def __init__(self) -> None:
        pass

    @property
    def is_exhausted(self) -> bool:
        return True
