"""A run folder: what lies where, who may write, which checkpoints stay.

runs/<name>/
  recipe.yaml  plan.json  audit.json (of chats)  versions.jsonl  events.jsonl  checkpoints/step-000500/  tensorboard/
  report.html
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from onecard.checkpoint import list_checkpoints, move, read_checkpoint, step_of_folder
from onecard.errors import CheckpointError, DeviceLostError, InputError, RunBusyError
from onecard.planner.outcomes import Outcome
from onecard.run.disk_loss import is_disk_lost, is_share_lost
from onecard.run.marks import read_marked_step
from onecard.run.retention import SUPERSEDED, find_best, unused_name
from onecard.spec import MaskAudit, Plan, Recipe
from onecard.spec.dump import recipe_to_yaml
from onecard.spec.load import load_recipe
from onecard.spec.paths import locate, make_absolute
from onecard.spec.plan import explain_refusal

log = logging.getLogger("onecard.run")

_RECIPE = "recipe.yaml"
_PLAN = "plan.json"
_OUTCOME = "outcome.json"
_AUDIT = "audit.json"
_DAMAGED = "damaged-"


class RunFolder:
    """Paths and files of one run. Take `lock()` before writing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events = root / "events.jsonl"
        self.checkpoints = root / "checkpoints"

    @classmethod
    def create(cls, root: Path, recipe: Recipe, plan: Plan, audit: MaskAudit | None = None) -> "RunFolder":
        """Makes a new run folder and writes down what will be done, and of chats what counts.

        Raises:
            InputError: the folder already holds a run or other files; nothing is overwritten.
        """
        cls.refuse_taken(root)
        folder = cls(root)
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            (root / _RECIPE).write_text(recipe_to_yaml(make_absolute(recipe)), encoding="utf-8")
            if audit is not None:
                (root / _AUDIT).write_text(audit.model_dump_json(indent=1), encoding="utf-8")
            # Last and in one motion: a folder with a plan is a whole one.
            (root / f".{_PLAN}").write_text(plan.model_dump_json(indent=1), encoding="utf-8")
            move(root / f".{_PLAN}", root / _PLAN)
        except OSError as error:
            folder._remove()
            raise InputError(
                f"run folder {root} cannot be made ({error.strerror or error}): give another --output_dir"
            ) from error
        return folder

    @classmethod
    def refuse_taken(cls, root: Path) -> None:
        """Refuses a folder in which no new run can begin.

        Raises:
            InputError: it holds a run or other files, or is a file.
        """
        if locate(root / _PLAN):
            raise InputError(
                f"{root} already holds a run: continue it with `onecard resume {root}`, or give another --output_dir"
            )
        try:
            if locate(root) and (not root.is_dir() or any(path.name != ".lock" for path in root.iterdir())):
                raise InputError(f"{root} exists and is not empty: give another --output_dir; nothing was changed")
        except OSError as error:
            raise InputError(
                f"run folder {root} cannot be used ({error.strerror or error}): give another --output_dir"
            ) from error

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """Opens an existing run folder.

        Raises:
            InputError: it is none.
        """
        if not (locate(root / _PLAN) and locate(root / _RECIPE)):
            what = "does not exist" if not locate(root) else f"has no {_PLAN} and {_RECIPE}"
            raise InputError(f"{root} is no run folder: it {what}. Run folders lie under runs/ by default")
        return cls(root)

    @property
    def is_whole(self) -> bool:
        """Whether a run was made here: its plan is written last."""
        return locate(self.root / _PLAN) is not None

    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return load_recipe(self.root / _RECIPE)

    def plan(self, checkpoint: Path | None = None) -> Plan:
        """The plan the run was started with, or the one of a checkpoint, with what had to be changed until then."""
        path = (checkpoint or self.root) / _PLAN
        try:
            return Plan.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            copies = [copy for folder in list_checkpoints(self.checkpoints) if (copy := folder / _PLAN) != path]
            remedy = f"copy {copies[-1]} over it" if copies else "start a new run"
            raise CheckpointError(f"{path} cannot be read as a plan ({explain_refusal(error)}): {remedy}") from error

    def audit(self) -> MaskAudit | None:
        """What counts of the chats of the run; None where it trains on text."""
        try:
            return MaskAudit.model_validate_json((self.root / _AUDIT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_outcome(self, outcome: Outcome) -> None:
        """Keeps what the run took beside what was planned."""
        (self.root / _OUTCOME).write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")

    def outcome(self) -> Outcome | None:
        """What the run took beside what was planned; None before its end and where nothing was predicted."""
        try:
            return Outcome(**json.loads((self.root / _OUTCOME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def lock(self) -> FileLock:
        """Takes the folder for this process; released when the process ends, however it ends.

        Raises:
            RunBusyError: another process works in it.
        """
        lock = FileLock(self.root / ".lock", timeout=0)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise RunBusyError(
                f"{self.root} is in use by another onecard process: wait for it, or stop it first"
            ) from error
        except (NotImplementedError, OSError) as error:
            raise InputError(
                f"{self.root} cannot be locked ({error}), so two runs could write into it: some network shares know no "
                "locks, and a disk may be read-only. Give an --output_dir on a local disk"
            ) from error
        return lock

    @contextmanager
    def discarded_unless_begun(self) -> Iterator[None]:
        """Removes a new run folder if what is done in the block fails before anything happened in the run.

        The corrected command may then use the same folder again.
        """
        try:
            yield
        except DeviceLostError:  # another process goes on with it
            raise
        except Exception as error:
            if not (is_disk_lost(error) or self.has_record() or list_checkpoints(self.checkpoints)):
                self._remove()
            raise

    def has_record(self) -> bool:
        """Whether anything has happened in the run."""
        return self.events.exists() and self.events.stat().st_size > 0

    def _remove(self) -> None:
        # On Windows the lock, which is open, stays behind; `create` does not mind it.
        shutil.rmtree(self.root, ignore_errors=True)

    def find_checkpoint(self, which: str) -> Path:
        """Finds the checkpoint `best`, `last` or of a step number.

        Raises:
            CheckpointError: there is none.
        """
        found = list_checkpoints(self.checkpoints)
        if not found:
            raise CheckpointError(
                f"{self.root} has no complete checkpoint yet: let it train until its first one is saved"
            )
        if which == "last":
            return found[-1]
        if which == "best":
            best = self.best_step()
            return next((path for path in found if step_of_folder(path) == best), found[-1])
        matches = [path for path in found if str(step_of_folder(path)) == (which.lstrip("0") or "0")]
        if not matches:
            steps = ", ".join(str(step_of_folder(path)) for path in found)
            raise CheckpointError(f"{self.root} has no checkpoint {which!r}: use best, last, or one of {steps}")
        return matches[0]

    def best_step(self) -> int | None:
        """Step of the checkpoint that is best by the task which decides, else by the held-out loss.

        Where the best one is not there (a full disk, damage), it is the best of those that are, and a warning says so.
        """
        found = list_checkpoints(self.checkpoints)
        if not found:
            return None
        marked = read_marked_step(self.root)
        if any(step_of_folder(folder) == marked for folder in found):
            return marked
        try:
            progress = json.loads((found[-1] / "progress.json").read_text(encoding="utf-8"))
            best: int | None = progress["best_step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{found[-1]} is damaged: its progress.json cannot be read ({error}). Name another by its step"
            ) from error
        if best is None or any(step_of_folder(folder) == best for folder in found):
            return best
        there = find_best(found) or found[-1]
        log.warning("step %d, the best of %s, has no checkpoint: %s is the best there is", best, self.root, there.name)
        return step_of_folder(there)

    def find_resumable(self) -> Path | None:
        """The newest checkpoint that is whole; damaged newer ones are set aside. None before the first one.

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged, or their share does not answer.
        """
        self.refuse_lost_checkpoints()
        damaged: dict[Path, str] = {}
        problem: CheckpointError | None = None
        for folder in reversed(list_checkpoints(self.checkpoints)):
            try:
                read_checkpoint(folder)
            except CheckpointError as error:
                if is_share_lost(error):  # or the newest would be set aside for one that is read when it is back
                    raise
                damaged[folder] = str(error)
                problem = error
                continue
            # Not before a whole one is found: a run without any must not look like one that has yet to begin.
            for other, reason in damaged.items():
                aside = unused_name(other.with_name(_DAMAGED + other.name))
                move(other, aside)
                log.warning("%s. It is now %s; going on from %s", reason, aside.name, folder.name)
            return folder
        if damaged:
            raise CheckpointError("\n".join(damaged.values())) from problem
        return None

    def refuse_lost_checkpoints(self) -> None:
        """Refuses a run whose checkpoints are gone: it must not look like one that has yet to begin.

        Raises:
            CheckpointError: as that; says what is missing.
        """
        if list_checkpoints(self.checkpoints):
            return
        torn = sorted(path.name for path in self.checkpoints.glob("step-*"))
        if torn:
            raise CheckpointError(
                f"{self.checkpoints} holds {', '.join(torn)}, but no manifest in any of them, so none can be trusted: "
                "restore them, or start a new run"
            )
        saved = self._last_saved()
        # A run that is killed on its way back to its beginning has set them all aside, and its record not yet cut.
        if saved is not None and not any(self.checkpoints.glob(f"{SUPERSEDED}{saved}*")):
            raise CheckpointError(
                f"{self.root} has saved checkpoints, but {self.checkpoints} holds none any more: restore them, or "
                "start a new run"
            )

    def _last_saved(self) -> str | None:
        """The name of the last checkpoint that the record tells of."""
        record = self.events.read_bytes() if self.has_record() else b""
        told = re.findall(rb'^\{"event": "saved".*?"checkpoint": "(step-\d+)"', record, re.MULTILINE)
        return told[-1].decode() if told else None


def free_folder(root: Path) -> Path:
    """Makes and returns a folder of this name, or with -2, -3 ... behind it where that is taken."""
    candidate, number = root, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = root.with_name(f"{root.name}-{number}")
