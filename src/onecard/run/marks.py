"""Which checkpoint is best by a task, and the results that say so: beside the checkpoints, for they outlive them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from onecard.checkpoint import folder_of_step
from onecard.evaluation.paired import Items
from onecard.evaluation.task import Result
from onecard.report.record import read_object
from onecard.spec import Score
from onecard.spec.moving import move

_MARK = "best.json"
_RESULTS = "evaluations"


def read_marked_step(root: Path) -> int | None:
    """The step of a run that a task has found best; None where the held-out loss decides, or nothing was found yet."""
    step = read_object(root / _MARK).get("step")
    return step if isinstance(step, int) else None


def write_mark(root: Path, step: int | None, tasks: dict[str, Any]) -> None:
    """Writes down which step is best (None: the held-out loss decides), and what each task found."""
    _write_whole(root / _MARK, {"step": step, "tasks": tasks})


class StoredResults:
    """Results of one task over the same items, by step, in files of the run folder."""

    def __init__(self, root: Path, name: str, *, is_whole: bool) -> None:
        self._folder = root / _RESULTS
        self.name = f"{name}-whole" if is_whole else name
        self.by_step: dict[int, Result] = {}

    def load(self, last_step: int) -> None:
        """Reads what was found until a step, and removes what belongs to steps after it: they will be made anew."""
        self.by_step.clear()
        for path in sorted(self._folder.glob(f"{self.name}-step-*.json")):
            step = int(path.stem.rpartition("-")[2])
            if step > last_step:
                with contextlib.suppress(OSError):  # of a disk that is read-only: it is written anew, or never read
                    path.unlink()
            elif (result := _read(path)) is not None:
                self.by_step[step] = result

    def write(self, step: int) -> None:
        """Writes down what was found at a step.

        Raises:
            OSError: the disk refuses.
        """
        write_result(self._folder / f"{self.name}-{folder_of_step(Path(), step).name}.json", self.by_step[step])


def write_result(path: Path, result: Result) -> None:
    """Writes scores and the items they are made of, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    content = {
        "scores": [score.model_dump(mode="json") for score in result.scores],
        "sums": result.items.sums.tolist(),
        "counts": result.items.counts.tolist(),
        "notes": result.notes,
    }
    _write_whole(path, content)


def _read(path: Path) -> Result | None:
    try:
        content = read_object(path)
        scores = tuple(Score.model_validate(score) for score in content["scores"])
        items = Items(np.array(content["sums"], float), np.array(content["counts"]))
        return Result(scores, items, tuple(content["notes"]))
    except (ValueError, KeyError, TypeError):
        return None  # measured again


def _write_whole(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    move(beside, path)
