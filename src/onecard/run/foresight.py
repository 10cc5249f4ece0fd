"""Asks the planner, while a run goes on, what another setting would do: for remedies of findings."""

from collections.abc import Mapping
from typing import Any

from onecard.errors import OnecardError
from onecard.hardware import probe_machine
from onecard.planner.device import find_target
from onecard.planner.foresight import foresee
from onecard.planner.trace_cache import CannotTrace
from onecard.spec import Alternative, Plan

# Training stands still meanwhile: so much of what is left of it at most.
_MOST_SHARE = 0.005


class Foresight:
    """Rows of the ladder of a run's plan, each made once; none for a CPU, of which a plan has no ladder."""

    def __init__(self) -> None:
        self._rows: dict[str, Alternative | None] = {}

    def __call__(self, plan: Plan, changes: Mapping[str, Any], left_s: float) -> Alternative | None:
        """Forecasts a plan with some settings changed; None where it cannot be told in half a percent of `left_s`."""
        if plan.device == "cpu" or plan.forecast is None:
            return None
        key = f"{plan.micro_batch_size} {plan.torch_compile} {dict(changes)}"
        if key not in self._rows:
            try:
                self._rows[key] = _look(plan, changes, _MOST_SHARE * left_s)
            except (OnecardError, CannotTrace):
                self._rows[key] = None
        return self._rows[key]


def _look(plan: Plan, changes: Mapping[str, Any], budget_s: float) -> Alternative | None:
    target = find_target(plan.device, probe_machine())
    return None if target.card is None else foresee(plan, changes, target, budget_s)
