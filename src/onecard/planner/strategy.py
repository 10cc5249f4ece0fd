"""How several ranks share a run: each holds all of it, or a part."""

from onecard.errors import DoesNotFitError, InputError
from onecard.planner.candidate import NothingFits
from onecard.planner.device import Target
from onecard.planner.fit import FirstAnswer, find_fit, fit_plan
from onecard.planner.ranks import hold_in_parts, recut
from onecard.planner.remedies import does_not_fit
from onecard.spec import Plan, Recipe
from onecard.units import format_bytes


def fit_ranks(draft: Plan, recipe: Recipe, target: Target, first: FirstAnswer | None) -> Plan:
    """Chooses as `fit_plan` does, and the strategy, too, where it is open and there are several ranks.

    Whole state is preferred: it crosses once a step.

    Raises:
        DoesNotFitError, InputError: as `fit_plan`.
    """
    if target.num_ranks == 1:
        return fit_plan(draft, recipe, target, first)
    if recipe.strategy != "auto":
        asked = draft.model_copy(update={"reasons": draft.reasons | {"strategy": "asked for"}})
        return fit_plan(asked, recipe, target, first)
    try:
        return _explain(find_fit(draft, recipe, target, first), "each card holds the whole state, so least crosses")
    except NothingFits as error:
        whole = error.nearest
    needed = format_bytes(whole.forecast.memory.peak_bytes)
    try:
        parts = recut(hold_in_parts(draft), target.num_ranks)
    except InputError as error:
        refused = does_not_fit(whole, target)
        raise DoesNotFitError(f"{refused}\nIn parts it cannot be held: {error}", refused.plan) from error
    try:
        made = find_fit(parts, recipe, target, first)
    except NothingFits as error:
        refused = does_not_fit(error.nearest, target)
        raise DoesNotFitError(
            f"{refused}\nThat is with strategy fsdp; with ddp each card needs {needed}", refused.plan
        ) from None
    return _explain(made, f"each card holds a part: the whole state and a step need {needed}")


def _explain(plan: Plan, reason: str) -> Plan:
    return plan.model_copy(update={"reasons": plan.reasons | {"strategy": reason}})
