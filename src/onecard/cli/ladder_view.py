"""The ladder of alternatives while it becomes known: eager figures first, compiled ones after, row by row."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onecard.cli.forecast_text import alternative_row, changes_of
from onecard.cli.rows import print_folded, print_rows
from onecard.cli.status import StatusLine
from onecard.units import format_seconds

if TYPE_CHECKING:
    from onecard.spec import Alternative


class LadderView:
    """Shows rows as they come, unless it is `silent`, and keeps the newest of each."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._rows: dict[str, Alternative] = {}
        self._waiting: list[str] = []
        self._status = StatusLine()
        self._has_waited = False

    @property
    def rows(self) -> "list[Alternative]":
        """The newest figures of every row, in the order of the first ones."""
        return list(self._rows.values())

    def show(self, row: "Alternative") -> None:
        """Takes a row; the second one of the same settings replaces the first."""
        is_first = not self._rows
        self._rows[changes_of(row)] = row
        if self._silent:
            return
        self.close()
        if is_first:
            print("\nwhat else there is")
        changed, memory, time, verdict = alternative_row(row)
        print_rows([(f"  {changed:28}", f"{memory:>9}", f"{time:14}", verdict)])
        sys.stdout.flush()

    def on_wait(self, rows: "Sequence[Alternative]", seconds: float) -> None:
        """Says before a row is compiled what is still to come, and for how long."""
        self._waiting = [changes_of(row) for row in rows]
        if self._silent:
            return
        left = f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}, about {format_seconds(seconds)}"
        if not self._has_waited:
            self._has_waited = True
            print()
            print_folded(f"compiled, one by one: {left} in all (Ctrl+C keeps what is here)")
            sys.stdout.flush()
        self._status.tell(f"compiling {self._waiting[0]}; still to come: {left}")

    def finish(self) -> None:
        """Names the rows that were not worth compiling, or could not be."""
        self.close()
        if self._has_waited and (left := self._before_compiling()):
            print_folded(f"not compiled, for it would not make them fit, or cannot be done: {'; '.join(left)}")

    def print_stopped(self) -> None:
        """Says, after Ctrl+C, which rows hold no figures of a compiled step yet."""
        self.close()
        # Those that were about to be compiled, or, earlier than that, all.
        left = self._waiting or self._before_compiling()
        told = f"; still before compiling: {'; '.join(left)}" if left else ""
        print_folded(f"stopped{told}. What is known is remembered: the same command goes on from here", sys.stderr)

    def close(self) -> None:
        """Takes the line about what is going on away."""
        self._status.close()

    def _before_compiling(self) -> list[str]:
        return [changed for changed, row in self._rows.items() if not row.is_refined]
