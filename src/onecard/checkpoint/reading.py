"""Who reads a checkpoint while a run may remove old ones: locks of the system, which end with their process."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_MARK = ".reading-{name}-{pid}.lock"


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keeps a run from removing a checkpoint in the block; of a folder that may not be written to, it does nothing."""
    lock = FileLock(folder.parent / _MARK.format(name=folder.name, pid=os.getpid()), timeout=0)
    is_held = False
    if folder.parent.name == "checkpoints":
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            lock.acquire()
            is_held = True
    try:
        yield
    finally:
        if is_held:
            lock.release()
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()


def is_being_read(folder: Path) -> bool:
    """Whether a process reads a checkpoint; marks of processes that have died are removed."""
    is_read = False
    for mark in folder.parent.glob(_MARK.format(name=folder.name, pid="*")):
        lock = FileLock(mark, timeout=0)
        try:
            with lock:
                pass
        except (Timeout, OSError, NotImplementedError):
            is_read = True
            continue
        with contextlib.suppress(OSError):
            mark.unlink()
    return is_read
