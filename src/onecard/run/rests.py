"""Rests between steps, so that a run leaves the device to the desktop and others for a share of the time."""

import time
from collections.abc import Callable

# So soon a run that is to stop wakes up.
_LONGEST_SLEEP_S = 0.2


class Rests:
    """Sleeps after what was computed, so that computing takes `share` of the time; None, and 1: never.

    What is computed does not change. A rest ends early where `is_stopped` says so.
    """

    def __init__(self, share: float | None, is_stopped: Callable[[], bool]) -> None:
        self.are_taken = share is not None and share < 1
        self._ratio = 1 / (share or 1.0) - 1
        self._is_stopped = is_stopped
        self._ended_s, self._overslept_s = time.perf_counter(), 0.0

    def take(self) -> None:
        """Rests for all that was done since the last rest."""
        if not self.are_taken:
            return
        begun_s = time.perf_counter()
        end_s = begun_s + self._ratio * (begun_s - self._ended_s) - self._overslept_s
        while (left_s := end_s - time.perf_counter()) > 0 and not self._is_stopped():
            time.sleep(min(left_s, _LONGEST_SLEEP_S))
        self._ended_s = time.perf_counter()
        # A sleep is a little longer than asked for, and the next one so much shorter.
        self._overslept_s = max(0.0, self._ended_s - end_s)
