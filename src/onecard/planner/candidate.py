"""A plan with its forecast: what a search for settings looks at."""

from dataclasses import dataclass

from onecard.planner.depth import is_known
from onecard.planner.device import Target
from onecard.planner.forecast import forecast
from onecard.spec import Forecast, Plan

# Of the memory that a plan may take on its own account; what is given by hand may take all of it.
RESERVED_SHARE = 0.97


@dataclass(frozen=True)
class Candidate:
    """A plan with its forecast."""

    plan: Plan
    forecast: Forecast

    @property
    def is_safe(self) -> bool:
        """Whether it fits with the band of the forecast."""
        memory = self.forecast.memory
        return memory.fits and memory.peak_bytes <= RESERVED_SHARE * memory.limit_bytes

    @property
    def step_s(self) -> float | None:
        return self.forecast.time.step_s if self.forecast.time else None


class NothingFits(Exception):
    """Nothing that may be chosen fits; `nearest` is what needs least."""

    def __init__(self, nearest: Candidate) -> None:
        super().__init__()
        self.nearest = nearest


def evaluate(plan: Plan, target: Target, *, may_compile: bool = False) -> Candidate:
    """Forecasts a plan; by its eager step unless it may be compiled."""
    # A search looks at many candidates; the compiler takes its time with each, and saves memory with all of them.
    return Candidate(plan, forecast(plan, target, may_compile=may_compile).forecast)


def is_answered(plan: Plan, target: Target) -> bool:
    """Whether the whole forecast of a plan is remembered, so that it costs nothing."""
    assert target.capability is not None
    return is_known(plan, target.capability)
