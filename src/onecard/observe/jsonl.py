"""The record of a run: one line of JSON per event."""

from pathlib import Path

from onecard.observe.events import Event, to_json_line


class JsonlSink:
    """Appends events to a file that survives a killed process at any moment.

    `truncate_at` is the `num_bytes` that a checkpoint remembered: what came after it is cut off, so that a resumed
    run does not record a step twice. A last line torn by the end of the previous process is dropped.
    """

    def __init__(self, path: Path, truncate_at: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        size = path.stat().st_size
        # A machine that lost power may have kept the checkpoint but not the record's last lines.
        self._num_bytes = size
        self.cut(size if truncate_at is None else truncate_at)

    @property
    def num_bytes(self) -> int:
        """Size of the record with all events received so far."""
        return self._num_bytes

    def receive(self, event: Event) -> None:
        # Bytes, not text: the record is the same on Windows. A prompt typed in a broken encoding must not end a run.
        line = to_json_line(event).encode("utf-8", errors="replace") + b"\n"
        self._file.write(line)
        self._file.flush()
        self._num_bytes += len(line)

    def cut(self, num_bytes: int) -> None:
        """Drops what came after so many bytes: the run stands where it stood then."""
        self._num_bytes = self._end_of_last_line(min(num_bytes, self._num_bytes))
        self._file.truncate(self._num_bytes)
        self._file.seek(self._num_bytes)

    def close(self) -> None:
        self._file.close()

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
