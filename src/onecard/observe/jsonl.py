"""The record of a run: one line of JSON per event."""

import logging
import os
from pathlib import Path

from onecard.observe.events import Event
from onecard.observe.lines import to_json_line

log = logging.getLogger("onecard.observe")


class JsonlSink:
    """Appends events to a file that survives a killed process at any moment.

    `truncate_at` is the `num_bytes` that a checkpoint remembered: what came after it is cut off, so that a resumed
    run does not record a step twice. A last line torn by the end of the previous process is dropped. Lines that a full
    disk refuses are kept and written when there is room again.
    """

    def __init__(self, path: Path, truncate_at: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path = path
        # Unbuffered: what a failing disk has taken and what not is known to the byte.
        self._file = path.open("r+b", buffering=0)
        size = path.stat().st_size
        # A machine that lost power may have kept the checkpoint but not the record's last lines.
        self._on_disk = size
        self._unwritten = bytearray()
        self._held: list[Event] | None = None
        self._is_releasing = False
        self._has_warned = False
        self.cut(size if truncate_at is None else truncate_at)

    @property
    def num_bytes(self) -> int:
        """Size of the record with all events received so far, but for those that are held."""
        return self._on_disk + len(self._unwritten)

    def receive(self, event: Event) -> None:
        if self._is_releasing:
            held, self._held, self._is_releasing = self._held or [], None, False
            for one in (event, *held):
                self._append(one)
        elif self._held is not None:
            self._held.append(event)
        else:
            self._append(event)

    def hold(self) -> None:
        """Keeps what comes from now on out of the file until `release`: a checkpoint is being written meanwhile.

        Its event then has the place in the record that it would have had if nobody had trained on meanwhile.
        """
        self._held = []

    def release(self) -> None:
        """Lets the next event go before those that were held, and these after it."""
        self._is_releasing = self._held is not None

    def read(self) -> bytes:
        """The record as it stands, but for events that are held; also where its name leads elsewhere by now.

        Raises:
            OSError: the disk does not give it.
        """
        self._file.seek(0)
        return self._file.read()[: self._on_disk] + bytes(self._unwritten)

    def write_all(self) -> None:
        """Writes what was refused before.

        Raises:
            OSError: it still cannot be written.
        """
        while self._unwritten:
            self._file.seek(self._on_disk)
            num_written = self._file.write(self._unwritten) or 0
            self._on_disk += num_written
            del self._unwritten[:num_written]

    def force_to_disk(self) -> None:
        """Writes what was refused before, and waits until all of it would survive a power failure.

        Raises:
            OSError: it still cannot be written.
        """
        self.write_all()
        os.fsync(self._file.fileno())

    def cut(self, num_bytes: int) -> None:
        """Drops what came after so many bytes: the run stands where it stood then."""
        if self._unwritten and num_bytes > self._on_disk:
            del self._unwritten[num_bytes - self._on_disk :]
            return
        self._unwritten.clear()
        self._on_disk = self._end_of_last_line(min(num_bytes, self._on_disk))
        self._file.truncate(self._on_disk)
        self._file.seek(self._on_disk)

    def close(self) -> None:
        if self._held is not None:
            held, self._held, self._is_releasing = self._held, None, False
            for event in held:
                self._append(event)
        self._file.close()

    def _append(self, event: Event) -> None:
        # Bytes, not text: the record is the same on Windows. A prompt typed in a broken encoding must not end a run.
        self._unwritten += to_json_line(event).encode("utf-8", errors="replace") + b"\n"
        try:
            self.write_all()
        except OSError as error:
            if not self._has_warned:
                log.warning("%s cannot be written (%s): events are kept and written later", self._path, error)
            self._has_warned = True

    def _end_of_last_line(self, size: int) -> int:
        """Position after the last line break before `size`; reads backwards, for records may be large."""
        block = 1 << 16
        end = size
        while end > 0:
            start = max(0, end - block)
            self._file.seek(start)
            position = self._file.read(end - start).rfind(b"\n")
            if position >= 0:
                return start + position + 1
            end = start
        return 0
