"""Writes one checkpoint at a time, in a thread where the state is large enough to be worth a copy of it."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from onecard.checkpoint import Parts, write_checkpoint
from onecard.errors import CheckpointError
from onecard.observe.events import SaveReason


@dataclass(frozen=True)
class SaveOrder:
    """A checkpoint to be written; `asked_s` is the moment it was asked for, by the wall clock of this process."""

    step: int
    elapsed_s: float
    target: Path
    reason: SaveReason
    asked_s: float
    num_own_bytes: int


@dataclass(frozen=True)
class SaveResult:
    """What became of it: `problem` where it could not be written, bytes of tensors and seconds where it was."""

    order: SaveOrder
    wait_s: float
    seconds: float
    num_bytes: int = 0
    problem: CheckpointError | None = None


class Saver:
    """Has at most one checkpoint in hand."""

    def __init__(self) -> None:
        self._order: SaveOrder | None = None
        self._thread: threading.Thread | None = None
        self._wait_s = 0.0
        self._outcome: int | Exception = 0
        self._ended_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was begun whose result has not been taken yet."""
        return self._order is not None

    def write(self, order: SaveOrder, parts: Parts) -> SaveResult:
        """Writes a checkpoint here and now."""
        self._write(order, parts)
        return self._result(order, self._ended_s - order.asked_s)

    def begin(self, order: SaveOrder, parts: Parts) -> None:
        """Begins to write a checkpoint whose parts nobody changes, while the caller goes on."""
        assert self._order is None
        self._order = order
        # A daemon: a second Ctrl+C ends the process at once, and what is half written is not read.
        self._thread = threading.Thread(target=self._write, args=(order, parts), name="onecard-save", daemon=True)
        self._thread.start()
        self._wait_s = time.perf_counter() - order.asked_s

    def take(self, *, waits: bool) -> SaveResult | None:
        """Gives the result of the checkpoint in hand; None where there is none, or without `waits` not yet."""
        if self._order is None or self._thread is None or (self._thread.is_alive() and not waits):
            return None
        started = time.perf_counter()
        while self._thread.is_alive():
            self._thread.join(0.1)  # with a limit, so that Ctrl+C is heard on Windows, too
        order, self._order, self._thread = self._order, None, None
        return self._result(order, self._wait_s + time.perf_counter() - started)

    def _write(self, order: SaveOrder, parts: Parts) -> None:
        try:
            self._outcome = write_checkpoint(order.target, parts, order.num_own_bytes)
        except Exception as error:  # told by `take` to the thread that trains
            self._outcome = error
        self._ended_s = time.perf_counter()

    def _result(self, order: SaveOrder, wait_s: float) -> SaveResult:
        # An error that stays would keep what its frames hold.
        (outcome, self._outcome), seconds = (self._outcome, 0), self._ended_s - order.asked_s
        if isinstance(outcome, CheckpointError):
            return SaveResult(order, wait_s, seconds, problem=outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return SaveResult(order, wait_s, seconds, outcome)
