"""One row of a plan's ladder at a time, for a run that wants to know what a setting would do."""

from collections.abc import Mapping
from typing import Any

from onecard.planner.candidate import evaluate, is_answered
from onecard.planner.device import Target
from onecard.planner.ladder import row_of
from onecard.spec import Alternative, Plan

# An eager trace on one core: 0.9, 1.5 and 4.7 s with 6, 12 and 30 layers.
_START_S, _LAYER_S = 0.3, 0.16


def foresee(plan: Plan, changes: Mapping[str, Any], target: Target, budget_s: float) -> Alternative | None:
    """Forecasts a plan with some fields changed, by its own step; None where that is expected to take longer.

    A compiled step is not compiled for it: it is told only where it is remembered.

    Raises:
        InputError, CannotTrace: there is no such step.
    """
    changed = plan.model_copy(update={**changes, "forecast": None})
    if not is_answered(changed, target):
        num_layers = int(plan.model.settings.get("num_hidden_layers") or plan.model.settings.get("n_layer") or 0)
        if changed.torch_compile or _START_S + _LAYER_S * num_layers > budget_s:
            return None
    return row_of(evaluate(changed, target, may_compile=True), dict(changes))
