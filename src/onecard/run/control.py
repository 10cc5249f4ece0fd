"""What the outside may ask of a running loop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from onecard.observe.events import FinishReason


@dataclass
class Control:
    """Set by whoever watches a run, read by the loop between two steps; `reason` is why it is to stop."""

    stop: bool = False
    reason: FinishReason = "interrupted"


@contextmanager
def stopping_on_signals(control: Control) -> Iterator[None]:
    """Turns the first Ctrl+C or termination signal into `control.stop`; a second Ctrl+C interrupts at once.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if control.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        control.stop = True

    # SIGBREAK: a closed console window on Windows; SIGHUP: a lost connection elsewhere.
    wanted = [signal.SIGINT, signal.SIGTERM]
    wanted += [getattr(signal, name) for name in ("SIGBREAK", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
