"""Rows of text in columns, and lines, as wide as the terminal."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

# Less than this beside the indent is harder to read than a line of its own.
_LEAST_WIDTH = 20
_INDENT = 4


def print_rows(rows: Sequence[tuple[str, ...]], stream: TextIO | None = None) -> None:
    """Prints rows in columns; in a terminal the last column wraps within itself, elsewhere each row is one line."""
    stream = stream or sys.stdout
    for line in format_rows(rows, width_of(stream)):
        print(line, file=stream)


def print_folded(line: str, stream: TextIO | None = None) -> None:
    """Prints a line; in a terminal it wraps at words, and goes on further in."""
    stream = stream or sys.stdout
    indent = len(line) - len(line.lstrip())
    print("\n".join(_fold(line.strip(), width_of(stream), " " * indent, " " * (indent + _INDENT))), file=stream)


def width_of(stream: TextIO) -> int | None:
    """Characters in a line of a terminal; None where a stream is none, and lines stay whole."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def format_rows(rows: Sequence[tuple[str, ...]], width: int | None) -> list[str]:
    """Pads all columns but the last, which wraps at `width` characters with a hanging indent; None never wraps.

    Where the others leave no room beside them, the last column stands below them. Rows of which even the others are
    wider than that are left to the terminal.
    """
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) + 2 for column in columns]
    indent = sum(widths)
    lines: list[str] = []
    for *cells, last in rows:
        start = "".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        if width is None or width < indent:
            lines.append(start + last)
        elif width - indent >= _LEAST_WIDTH:
            lines += _fold(last, width, start, " " * indent)
        else:
            lines += [start, *(_fold(last, width, " " * _INDENT, " " * _INDENT) if last else [])]
    return [line.rstrip() for line in lines]


def _fold(text: str, width: int | None, first: str, others: str) -> list[str]:
    if width is None:
        return [first + text]
    # A word that is too long, such as a path, stays whole so that it can be copied.
    wrapper = textwrap.TextWrapper(width, first, others, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [first]
