"""What the outside may ask of a running loop."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from onecard.observe.events import FindingEvent, FinishReason
from onecard.run.signals import take_signals

# CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT (Win32 API).
_WINDOWS_ENDS = (2, 5, 6)
_LONGEST_WAIT_S = 60.0


@dataclass
class Control:
    """Set by whoever watches a run, read by the loop between two steps; `reason` is why it is to stop.

    `finding` is what a detector stops it for.
    """

    stop: bool = False
    reason: FinishReason = "interrupted"
    finding: FindingEvent | None = None


@contextmanager
def stopping_on_signals(control: Control) -> Iterator[None]:
    """Turns the first Ctrl+C or termination signal into `control.stop`; a second Ctrl+C interrupts at once.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    was_asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        # Not `control.stop`, which a detector may have set: then the first Ctrl+C is no second one.
        if was_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        was_asked = control.stop = True

    before = take_signals(handle)
    try:
        with _waiting_at_close(control):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _waiting_at_close(control: Control) -> Iterator[None]:
    """On Windows holds up the end of the process, when its console is closed or the user logs off, until it has saved.

    The system ends a process as soon as its handler returns, and some seconds later anyway.
    """
    if sys.platform != "win32":
        yield
        return
    ended = threading.Event()

    def handle(kind: int) -> bool:
        if kind not in _WINDOWS_ENDS:
            return False
        control.stop = True
        ended.wait(_LONGEST_WAIT_S)
        return True

    handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(handle)
    ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, True)
    try:
        yield
    finally:
        ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, False)
        ended.set()
