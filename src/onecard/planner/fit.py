"""The fastest settings that fit a card. The effective batch never changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from onecard.errors import InputError
from onecard.planner.candidate import RESERVED_SHARE, Candidate, NothingFits, evaluate, is_answered
from onecard.planner.depth import shallow_plans
from onecard.planner.device import Target
from onecard.planner.forecast import forecast_state, predict_eager_step_s
from onecard.planner.ranks import even_sizes
from onecard.planner.remedies import does_not_fit
from onecard.planner.shape import usual_loss_chunk
from onecard.planner.state_size import least_state
from onecard.planner.trace_cache import CannotTrace
from onecard.spec import Plan, Recipe
from onecard.units import format_bytes

# What does not depend on the micro-batch.
_STATE = ("weights", "gradients", "optimizer")
# Shares of the layers that may recompute where not all have to; the middle one is looked at first.
_SHARES = (0.25, 0.5, 0.75)
# A micro-batch whose tensors take at least this much of what there is has not to be traced to be ruled out, however
# earlier runs on the card correct its trace.
_HOPELESS_SHARE = 1.2


@dataclass(frozen=True)
class FirstAnswer:
    """What to do with a compiled plan once its eager step is known, long before its compiled one is.

    `tell` gets the plan with that forecast; without `is_refined` the plan stays so.
    """

    tell: Callable[[Plan], None]
    is_refined: bool = True


def fit_plan(draft: Plan, recipe: Recipe, target: Target, first: FirstAnswer | None = None) -> Plan:
    """Chooses micro-batch and checkpointing where the recipe leaves them open, and adds the forecast.

    Settings given by hand stay, unless the recipe says `fit: auto`. `first` is told of a plan that has to be compiled.

    Raises:
        DoesNotFitError: nothing that may be chosen fits; says what would.
        InputError: the step cannot be traced, and the card is not here to try it.
    """
    try:
        return find_fit(draft, recipe, target, first)
    except NothingFits as error:
        raise does_not_fit(error.nearest, target) from None


def find_fit(draft: Plan, recipe: Recipe, target: Target, first: FirstAnswer | None = None) -> Plan:
    """Chooses as `fit_plan` does, without looking for what would fit where nothing that may be chosen does.

    Raises:
        NothingFits, InputError.
    """
    try:
        return _fit(draft, recipe, target, first)
    except CannotTrace as error:
        if target.is_here:
            reason = f"the step cannot be traced ({error}): its first seconds will tell"
            return draft.model_copy(update={"reasons": draft.reasons | {"forecast": reason}})
        raise InputError(
            f"the step of this {draft.model.settings.get('model_type')} cannot be traced without its card: {error}. "
            "Choose another model_type, or plan on the machine that has the card"
        ) from error


def _fit(draft: Plan, recipe: Recipe, target: Target, first: FirstAnswer | None) -> Plan:
    choices = _Choices.of(draft, recipe, target.num_ranks)
    if sum(least_state(draft, target.num_ranks).values()) > (target.limit_bytes or 0):
        # Nothing that may be chosen changes what stays, and a trace of what no card holds takes minutes.
        raise NothingFits(Candidate(draft, forecast_state(draft, target)))
    if choices.is_none:
        given = _refine(evaluate(draft, target, may_compile=is_answered(draft, target)), target, first)
        if not given.forecast.memory.fits:
            raise NothingFits(given)
        return given.plan.model_copy(update={"forecast": given.forecast})
    rough = _search(draft, choices, target)
    if not rough.is_safe and recipe.fit == "auto" and draft.loss_chunk_size == "full":
        reasons = draft.reasons | {"loss_chunk_size": "all logits at once do not fit"}
        chunk = usual_loss_chunk(draft.model, target.kind)
        return _fit(draft.model_copy(update={"loss_chunk_size": chunk, "reasons": reasons}), recipe, target, first)
    if not rough.forecast.memory.fits and not _may_fit_compiled(rough):
        raise NothingFits(rough)
    chosen = _settle(draft, rough, choices, target, first)
    if not chosen.forecast.memory.fits:
        raise NothingFits(chosen)
    return chosen.plan.model_copy(update={"forecast": chosen.forecast})


def _may_fit_compiled(rough: Candidate) -> bool:
    memory = rough.forecast.memory
    return not rough.forecast.is_refined and memory.peak_low_bytes <= memory.limit_bytes


def _settle(draft: Plan, rough: Candidate, choices: "_Choices", target: Target, first: FirstAnswer | None) -> Candidate:
    """Refines what was chosen by its eager step; what needs too much when compiled gives way to what needs less."""
    best = refined = _refine(rough, target, first)
    tried, cap_bytes = [_settings(rough)], best.forecast.memory.limit_bytes
    while rough.plan.torch_compile and refined.forecast.is_refined and not refined.is_safe:
        # A search by eager steps once more, within a limit that is lower by as much as compiling has added.
        peaks = [one.forecast.memory.peak_bytes for one in (rough, refined)]
        cap_bytes = min(cap_bytes, best.forecast.memory.limit_bytes * peaks[0] // peaks[1])
        rough = _search(draft, choices, target, cap_bytes)
        if _settings(rough) in tried:
            break
        tried.append(_settings(rough))
        refined = _refine(rough, target, None)
        best = min(best, refined, key=lambda one: (not one.is_safe, one.forecast.memory.peak_bytes))
    if _settings(best) != tried[0]:
        return Candidate(_explain_retreat(best, tried[0]), best.forecast)
    return best


def _settings(candidate: Candidate) -> tuple[int, float]:
    return candidate.plan.micro_batch_size, candidate.plan.gradient_checkpointing


def _explain_retreat(chosen: Candidate, at_first: tuple[int, float]) -> Plan:
    """Says of what was chosen instead that the first choice fits only before compiling."""
    keys = ("micro_batch_size", "gradient_checkpointing")
    changed = [
        (key, before) for key, before, now in zip(keys, at_first, _settings(chosen), strict=True) if before != now
    ]
    reasons = {key: f"{str(before).lower()} fits before compiling, but not compiled" for key, before in changed}
    return chosen.plan.model_copy(update={"reasons": chosen.plan.reasons | reasons})


@dataclass(frozen=True)
class _Choices:
    """What may be chosen: micro-batches, smallest first, and shares of layers that recompute."""

    sizes: list[int]
    recomputes: list[float]

    @classmethod
    def of(cls, draft: Plan, recipe: Recipe, num_ranks: int) -> Self:
        is_free = recipe.fit == "auto"
        has_checkpointing = is_free or recipe.gradient_checkpointing == "auto"
        return cls(
            even_sizes(draft, num_ranks) if is_free or _is_open(recipe) else [draft.micro_batch_size],
            [False, True] if has_checkpointing else [draft.gradient_checkpointing],
        )

    @property
    def is_none(self) -> bool:
        return len(self.sizes) == len(self.recomputes) == 1


def _search(draft: Plan, choices: _Choices, target: Target, cap_bytes: int | None = None) -> Candidate:
    """The fastest that fits by its eager step, with reasons; where nothing does, what needs least.

    With `cap_bytes` only what would fit in so much is looked for; the forecast is for the whole limit.
    """
    sizes, recomputes = choices.sizes, choices.recomputes
    found: list[Candidate] = []
    limits = {"memory_limit_bytes": draft.memory_limit_bytes}
    if cap_bytes is not None:
        draft = draft.model_copy(update={"memory_limit_bytes": cap_bytes})
    for recompute in recomputes:
        variant = draft.model_copy(update={"gradient_checkpointing": recompute})
        if (not found or _may_be_faster(variant, sizes[-1], found[0], target)) and (
            best := _largest_that_fits(variant, sizes, target)
        ):
            found.append(best)
    if not found:
        smallest = {"micro_batch_size": sizes[0], "eval_batch_size": sizes[0], "gradient_checkpointing": recomputes[-1]}
        found = [evaluate(draft.model_copy(update=smallest), target)]
    chosen = min(found, key=lambda candidate: (candidate.step_s or 0.0, candidate.plan.gradient_checkpointing))
    if len(recomputes) > 1 and (less := _recompute_less(chosen, target)):
        chosen = less
    if cap_bytes is not None:
        whole = evaluate(chosen.plan.model_copy(update=limits), target)
        found = [whole if other is chosen else other for other in found]
        chosen = whole
    reasons = _reasons(chosen, found, len(sizes) > 1, len(recomputes) > 1)
    return Candidate(chosen.plan.model_copy(update={"reasons": draft.reasons | reasons}), chosen.forecast)


def _refine(rough: Candidate, target: Target, first: FirstAnswer | None) -> Candidate:
    """Replaces the forecast of an eager step by that of the compiled one, where the plan is compiled."""
    if rough.forecast.is_refined:
        return rough
    if first is not None and not is_answered(rough.plan, target):
        first.tell(rough.plan.model_copy(update={"forecast": rough.forecast}))
        if not first.is_refined:
            return rough
    return evaluate(rough.plan, target, may_compile=True)


def _recompute_less(chosen: Candidate, target: Target) -> Candidate | None:
    """Finds the smallest share of layers that has to recompute where all of them would; None where none is faster."""
    # Of a deep compiled plan a share takes two more eager traces before the first answer and four of shallow models
    # instead of two after it, together some 25 s: beyond what a plan may take. The ladder has one.
    if not chosen.plan.gradient_checkpointing or shallow_plans(chosen.plan) is not None:
        return None
    best: Candidate | None = None
    low, high = 0, len(_SHARES)
    while low < high:
        middle = (low + high) // 2
        candidate = evaluate(chosen.plan.model_copy(update={"gradient_checkpointing": _SHARES[middle]}), target)
        if candidate.is_safe and candidate.step_s and candidate.step_s < (chosen.step_s or 0.0):
            best, high = candidate, middle
        else:
            low = middle + 1
    return best


def _is_open(recipe: Recipe) -> bool:
    return recipe.per_device_train_batch_size == "auto" and recipe.gradient_accumulation_steps == "auto"


def _largest_that_fits(draft: Plan, sizes: list[int], target: Target) -> Candidate | None:
    """Finds the largest micro-batch that fits, and gives the fastest of those looked at.

    Memory is nearly a straight line over sizes, so each trace tells where to look next: two or three are enough.
    """
    looked_at: list[Candidate] = []
    low, high = 0, len(sizes) - 1
    place = (low + high + 1) // 2
    while low <= high:
        changes = {"micro_batch_size": sizes[place], "eval_batch_size": sizes[place]}
        candidate = evaluate(draft.model_copy(update=changes), target)
        looked_at.append(candidate)
        low, high = (place + 1, high) if candidate.is_safe else (low, place - 1)
        if low <= high and _least_share(candidate, sizes[low]) > _HOPELESS_SHARE:
            break
        expected = [_expect_share(looked_at, size) for size in sizes[low : high + 1]]
        place = low + max(0, sum(share <= 1.0 for share in expected) - 1)
    fitting = [candidate for candidate in looked_at if candidate.is_safe]
    return min(fitting, key=lambda one: (one.step_s or 0.0, -one.plan.micro_batch_size)) if fitting else None


def _may_be_faster(draft: Plan, largest: int, than: Candidate, target: Target) -> bool:
    """Whether the largest micro-batch, be there room for it or not, would take less time than what was found."""
    if than.step_s is None:
        return True
    changes = {"micro_batch_size": largest, "eval_batch_size": largest}
    return (predict_eager_step_s(draft.model_copy(update=changes), target) or 0.0) < than.step_s


def _expect_share(looked_at: list[Candidate], size: int) -> float:
    """Share of what a plan may take that a micro-batch of this size will, by the line through the last two traces.

    Through one alone it begins at what does not depend on the size.
    """
    last = looked_at[-1]
    memory = last.forecast.memory
    if len(looked_at) > 1:
        before = looked_at[-2]
        start, start_bytes = before.plan.micro_batch_size, before.forecast.memory.peak_bytes
    else:
        start, start_bytes = 0, sum(memory.breakdown.get(part, 0) for part in _STATE)
    slope = (memory.peak_bytes - start_bytes) / (last.plan.micro_batch_size - start)
    expected = memory.peak_bytes + slope * (size - last.plan.micro_batch_size)
    return expected / (RESERVED_SHARE * memory.limit_bytes)


def _least_share(seen: Candidate, size: int) -> float:
    """Share of what a plan may take that the tensors of another micro-batch will at the least.

    At the peak that was seen a larger one keeps more activations and may have all else as it is; a smaller one has the
    same state and may have less of all else.
    """
    memory, growth = seen.forecast.memory, size / seen.plan.micro_batch_size
    if growth > 1:
        changing = memory.breakdown.get("activations", 0)
    else:
        changing = memory.allocated_bytes - sum(memory.breakdown.get(part, 0) for part in _STATE)
    return (memory.allocated_bytes + (growth - 1) * changing) / (RESERVED_SHARE * memory.limit_bytes)


def _reasons(chosen: Candidate, found: list[Candidate], has_sizes: bool, has_checkpointing: bool) -> dict[str, str]:
    memory, reasons = chosen.forecast.memory, dict[str, str]()
    mark = "" if chosen.forecast.is_refined else ", before compiling"
    if has_sizes and not memory.fits:
        reasons["micro_batch_size"] = "the smallest, for nothing else may fit"
    elif has_sizes:
        reasons["micro_batch_size"] = (
            f"the fastest that fits: {format_bytes(memory.peak_bytes)} of {format_bytes(memory.limit_bytes)}{mark}"
        )
    if has_checkpointing:
        others = [other for other in found if other is not chosen]
        if 0 < chosen.plan.gradient_checkpointing < 1:
            reasons["gradient_checkpointing"] = "the fewest layers that have to recompute so that it fits"
        elif chosen.plan.gradient_checkpointing:
            reasons["gradient_checkpointing"] = (
                "faster, for the larger micro-batch it allows" if others else "does not fit without"
            )
        else:
            reasons["gradient_checkpointing"] = "fits without, so nothing is computed twice"
    return reasons
