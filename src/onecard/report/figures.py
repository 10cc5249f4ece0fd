"""The curves of a run as figures of its report."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from onecard.observe.events import ScoredEvent
from onecard.report.chart import Chart, Dot, bounds_of, draw_chart, spans_decades
from onecard.report.plot import frame_of
from onecard.report.record import RunRecord
from onecard.report.summary import heldout_points
from onecard.report.thin import Point, Thinned, thin
from onecard.report.words import Say

# In units of the picture: a wide one for desks and paper, one for phones, and those that stand in a row.
_WIDE, _PHONE, _SMALL = (860, 300), (400, 250), (320, 190)
# Times the height that a settled loss takes.
_ABOVE = 1.6
# Beyond so many tasks the charts would be longer than the rest.
_MAX_TASKS = 6


@dataclass(frozen=True)
class Figure:
    """A chart with its words; `phone` is another drawing for narrow pages, `legend` pairs marks and texts."""

    title: str
    svg: str
    phone: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


def make_figures(run: RunRecord, say: Say) -> tuple[Figure, ...]:
    """Draws what a run recorded: loss, rate, gradient norm, speed, and the scores of its checkpoints."""
    found: list[Figure] = []
    if (loss := _loss(run, say)) is not None:
        found.append(loss)
    steps = run.steps
    if steps:
        rates = [(float(step.step), step.learning_rate) for step in steps]
        norms = [(float(step.step), step.grad_norm) for step in steps]
        found += _small(say("Learning rate"), rates, say, from_zero=True)
        found += _small(say("Gradient norm"), norms, say, limit=run.plan.optimizer.max_grad_norm)
        found += _small(say("Tokens per second"), _speed(run), say, from_zero=True)
    return *found, *_scores(run, say)


def _loss(run: RunRecord, say: Say) -> Figure | None:
    points = [(float(step.step), step.loss) for step in run.steps]
    heldout = heldout_points(run)
    finite = [point for point in heldout if math.isfinite(point.loss)]
    best = min(finite, key=lambda point: point.loss, default=None)
    dots = tuple(Dot(p.step, p.loss, p.standard_error, p is best and len(finite) > 1) for p in finite)
    curve = thin(points)
    if not (curve.mean or dots):
        return None
    bottom, top, highest = _frame(curve, dots)
    chart = Chart(say("Loss and held-out loss over steps"), _right(run), bottom, top, curve, dots)
    size = curve.bin_size
    line = say("training loss, mean of {size} steps", size=size) if size > 1 else say("training loss")
    legend = [("line", line), *_band_legend(size, say)]
    if dots:
        legend.append(("dot", say("held-out loss ± standard error")))
    if any(dot.is_best for dot in dots):
        legend.append(("best", say("lowest held-out loss")))
    if curve.gaps:
        legend.append(("gap", say("not finite, update refused")))
    note = ""
    if highest > top:
        note = say("The highest values, up to {highest}, lie above the picture.", highest=f"{highest:.4g}")
    return Figure(say("Loss"), draw_chart(chart, *_WIDE), draw_chart(chart, *_PHONE), tuple(legend), note)


def _frame(curve: Thinned, dots: Sequence[Dot]) -> tuple[float, float, float]:
    """What to show of losses, from and to, and the highest of them: of the fall at the start a part is enough."""
    curves = [part for part in (curve.mean, tuple((dot.x, dot.y) for dot in dots)) if part]
    settled = frame_of(curves)
    assert settled is not None
    values = [y for part in curves for _, y in part] + [y for _, *edges in curve.band for y in edges]
    lowest, highest = min(values), max(values)
    top = min(highest, lowest + _ABOVE * (settled.top - lowest))
    margin = 0.04 * (top - lowest) or 0.5
    return lowest - margin, top + margin, highest


def _small(
    title: str, points: Sequence[Point], say: Say, *, from_zero: bool = False, limit: float | None = None
) -> list[Figure]:
    curve = thin(points)
    # The band of a speed goes down to the moments of saving: they belong into the picture.
    values = [value for _, low, high in curve.band for value in (low, high)] or [y for _, y in curve.mean]
    if not values:
        return []
    is_log = not from_zero and spans_decades(values)
    bottom, top = bounds_of(values, is_log=is_log, from_zero=from_zero)
    chart = Chart(say("{title} over steps", title=title), points[-1][0], bottom, top, curve, is_log=is_log)
    note = ""
    if limit is not None:
        clipped = sum(y > limit for _, y in points) / len(points)
        note = say("Clipped at {limit}: {share} of the steps.", limit=f"{limit:g}", share=f"{clipped:.0%}")
    return [Figure(title, draw_chart(chart, *_SMALL), note=note)]


def _band_legend(bin_size: int, say: Say) -> list[tuple[str, str]]:
    return [("band", say("lowest to highest of {size} steps", size=bin_size))] if bin_size > 1 else []


def _speed(run: RunRecord) -> list[Point]:
    steps = run.steps
    # The first step loads and compiles: its speed would be the lower edge of the picture.
    shown = steps[1:] if len(steps) > 2 else steps
    return [(float(step.step), step.tokens_per_s) for step in shown]


def _scores(run: RunRecord, say: Say) -> list[Figure]:
    events = sorted((event for event in run.of(ScoredEvent) if not event.is_whole), key=lambda event: event.task)
    figures = []
    for task, group in groupby(events, key=lambda event: event.task):
        dots = [Dot(e.step, e.scores[e.metric], e.standard_error) for e in group if e.metric in e.scores]
        if len(dots) < 2:
            continue
        best = max(dots, key=lambda dot: dot.y)
        dots = [replace(dot, is_best=dot is best) for dot in dots]
        edges = [dot.y + sign * (dot.error or 0.0) for dot in dots for sign in (-1, 1)]
        bottom, top = bounds_of(edges)
        chart = Chart(say("{title} over steps", title=task), _right(run), bottom, top, dots=tuple(dots))
        legend = (("dot", say("a part of the items ± standard error")), ("best", say("highest")))
        figures.append(Figure(task, draw_chart(chart, *_SMALL), legend=legend))
    return figures[:_MAX_TASKS]


def _right(run: RunRecord) -> float:
    return float(max([step.step for step in run.steps[-1:]] + [event.step for event in run.evaluated[-1:]] + [1]))


def typical_step_s(run: RunRecord) -> float | None:
    """The median time of a step, those of the start left out; None where there is none."""
    steps = run.steps
    warm = steps[min(10, len(steps) // 2) :]
    return statistics.median(step.step_s for step in warm) if warm else None
