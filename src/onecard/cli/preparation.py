"""Progress of building tokenizer and token files."""

import time
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REDRAW_INTERVAL_S = 0.2


class PreparationProgress:
    """Shows each stage as a bar in a terminal and as one line elsewhere; call it with (stage, done, total bytes)."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._stage: str | None = None
        self._bar: tuple[Progress, TaskID] | None = None
        self._redrawn_at = 0.0

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage != self._stage:
            self._start(stage)
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._redrawn_at >= _REDRAW_INTERVAL_S or done_bytes == total_bytes:
            self._redrawn_at = now
            progress, task = self._bar
            progress.update(task, completed=done_bytes, total=total_bytes)
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
        if not self._console.is_interactive:
            self._console.print(f"{stage} ...", markup=False, soft_wrap=True)
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        progress.start()
        self._bar = (progress, progress.add_task(stage, total=None))
