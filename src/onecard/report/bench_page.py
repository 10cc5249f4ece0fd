"""Speeds as a page: one HTML file that needs no network, no script and no other file."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path

from onecard.errors import InputError
from onecard.report.scale import Scale, format_tick
from onecard.spec.paths import shorten_path

# In units of the picture: a wide one for desks, one for phones, whose labels are shorter.
_WIDE, _PHONE = 860, 400
_LEFT, _RIGHT = 16, 20
_ROW, _BAR, _TOP, _AXIS = 54, 20, 8, 26


@dataclass(frozen=True)
class SpeedBar:
    """A speed with the range of its middle half and what was planned; `value` None where it was not measured."""

    label: str
    value: float | None
    spread: tuple[float, float] | None
    planned: float | None
    note: str
    is_best: bool


def refuse_taken(path: Path) -> None:
    """Refuses a file that exists.

    Raises:
        InputError: nothing is overwritten.
    """
    if path.exists():
        raise InputError(f"{path} exists: give another --page; nothing was changed")


def write_page(
    name: str, table: Sequence[Sequence[str]], lines: Sequence[str], bars: Sequence[SpeedBar], path: Path | None
) -> Path:
    """Writes the page of a bench and returns its path; by default a new file in the current folder.

    Raises:
        InputError: the file exists.
    """
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in Path(name).stem)
    target = path or Path(f"bench-{stem}-{time.strftime('%Y%m%d-%H%M%S')}.html")
    refuse_taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_page(name, table, lines, bars), encoding="utf-8", newline="\n")
    return target


def render_page(name: str, table: Sequence[Sequence[str]], lines: Sequence[str], bars: Sequence[SpeedBar]) -> str:
    """Renders bars, table and remarks; `table` begins with its header."""
    from jinja2 import Environment, StrictUndefined  # here: those who only compare runs do not need it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text("report.bench.html.jinja")).render(
        name=shorten_path(name),
        header=table[0],
        rows=table[1:],
        lines=lines,
        svg=draw_bars(bars, _WIDE),
        phone=draw_bars([replace(bar, note="") for bar in bars], _PHONE),
        style=_text("report.css"),
        date=time.strftime("%Y-%m-%d %H:%M"),
    )


def draw_bars(bars: Sequence[SpeedBar], width: int) -> str:
    """Draws a bar per setting from zero, with its spread as a line and the plan as an upright mark."""
    ends = [value for bar in bars for value in (bar.value, bar.planned, *(bar.spread or ())) if value is not None]
    x = Scale(0.0, 1.06 * max(ends, default=1.0), _LEFT, width - _RIGHT)
    height = _TOP + _ROW * len(bars) + _AXIS
    bottom = height - _AXIS
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Tokens per second by setting">']
    for value in x.ticks(width // 140):
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{format_tick(value)}</text>'
        )
    for number, bar in enumerate(bars):
        parts += _bar(bar, x, _TOP + _ROW * number)
    parts.append(f'<path class="axis" d="M{x.start} {_TOP}V{bottom}"/></svg>')
    return "".join(parts)


def _bar(bar: SpeedBar, x: Scale, top: float) -> list[str]:
    weight = ' font-weight="700"' if bar.is_best else ""
    told = f"not measured: {bar.note}".rstrip(": ")
    if bar.value is not None:
        told = f"{bar.value:,.0f} tokens/s, {bar.note}".rstrip(", ")
    # A phone has no room for what colour and weight say, too.
    label = escape(f"{bar.label}{' (fastest)' if bar.is_best and bar.note else ''}: {told}")
    parts = [f'<text class="label" x="{x.start + 4}" y="{top + 16}"{weight}>{label}</text>']
    if bar.value is None:
        return parts
    start, at = top + 23, x.place(bar.value)
    colour = "c0" if bar.is_best else "c7"
    parts.append(
        f'<rect class="{colour}" x="{x.start}" y="{start}" width="{at - x.start:.1f}" height="{_BAR}" rx="3"/>'
    )
    middle = start + _BAR / 2
    if bar.spread is not None:
        low, high = (x.place(value) for value in bar.spread)
        ends = "".join(f"M{end:.1f} {middle - 5}v10" for end in (low, high))
        parts.append(f'<path class="spread" d="M{low:.1f} {middle}H{high:.1f}{ends}"/>')
    if bar.planned is not None:
        title = f"<title>planned: {bar.planned:,.0f} tokens/s</title>"
        parts.append(f'<path class="planned" d="M{x.place(bar.planned):.1f} {start - 3}v{_BAR + 6}">{title}</path>')
    return parts


def _text(name: str) -> str:
    return files("onecard.report").joinpath(name).read_text(encoding="utf-8")
