"""A line about what is going on, in a terminal only."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status


class StatusLine:
    """Shows on stderr, while something takes its time, what it is; `close` takes the line away."""

    def __init__(self) -> None:
        self._status: Status | None = None

    def tell(self, text: str) -> None:
        """Replaces what the line says."""
        from rich.console import Console
        from rich.text import Text

        console = Console(stderr=True, highlight=False)
        if console.is_interactive:
            self.close()
            self._status = console.status(Text(text))
            self._status.start()

    def close(self) -> None:
        """Takes the line away, so that others can be printed."""
        if self._status is not None:
            self._status.stop()
            self._status = None
