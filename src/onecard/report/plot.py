"""Curves as characters: braille dots where colours tell them apart, else a letter each."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
# A character and the curve it belongs to.
Cell = tuple[str, int | None]
# Bits of a braille character by column and row, from U+2800 on: its dots are numbered down, the lowest row last.
_BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
# The fall from a fresh model's loss, or a run that diverges, would flatten all else: what lies above this share of the
# values after the first tenth is cut.
_STARTING_SHARE, _SHOWN_SHARE = 0.1, 0.95


@dataclass(frozen=True)
class Frame:
    """What a plot shows: x from 0 to the right edge, y from the bottom to the top."""

    right: float
    bottom: float
    top: float


def frame_of(curves: Sequence[Sequence[Point]]) -> Frame | None:
    """Finds what is worth showing of several curves; None where there is nothing to draw."""
    points = [point for curve in curves for point in curve]
    if not points:
        return None
    right = max(x for x, _ in points)
    start = min(_STARTING_SHARE * right, *(curve[-1][0] for curve in curves if curve))
    settled = sorted(y for x, y in points if x >= start)
    bottom, top = min(y for _, y in points), settled[math.ceil(_SHOWN_SHARE * len(settled)) - 1]
    margin = 0.02 * (top - bottom) or 0.5
    return Frame(right or 1.0, bottom - margin, top + margin)


def draw(
    curves: Sequence[Sequence[Point]], marks: str, frame: Frame, size: tuple[int, int], *, dots: bool
) -> list[list[Cell]]:
    """Draws curves on `size` (width, height) characters; where several share a place they take turns."""
    width, height = size
    across, down = (2, 4) if dots else (1, 1)
    bits: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], list[int]] = {}
    for number, curve in enumerate(curves):
        for x, y in _trace(curve, frame, width * across - 1, height * down - 1):
            place = (y // down, x // across)
            bits[place] = bits.get(place, 0) | _BRAILLE[x % across][y % down]
            if number not in owners.setdefault(place, []):
                owners[place].append(number)
    lines = []
    for row in range(height):
        line: list[Cell] = []
        for column in range(width):
            found = owners.get((row, column))
            owner = found[column % len(found)] if found else None
            character = " " if owner is None else chr(0x2800 + bits[row, column]) if dots else marks[owner]
            line.append((character, owner))
        lines.append(line)
    return lines


def _trace(curve: Sequence[Point], frame: Frame, right: int, bottom: int) -> Iterator[tuple[int, int]]:
    """The dots of a curve from point to point, those outside the frame left out; y counts down from the top."""
    scaled = [
        (
            x / frame.right * right,
            # One screen above at most: nobody sees it, and a loss of 1e30 would take as many dots.
            max(-1.0, (frame.top - y) / (frame.top - frame.bottom)) * bottom,
        )
        for x, y in curve
    ]
    for (x, y), (next_x, next_y) in zip(scaled, [*scaled[1:], scaled[-1]] if scaled else [], strict=True):
        count = math.ceil(max(abs(next_x - x), abs(next_y - y), 1))
        for index in range(count + 1):
            share = index / count
            column, row = round(x + share * (next_x - x)), round(y + share * (next_y - y))
            if 0 <= row <= bottom:
                yield column, row
