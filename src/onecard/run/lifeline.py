"""What a training process tells the supervisor above it, and how it learns that the supervisor is gone."""

import _thread
import atexit
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

from onecard.distributed.place import is_follower
from onecard.run.signals import is_ignored
from onecard.run.supervisor import NOTE_VARIABLE, Note


class Lifeline:
    """The worker's end of the line; does nothing in a process that has no supervisor."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._note = Note()

    @classmethod
    def take_up(cls) -> "Lifeline":
        """Begins to listen where a supervisor has started this process."""
        place = os.environ.pop(NOTE_VARIABLE, None)  # popped: processes that the run starts are no workers
        if place is None or is_follower():
            return cls(None)
        lifeline = cls(Path(place))
        atexit.register(lifeline._tell_end)
        threading.Thread(target=_stop_when_alone, name="onecard-lifeline", daemon=True).start()
        return lifeline

    def tell(self, run: Path, max_restarts: int, *, has_begun: bool) -> None:
        """Says which run this is; `has_begun`: whether the checkpoint it goes on from has been chosen for good."""
        note = Note(str(run.absolute()), max_restarts, has_begun)
        if note != self._note:
            self._note = note
            self._write()

    def tell_lost_disk(self) -> None:
        """Says that this process ends because its disk or network share does not answer."""
        self._note = replace(self._note, has_lost_disk=True)
        self._write()

    def _tell_end(self) -> None:
        self._note = replace(self._note, has_ended=True)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        beside = self._path.with_suffix(".partial")
        try:
            beside.write_text(json.dumps(asdict(self._note)), encoding="utf-8")
            beside.replace(self._path)
        except OSError:
            return  # a full disk or a supervisor that is gone: the run itself goes on


def _stop_when_alone() -> None:
    try:
        while os.read(0, 1024):
            pass
    except OSError:
        pass
    # As Ctrl+C: a run in its loop saves and stops, one that is still being prepared ends.
    if sys.platform != "win32" and is_ignored(signal.SIGINT):  # a background job of a shell without job control
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _thread.interrupt_main()
