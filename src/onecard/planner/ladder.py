"""The same training with other settings: what else there is.

Compiled rows come by their eager steps first, all of them in seconds each; the compiler takes its time with every row,
so it is asked in the order of what a person would want to know.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onecard.errors import InputError
from onecard.planner.candidate import Candidate, evaluate, is_answered
from onecard.planner.changes import FOLLOWING, changes_of, other_methods, other_strategies
from onecard.planner.depth import expect_trace_s
from onecard.planner.device import Target
from onecard.planner.trace_cache import CannotTrace
from onecard.spec import Alternative, Plan

# Told before each row that is compiled: the rows still to come, the next one first, and seconds for all of them.
OnWait = Callable[[Sequence[Alternative], float], None]


def list_alternatives(plan: Plan, target: Target, on_wait: OnWait | None = None) -> Iterator[Alternative]:
    """Forecasts the same training with one thing changed at a time; the first row is the plan itself.

    Compiled rows that were not known before are forecast by their eager step (`is_refined` false). With `on_wait` they
    come a second time, with the same settings, by their compiled one: those whose fitting is open first, then the
    fastest. Not those that cannot fit however little the compiler keeps.
    """
    rungs: list[_Rung] = []
    for rung in _climb(plan, target):
        rungs.append(rung)
        yield rung.row
    if on_wait is not None:
        yield from _refine(rungs, target, on_wait)


@dataclass(frozen=True)
class _Rung:
    """A row and what it was made of."""

    changes: dict[str, Any]
    candidate: Candidate
    is_chosen: bool = False

    @property
    def row(self) -> Alternative:
        shown = {key: value for key, value in self.changes.items() if key != FOLLOWING}
        return row_of(self.candidate, shown, is_chosen=self.is_chosen)

    @property
    def is_open(self) -> bool:
        """Whether compiling may tell something: not of what does not fit even with all that it may save."""
        memory = self.candidate.forecast.memory
        return not self.candidate.forecast.is_refined and memory.peak_low_bytes <= memory.limit_bytes

    @property
    def urgency(self) -> tuple[bool, float]:
        memory = self.candidate.forecast.memory
        return memory.peak_high_bytes <= memory.limit_bytes, self.candidate.step_s or 0.0


def _climb(plan: Plan, target: Target) -> Iterator[_Rung]:
    yield _Rung({}, Candidate(plan, plan.forecast) if plan.forecast else evaluate(plan, target), is_chosen=True)
    for changes in changes_of(plan, target):
        changed = plan.model_copy(update=changes)
        yield _Rung(changes, evaluate(changed, target, may_compile=is_answered(changed, target)))
    for changes in (*other_strategies(plan, target), *other_methods(plan)):
        if (candidate := try_method(plan, changes, target)) is not None:
            yield _Rung(changes, candidate)


def _refine(rungs: list[_Rung], target: Target, on_wait: OnWait) -> Iterator[Alternative]:
    waiting = sorted((rung for rung in rungs if rung.is_open), key=lambda rung: rung.urgency)
    assert target.capability is not None
    taken_s, expected_s = 0.0, 0.0
    while waiting:
        each_s = [expect_trace_s(rung.candidate.plan, target.capability) for rung in waiting]
        # This machine may be faster or slower, or busy.
        pace = taken_s / expected_s if expected_s else 1.0
        on_wait([rung.row for rung in waiting], pace * sum(each_s))
        started = time.monotonic()
        rung = waiting.pop(0)
        try:
            candidate = evaluate(rung.candidate.plan, target, may_compile=True)
        except (InputError, CannotTrace):
            continue
        if each_s[0]:
            taken_s, expected_s = taken_s + time.monotonic() - started, expected_s + each_s[0]
        # Where the compiler fails, what was told stands.
        if candidate.forecast.is_refined:
            yield replace(rung, candidate=candidate).row


def row_of(candidate: Candidate, changes: dict[str, Any], *, is_chosen: bool = False) -> Alternative:
    """Tells of a candidate what it changes and what that takes."""
    memory = candidate.forecast.memory
    shown = dict(changes)
    if "optimizer" in shown:
        shown["optimizer"] = shown["optimizer"].name
    if "adapt" in shown:
        adapt = shown.pop("adapt")
        shown = {"method": adapt.method if adapt else "full"} | shown
    return Alternative(
        settings=shown,
        peak_bytes=memory.peak_bytes,
        step_s=candidate.step_s,
        fits=memory.fits,
        is_chosen=is_chosen,
        is_refined=candidate.forecast.is_refined,
        is_interpolated=candidate.forecast.is_interpolated,
    )


def try_method(plan: Plan, changes: dict[str, Any], target: Target) -> Candidate | None:
    """Forecasts a plan with another method; None for a model that cannot be adapted so."""
    changed = plan.model_copy(update=changes)
    try:
        return evaluate(changed, target, may_compile=is_answered(changed, target))
    except (InputError, CannotTrace):
        return None
