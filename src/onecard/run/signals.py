"""Signals that ask a run to save and stop."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# SIGBREAK: a closed console window on Windows; SIGHUP: a lost connection elsewhere.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


def take_signals(handle: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Lets a function handle them, and gives the handlers before it.

    What this process was started to ignore stays ignored: `nohup` says that a lost connection is no end.
    """
    wanted = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return {number: signal.signal(number, handle) for number in wanted if not is_ignored(number)}


def is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
