"""Curves of several runs over a common axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onecard.report.record import RunRecord
from onecard.report.summary import heldout_points

Axis = Literal["tokens", "steps", "time"]
AXES: tuple[Axis, ...] = ("tokens", "steps", "time")
Kind = Literal["heldout", "train"]
# A training loss is averaged down to so many: the noise of single batches hides what runs differ in.
_MAX_POINTS = 100


@dataclass(frozen=True)
class Curves:
    """A curve per run as points (x, y), x in tokens, steps or seconds; empty for a run that has none."""

    of: str
    over: Axis
    points: tuple[tuple[tuple[float, float], ...], ...]


def find_curves(runs: Sequence[RunRecord], over: Axis, measure: str | None, kind: Kind | None = None) -> Curves:
    """Finds the held-out curves; the training loss where fewer than two runs have been evaluated twice."""
    heldout = [_heldout(run, over, measure or "loss") for run in runs]
    if kind == "heldout" or (kind is None and sum(len(points) > 1 for points in heldout) > 1):
        what = "held-out bits per byte" if measure == "bits_per_byte" else "held-out loss"
        return Curves(what, over, tuple(map(_finite, heldout)))
    return Curves("training loss", over, tuple(_finite(_averaged(_training(run, over))) for run in runs))


def _heldout(run: RunRecord, over: Axis, measure: str) -> list[tuple[float, float]]:
    found = []
    for point in heldout_points(run):
        x = {"tokens": point.tokens_seen, "steps": point.step, "time": point.elapsed_s}[over]
        y = getattr(point, measure)
        if x is not None and y is not None:
            found.append((float(x), float(y)))
    return found


def _training(run: RunRecord, over: Axis) -> list[tuple[float, float]]:
    field = {"tokens": "tokens_seen", "steps": "step", "time": "elapsed_s"}[over]
    return [(float(getattr(step, field)), step.loss) for step in run.steps if math.isfinite(step.loss)]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MAX_POINTS) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _finite(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in points if math.isfinite(y))
