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
    """A checkpoint to be written; `asked_s` is the moment it was asked for, by the wall clock of this process.

    `is_good` says that the update before it was applied.
    """

    step: int
    elapsed_s: float
    target: Path
    reason: SaveReason
    asked_s: float
    num_own_bytes: int
    is_good: bool


@dataclass(frozen=True)
class SaveResult:
    """What became of it: `problem` where it could not be written, bytes of tensors and seconds where it was."""

    order: SaveOrder
    wait_s: float
    seconds: float
    num_bytes: int = 0
    problem: CheckpointError | None = None


@dataclass
class _InHand:
    """A checkpoint that was begun, and for how long that kept the training waiting."""

    order: SaveOrder
    parts: Parts
    thread: threading.Thread
    wait_s: float


class Saver:
    """Has at most one checkpoint in hand."""

    def __init__(self) -> None:
        self._in_hand: _InHand | None = None
        self._broken_off: _InHand | None = None
        self._outcome: int | Exception = 0
        self._ended_s = 0.0

    def write(self, order: SaveOrder, parts: Parts) -> SaveResult:
        """Writes a checkpoint here and now."""
        self._write(order, parts)
        return self._result(order, self._ended_s - order.asked_s)

    def begin(self, order: SaveOrder, parts: Parts) -> bool:
        """Begins to write a checkpoint whose parts nobody changes, while the caller goes on.

        Says whether it could: a system may refuse another thread.
        """
        assert self._in_hand is None
        # A daemon: a second Ctrl+C ends the process at once, and what is half written is not read.
        thread = threading.Thread(target=self._write, args=(order, parts), name="onecard-save", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._in_hand = _InHand(order, parts, thread, time.perf_counter() - order.asked_s)
        return True

    def ended(self, *, waits: bool) -> SaveOrder | None:
        """The order in hand whose writing has come to an end; None where there is none, or without `waits` not yet."""
        if self._in_hand is None or (self._in_hand.thread.is_alive() and not waits):
            return None
        started = time.perf_counter()
        while self._in_hand.thread.is_alive():
            self._in_hand.thread.join(0.1)  # with a limit, so that Ctrl+C is heard on Windows, too
        self._in_hand.wait_s += time.perf_counter() - started
        return self._in_hand.order

    def take(self) -> SaveResult:
        """Gives the result of the checkpoint whose writing has ended, or raises the error that broke it off.

        After an error its parts are kept as they were, for `write_again` or until `let_go`.
        """
        assert self._in_hand is not None
        found, self._in_hand = self._in_hand, None
        self._broken_off = found
        result = self._result(found.order, found.wait_s)
        self._broken_off = None
        return result

    def write_again(self) -> SaveResult:
        """Writes the checkpoint that was broken off once more, here and now."""
        assert self._broken_off is not None
        found, started = self._broken_off, time.perf_counter()
        self._write(found.order, found.parts)
        return self._result(found.order, found.wait_s + time.perf_counter() - started)

    def let_go(self) -> None:
        """Drops the parts of a checkpoint that was broken off."""
        self._broken_off = None

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
