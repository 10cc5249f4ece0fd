"""Removals that others may be in the way of, and what a power failure leaves of folders."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from onecard.spec.moving import move


def discard(folder: Path) -> None:
    """Removes a folder as far as it can be: what somebody has open on Windows stays for the next time.

    The name goes first, so that no half of a checkpoint stands under the name of a whole one.
    """
    doomed = folder
    if not folder.name.startswith("."):
        doomed = folder.with_name(f".{folder.name}.removed.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            move(folder, doomed)
        except OSError:
            return
    shutil.rmtree(doomed, ignore_errors=True)


def force_to_disk(folder: Path) -> None:
    """Waits until everything in a folder would survive a power failure."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        force_names_to_disk(path)


def force_names_to_disk(folder: Path) -> None:
    """Waits until names in a folder would survive a power failure; Windows has no such call for folders."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no fsync of a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
