"""Progress of building tokenizer and token files."""

import time
from typing import TYPE_CHECKING, Self, TextIO

from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REDRAW_INTERVAL_S = 0.2
# Where lines are printed, not redrawn.
_LINE_INTERVAL_S = 10.0
# What is counted in other units than bytes.
_UNITS = {"preparing chats": "conversations"}


class PreparationProgress:
    """Shows each stage with its rate and the time left: as a bar in a terminal, elsewhere as lines, seldom.

    Call it with (stage, done, total or None), in bytes, of chats in conversations.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._stage: str | None = None
        self._bar: tuple[Progress, TaskID] | None = None
        self._began_at = self._shown_at = 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self._start(stage)
        now = time.monotonic()
        if self._bar is None:
            if now - self._shown_at >= _LINE_INTERVAL_S:
                self._shown_at = now
                self._print(f"{stage}: {self._describe(done, total, now)}")
        elif now - self._shown_at >= _REDRAW_INTERVAL_S or done == total:
            self._shown_at = now
            progress, task = self._bar
            progress.update(task, completed=done, total=total, told=self._describe(done, total, now))
            progress.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last bar as it stands."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _start(self, stage: str) -> None:
        self.close()
        self._stage = stage
        self._began_at = self._shown_at = time.monotonic()
        if not self._console.is_interactive:
            self._print(f"{stage} ...")
            return
        from rich.progress import BarColumn, Progress, TextColumn

        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}", markup=False),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        progress.start()
        self._bar = (progress, progress.add_task(stage, total=None, told=""))

    def _describe(self, done: int, total: int | None, now: float) -> str:
        unit = _UNITS.get(self._stage or "")
        amount = format_count if unit else format_bytes
        rate = done / max(1e-9, now - self._began_at)
        parts = [amount(done) if total is None else f"{amount(done)} of {'about ' if unit else ''}{amount(total)}"]
        if unit:
            parts[0] += f" {unit}"
        if rate:
            parts.append(f"{amount(round(rate))}/s")
        if rate and total is not None:
            parts.append(f"{format_seconds((total - done) / rate)} left")
        return ", ".join(parts)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
