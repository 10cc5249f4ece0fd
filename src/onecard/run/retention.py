"""Which checkpoints of a run stay."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from onecard.checkpoint import discard, is_being_read, list_checkpoints, move, remove_leftovers, step_of_folder
from onecard.report.record import read_object

_SUPERSEDED = "superseded-"


def set_aside_after(checkpoint: Path) -> None:
    """Renames checkpoints newer than the one a run continues from: they belong to a record that is cut off."""
    remove_leftovers(checkpoint.parent)
    for folder in list_checkpoints(checkpoint.parent):
        if step_of_folder(folder) > step_of_folder(checkpoint):
            move(folder, unused_name(folder.with_name(_SUPERSEDED + folder.name)))


def remove_surplus(root: Path, limit: int | None, kept_steps: Collection[int | None]) -> None:
    """Removes the oldest beyond `limit`, and what has been overtaken.

    Never those of `kept_steps`, the newest, or one that somebody reads. What only a clock asked for is there against a
    crash: it goes when there is a newer one, and takes no other's place.
    """
    found = list_checkpoints(root)
    if not found:
        return
    clocked = [folder for folder in found if read_object(folder / "record.json").get("reason") == "clock"]
    asked = [folder for folder in found if folder not in clocked]
    surplus = list(clocked)
    if limit is not None:
        free = [folder for folder in asked if folder != found[-1] and step_of_folder(folder) not in kept_steps]
        surplus += free[: max(0, len(asked) - limit)]
    for folder in surplus:
        if folder != found[-1] and step_of_folder(folder) not in kept_steps and not is_being_read(folder):
            discard(folder)
    if limit is not None:
        for folder in _overtaken(root, step_of_folder(found[-1])):
            shutil.rmtree(folder, ignore_errors=True)


def _overtaken(root: Path, step: int) -> list[Path]:
    """Folders once set aside whose step the run has reached again."""
    aside = root.glob(f"{_SUPERSEDED}*")
    return [path for path in aside if (match := re.search(r"step-(\d+)", path.name)) and int(match[1]) <= step]


def unused_name(path: Path) -> Path:
    """This name, or with -2, -3 ... behind it where that is taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
