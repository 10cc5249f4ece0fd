"""Whether the disk has room for what a run will write, looked at before it begins."""

import logging
import platform
import re
import shutil
from pathlib import Path

from onecard.checkpoint import SMALL_FILES_BYTES, list_checkpoints
from onecard.errors import InputError
from onecard.planner.host_memory import checkpoint_bytes
from onecard.spec import Plan
from onecard.units import format_bytes

log = logging.getLogger("onecard.run")


def check_space(root: Path, plan: Plan) -> None:
    """Refuses a disk on which not even one checkpoint has room, and warns of one that will be full.

    Raises:
        InputError: as that; nothing has been written.
    """
    if is_windows_disk_of_wsl(root.absolute(), platform.release()):
        log.warning("%s is a disk of Windows, which is many times slower from WSL: better a folder under ~/", root)
    free, one = shutil.disk_usage(root).free, checkpoint_bytes(plan)
    num_saves = -(-plan.schedule.num_steps // plan.save_steps)
    # The best one is kept beside the newest, and one is written beside them.
    num_kept = min(num_saves, plan.save_total_limit or num_saves) + 2
    needed = max(1, num_kept - len(list_checkpoints(root))) * one + SMALL_FILES_BYTES
    if free < one + SMALL_FILES_BYTES:
        raise InputError(
            f"{root} has {format_bytes(free)} free, and a checkpoint of this run takes "
            f"{format_bytes(one + SMALL_FILES_BYTES)}: free some space, or give an --output_dir on another disk"
        )
    if free < needed:
        log.warning(
            "%s has %s free, and the checkpoints of this run will take up to %s: free some space, or lower "
            "save_total_limit",
            *(root, format_bytes(free), format_bytes(needed)),
        )


def is_windows_disk_of_wsl(path: Path, kernel: str) -> bool:
    """Whether a path under WSL, which its kernel tells, lies on a disk of Windows."""
    return "microsoft" in kernel.lower() and re.match(r"/mnt/[a-z]/", f"{path.as_posix()}/") is not None
