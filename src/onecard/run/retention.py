"""Which checkpoints of a run stay."""

import math
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from onecard.checkpoint import discard, is_being_read, list_checkpoints, move, remove_leftovers, step_of_folder
from onecard.report.record import read_object

SUPERSEDED = "superseded-"


def set_aside_after(checkpoint: Path) -> None:
    """Renames checkpoints newer than the one a run continues from: they belong to a record that is cut off."""
    remove_leftovers(checkpoint.parent)
    for folder in list_checkpoints(checkpoint.parent):
        if step_of_folder(folder) > step_of_folder(checkpoint):
            move(folder, unused_name(folder.with_name(SUPERSEDED + folder.name)))


def remove_surplus(root: Path, limit: int | None, kept_steps: Collection[int | None]) -> None:
    """Removes the oldest beyond `limit`, and what has been overtaken.

    Never those of `kept_steps`, the newest, the best that is there, or one that somebody reads. What only a clock asked
    for is there against a crash: it goes when there is a newer one, and takes no other's place.
    """
    found = list_checkpoints(root)
    if not found:
        return
    kept = [folder for folder in found if step_of_folder(folder) in kept_steps]
    kept += [found[-1], find_best(found) or found[-1]]
    clocked = [folder for folder in found if saved_reason(folder) == "clock"]
    asked = [folder for folder in found if folder not in clocked]
    surplus = list(clocked)
    if limit is not None:
        free = [folder for folder in asked if folder not in kept]
        surplus += free[: max(0, len(asked) - limit)]
    for folder in surplus:
        if folder not in kept and not is_being_read(folder):
            discard(folder)
    if limit is not None:
        for folder in _overtaken(root, step_of_folder(found[-1])):
            shutil.rmtree(folder, ignore_errors=True)


def saved_reason(folder: Path) -> str | None:
    """Why a checkpoint was written; None where there is none."""
    return read_object(folder / "record.json").get("reason")


def find_best(found: Sequence[Path]) -> Path | None:
    """The one of these checkpoints with the least held-out loss, of equals the earliest; None where none knows any.

    Not what the newest says is best: that one may never have reached the disk.
    """
    losses = {folder: read_object(folder / "progress.json").get("heldout_loss") for folder in found}
    known = [(loss, folder) for folder, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _overtaken(root: Path, step: int) -> list[Path]:
    """Folders once set aside whose step the run has reached again."""
    aside = root.glob(f"{SUPERSEDED}*")
    return [path for path in aside if (match := re.search(r"step-(\d+)", path.name)) and int(match[1]) <= step]


def unused_name(path: Path) -> Path:
    """This name, or with -2, -3 ... behind it where that is taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
