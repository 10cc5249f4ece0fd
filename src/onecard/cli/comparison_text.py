"""Runs side by side: a table with a column per run, curves, and in words what sets the best apart."""

import dataclasses
import math
import os
import re
import shutil
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onecard.cli.evaluation_text import SIGNIFICANT, format_gain, format_p, format_score
from onecard.observe.console import printable
from onecard.report.plot import Cell, draw, frame_of
from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from onecard.report.summary import HeldoutPoint, RunSummary
    from onecard.run.compare import RunComparison

_MARKS = string.ascii_uppercase + string.ascii_lowercase
_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue", "bright_white")
_NOTHING = "-"
_WIDEST_CELL = 32
_HASH, _HASH_LENGTH = re.compile("[0-9a-f]{64}"), 12
_PLOT_WIDTHS, _PLOT_HEIGHT = (40, 160), 17
Row = tuple[str, ...]


def comparison_document(comparison: "RunComparison") -> dict[str, Any]:
    """The whole comparison for programs: seconds, bytes, tokens, nats; what is not finite is null."""
    document = dataclasses.asdict(dataclasses.replace(comparison, comparisons=()))
    document["comparisons"] = [entry.model_dump(mode="json") for entry in comparison.comparisons]
    for row in document["scores"]:
        for cell in row["cells"]:
            if cell is not None:
                del cell["items"]
    found = _finite(document)
    assert isinstance(found, dict)
    return found


