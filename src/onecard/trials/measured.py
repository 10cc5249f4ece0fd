"""What was measured of each setting, over all of its rounds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.spec import Plan


@dataclass(frozen=True)
class Spread:
    """The middle of a sample, its quarters and its ends."""

    median: float
    low_quarter: float
    high_quarter: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Describes at least one value."""
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One setting: speed in tokens/s and step time over all measured steps; None where it was not measured, and why.

    `rounds` are the median tokens/s of each process. `share_of_peak` is of `peak_flops`, a large matrix product in
    `peak_precision` in the same processes; `wait_share` is the part of the time that steps waited for data.
    `predicted_*` are the plan's. `is_best` marks the fastest, `is_near_best` those that the spread between rounds
    cannot tell from it.
    """

    setting: Mapping[str, str]
    problem: str | None = None
    plan: Plan | None = None
    is_synthetic: bool = False
    is_compiled: bool = False
    num_steps: int = 0
    tokens_per_s: Spread | None = None
    step_s: Spread | None = None
    rounds: tuple[float, ...] = ()
    first_step_s: float = 0.0
    peak_bytes: int = 0
    peak_flops: tuple[float, ...] = ()
    peak_precision: str = ""
    share_of_peak: float = 0.0
    wait_share: float = 0.0
    is_best: bool = False
    is_near_best: bool = False

    @property
    def drift(self) -> float:
        """How much faster the last round was than the first, as a share."""
        return self.rounds[-1] / self.rounds[0] - 1 if self.rounds else 0.0


def summarize(setting: Mapping[str, str], plan: Plan, timings: Sequence[Mapping[str, Any]], is_synthetic: bool) -> Row:
    """Puts the rounds of a setting together; `timings` are those of `onecard.trials.timing`, at least one."""
    steps = [step for timing in timings for step in timing["steps"]]
    speed = Spread.of([tokens / seconds for seconds, tokens, _ in steps])
    peaks = tuple(timing["peak_flops"] for timing in timings)
    return Row(
        setting=setting,
        plan=plan,
        is_synthetic=is_synthetic,
        is_compiled=all(timing["is_compiled"] for timing in timings),
        num_steps=len(steps),
        tokens_per_s=speed,
        step_s=Spread.of([seconds for seconds, _, _ in steps]),
        rounds=tuple(
            statistics.median(tokens / seconds for seconds, tokens, _ in timing["steps"]) for timing in timings
        ),
        first_step_s=timings[0]["first_step_s"],
        peak_bytes=max(timing["peak_bytes"] for timing in timings),
        peak_flops=peaks,
        peak_precision=timings[0]["peak_precision"],
        share_of_peak=speed.median * plan.flops_per_token / max(peaks),
        wait_share=sum(wait for _, _, wait in steps) / sum(seconds for seconds, _, _ in steps),
    )
