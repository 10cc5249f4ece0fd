"""Rows of text in columns."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO


def print_rows(rows: Sequence[tuple[str, ...]], stream: TextIO | None = None) -> None:
    """Prints rows in columns; in a terminal the last column wraps within itself, elsewhere each row is one line."""
    stream = stream or sys.stdout
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    for line in format_rows(rows, width):
        print(line, file=stream)


def format_rows(rows: Sequence[tuple[str, ...]], width: int | None) -> list[str]:
    """Pads all columns but the last, which wraps at `width` characters with a hanging indent; None never wraps."""
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) + 2 for column in columns]
    indent = sum(widths)
    lines: list[str] = []
    for *cells, last in rows:
        start = "".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        # Less than 20 characters beside the indent are harder to read than what the terminal itself wraps.
        if width is None or width - indent < 20:
            lines.append(start + last)
            continue
        wrapped = textwrap.wrap(last, width - indent, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(start + wrapped[0])
        lines += [" " * indent + line for line in wrapped[1:]]
    return [line.rstrip() for line in lines]