def print_comparison(comparison: "RunComparison") -> None:
    """Prints table, curves, verdicts and notes; a table that is wider than the terminal comes in several parts."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    # A pipe gets whole lines; COLUMNS says otherwise.
    is_bound = console.is_terminal or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns
    marks = [_MARKS[index % len(_MARKS)] for index in range(len(comparison.runs))]

    def show(line: str, style: str = "") -> None:
        console.print(Text(printable(line, console.encoding), style=style), soft_wrap=True)

    for part in _table_parts(comparison, marks, width if is_bound else None):
        for number, line in enumerate(part):
            show(line, "bold" if number == 0 or not line.startswith(" ") else "")
        show("")
    has_colours = console.color_system is not None and len(marks) <= len(_COLOURS)
    dots = has_colours and console.encoding.lower().startswith("utf")
    for cells in _plot(comparison, marks, width, dots=dots):
        text = Text()
        for character, owner in cells:
            text.append(character, style="" if owner is None else _COLOURS[owner % len(_COLOURS)])
        text.rstrip()
        console.print(text, soft_wrap=True)
    for line in _sentences(comparison):
        show(line)


def _table_parts(comparison: "RunComparison", marks: Sequence[str], width: int | None) -> list[list[str]]:
    """Lines of the table in parts of as many runs as fit side by side."""
    sections = _sections(comparison, marks)
    first = max(len(row[0]) for _, rows in sections for row in rows) + 2
    columns = [
        max(len(row[index + 1]) for _, rows in sections for row in rows) + 2 for index in range(len(comparison.runs))
    ]
    parts: list[list[int]] = [[]]
    for index, size in enumerate(columns):
        if parts[-1] and width is not None and first + sum(columns[i] for i in parts[-1]) + size > width:
            parts.append([])
        parts[-1].append(index)
    return [
        [
            line
            for title, rows in sections
            for line in (
                *([title] if title else []),
                *((row[0].ljust(first) + "".join(row[i + 1].ljust(columns[i]) for i in part)).rstrip() for row in rows),
            )
        ]
        for part in parts
    ]


def _sections(comparison: "RunComparison", marks: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """Titles and rows of the table, a label before the cells; the first row names the runs."""
    header = ("", *(f"{mark} {_shortened(run.name)}" for mark, run in zip(marks, comparison.runs, strict=True)))
    sections: list[tuple[str, list[Row]]] = [("", [header])]
    groups = dict.fromkeys(row.group for row in comparison.differences)
    for group in groups:
        rows = [(f"  {row.name}", *_distinct(row.values)) for row in comparison.differences if row.group == group]
        sections.append((f"settings that differ: {group}", rows))
    if not groups:
        sections.append(("settings that differ: none", []))
    sections.append(("reached", _reached(comparison)))
    if comparison.scores:
        sections.append(("scores", _score_rows(comparison)))
    return sections


def _reached(comparison: "RunComparison") -> list[Row]:
    rows: list[Row] = []
    for label, show in _RUN_ROWS.items():
        cells = [show(run) for run in comparison.runs]
        if any(cell != _NOTHING for cell in cells) or label in _ALWAYS:
            rows.append((f"  {label}", *cells))
    mark = {"loss": "best held-out loss", "bits_per_byte": "best bits per byte"}.get(comparison.measure or "")
    for index, (label, *cells) in enumerate(rows):
        if label.strip() == mark:
            stars = (" *" if run.name == comparison.best else "" for run in comparison.runs)
            rows[index] = (label, *map("".join, zip(cells, stars, strict=True)))
    return rows


def _score_rows(comparison: "RunComparison") -> list[Row]:
    rows: list[Row] = []
    for row in comparison.scores:
        if row.name == "perplexity":  # e to the loss
            continue
        cells = [_NOTHING] * len(row.cells)
        for index, cell in enumerate(row.cells):
            if cell is not None:
                text = format_score(row.name, cell.value, cell.standard_error)
                cells[index] = f"{text} @{cell.step}{' *' if index == row.best else ''}"
        rows.append((f"  {row.label}", *cells))
    return rows


def _point(show: "Callable[[HeldoutPoint], str]", which: str) -> "Callable[[RunSummary], str]":
    def cell(run: "RunSummary") -> str:
        point = getattr(run, which)
        return _NOTHING if point is None else show(point)

    return cell


def _loss(point: "HeldoutPoint") -> str:
    return f"{point.loss:.4f} ± {point.standard_error:.4f}"


def _bits(point: "HeldoutPoint") -> str:
    return _NOTHING if point.bits_per_byte is None else f"{point.bits_per_byte:.4f} ± {point.bits_error:.4f}"


_RUN_ROWS: "Mapping[str, Callable[[RunSummary], str]]" = {
    "state": lambda run: run.state,
    "steps": lambda run: f"{run.steps:,} of {run.num_steps:,}",
    "tokens": lambda run: format_count(run.tokens_seen),
    "last held-out loss": _point(_loss, "last"),
    "best held-out loss": _point(_loss, "best"),
    "best bits per byte": _point(_bits, "best"),
    "at step": _point(lambda point: f"{point.step:,}", "best"),
    "training loss": lambda run: _NOTHING if run.train_loss is None else f"{run.train_loss:.4f}",
    "time": lambda run: format_seconds(run.elapsed_s),
    "tokens/s": lambda run: _NOTHING if run.tokens_per_s is None else format_count(run.tokens_per_s),
    "peak memory": lambda run: _NOTHING if run.peak_bytes is None else format_bytes(run.peak_bytes),
}
_ALWAYS = ("best held-out loss",)


def _distinct(values: Sequence[Any]) -> list[str]:
    """Writes values as cells; long ones without what they begin and end with in common."""
    texts = [_value(value) for value in values]
    if all(len(text) <= _WIDEST_CELL for text in texts):
        return texts
    given = [text for text in texts if text != _NOTHING]
    # The first and the last in alphabetical order differ where any two do.
    first, last = min(given), max(given)
    start = next((index for index in range(len(first)) if not last.startswith(first[: index + 1])), len(first))
    cut = max(0, start - 4) if len(set(given)) > 1 else 0
    return [text if text == _NOTHING else _shortened(f"…{text[cut:]}" if cut else text) for text in texts]


def _value(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(entry)}" for key, entry in value.items())
    text = " ".join(str(value).split())
    return text[:_HASH_LENGTH] if _HASH.fullmatch(text) else text


def _shortened(text: str) -> str:
    if len(text) <= _WIDEST_CELL:
        return text
    half = (_WIDEST_CELL - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _plot(comparison: "RunComparison", marks: Sequence[str], width: int, *, dots: bool) -> list[list[Cell]]:
    """The curves with their axes and, below, which is whose."""
    curves = comparison.curves
    frame = frame_of(curves.points)
    if frame is None:
        return []
    narrowest, widest = _PLOT_WIDTHS
    labels = [f"{frame.top - (frame.top - frame.bottom) * share:.2f}" for share in (0, 0.5, 1)]
    indent = max(map(len, labels)) + 1
    size = (min(widest, max(narrowest, width)) - indent - 2, _PLOT_HEIGHT)
    shown = dict(zip((0, _PLOT_HEIGHT // 2, _PLOT_HEIGHT - 1), labels, strict=True))
    title = f"{curves.of} over {_AXIS_TITLES[curves.over]}"
    lines: list[list[Cell]] = [[(title, None)]]
    for number, cells in enumerate(draw(curves.points, "".join(marks), frame, size, dots=dots)):
        lines.append([(f"{shown.get(number, '').rjust(indent - 1)} |", None), *cells])
    right = _AXIS_VALUES[curves.over](frame.right)
    lines.append([(" " * indent + "+" + "-" * size[0], None)])
    lines.append([(" " * (indent + 1) + "0" + right.rjust(size[0] - 1), None)])
    legend: list[Cell] = []
    for number, (mark, run) in enumerate(zip(marks, comparison.runs, strict=True)):
        entry = f"{mark} {_shortened(run.name)}   "
        if legend and sum(len(text) for text, _ in legend) + len(entry) > size[0] + indent:
            lines.append(legend)
            legend = []
        legend.append((entry, number))
    return [*lines, legend, [("", None)]]


_AXIS_TITLES = {"tokens": "tokens", "steps": "steps", "time": "time of training (h:mm:ss)"}
_AXIS_VALUES: Mapping[str, Callable[[float], str]] = {
    "tokens": format_count,
    "steps": lambda value: f"{value:,.0f}",
    "time": format_seconds,
}


def _sentences(comparison: "RunComparison") -> list[str]:
    """Who is best by each score, from whom that can be told, and what else is to be known."""
    lines = []
    by_score: dict[str, list[Any]] = {}
    for entry in comparison.comparisons:
        by_score.setdefault(entry.score, []).append(entry)
    for score, entries in by_score.items():
        lines.append(f"{score}: {entries[0].best} is best of {len(entries) + 1}.")
        for entry in entries:
            verdict = "better than" if entry.corrected_p_value < SIGNIFICANT else "not to be told from"
            looks = f" after {entry.num_comparisons:,} looks" if entry.num_comparisons > 1 else ""
            lines.append(
                f"  {verdict} {entry.other}: {format_gain(entry)}, {format_p(entry.corrected_p_value)}{looks}, "
                f"{entry.test}"
            )
    if lines:
        lines.append("p speaks of other items of the same kind, not of another seed.")
    return [*lines, *comparison.notes]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
