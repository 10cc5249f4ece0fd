"""Keeps the machine from going to sleep while a run trains; the screen may go dark."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# ES_CONTINUOUS | ES_SYSTEM_REQUIRED, and the former alone to end it (SetThreadExecutionState, Win32 API).
_STAY_AWAKE, _AS_BEFORE = 0x80000001, 0x80000000


@contextmanager
def kept_awake() -> Iterator[None]:
    """Asks the system not to sleep by itself in the block; a system that cannot be asked is left alone.

    On Windows for the calling thread, elsewhere by a process of systemd or macOS that ends with this one.
    """
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetThreadExecutionState(_STAY_AWAKE)
        try:
            yield
        finally:
            ctypes.windll.kernel32.SetThreadExecutionState(_AS_BEFORE)
        return
    inhibitor = _start_inhibitor()
    try:
        yield
    finally:
        if inhibitor is not None:
            with contextlib.suppress(OSError):
                inhibitor.terminate()
            inhibitor.wait()


def _start_inhibitor() -> "subprocess.Popen[bytes] | None":
    if sys.platform == "darwin":
        command = ["caffeinate", "-i", "-w", str(os.getpid())]
    elif shutil.which("systemd-inhibit") and os.path.isdir("/run/systemd/system"):  # noqa: PTH112
        # `tail --pid` ends with this process, however that ends, and the inhibition with it.
        words = ["--what=sleep:idle", "--who=onecard", "--why=training", "--mode=block"]
        command = ["systemd-inhibit", *words, "tail", f"--pid={os.getpid()}", "-f", os.devnull]
    else:
        return None
    quiet = subprocess.DEVNULL
    try:
        # Without a right to ask for it systemd-inhibit ends at once, which is no matter.
        return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:
        return None
