"""The fastest settings that fit a card, and what else there is. The effective batch never changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from onecard.errors import DoesNotFitError, InputError
from onecard.planner.depth import is_known
from onecard.planner.device import Target
from onecard.planner.forecast import forecast
from onecard.planner.optimizers import other_optimizers
from onecard.planner.trace_cache import CannotTrace
from onecard.spec import Alternative, Forecast, Plan, Recipe
from onecard.units import format_bytes

# Of the memory that a plan may take on its own account; what is given by hand may take all of it.
_RESERVED_SHARE = 0.97
# A micro-batch expected to need this much of what there is has not to be traced to be ruled out.
_HOPELESS_SHARE = 1.2


@dataclass(frozen=True)
class Candidate:
    """A plan with its forecast."""

    plan: Plan
    forecast: Forecast

    @property
    def is_safe(self) -> bool:
        """Whether it fits with the band of the forecast."""
        memory = self.forecast.memory
        return memory.fits and memory.peak_bytes <= _RESERVED_SHARE * memory.limit_bytes

    @property
    def step_s(self) -> float | None:
        return self.forecast.time.step_s if self.forecast.time else None


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
    is_free = recipe.fit == "auto"
    sizes = _micro_batches(draft) if is_free or _is_open(recipe) else [draft.micro_batch_size]
    recomputes = [False, True] if is_free or recipe.gradient_checkpointing == "auto" else [draft.gradient_checkpointing]
    if len(sizes) == len(recomputes) == 1:
        given = _refine(_evaluate(draft, target, may_compile=_is_known(draft, target)), target, first)
        if not given.forecast.memory.fits:
            raise _does_not_fit(given, target)
        return given.plan.model_copy(update={"forecast": given.forecast})
    found = [
        best
        for recompute in recomputes
        if (best := _largest_that_fits(draft.model_copy(update={"gradient_checkpointing": recompute}), sizes, target))
    ]
    if not found:
        smallest = {"micro_batch_size": sizes[0], "eval_batch_size": sizes[0], "gradient_checkpointing": recomputes[-1]}
        raise _does_not_fit(_evaluate(draft.model_copy(update=smallest), target), target)
    chosen = min(found, key=lambda candidate: (candidate.step_s or 0.0, candidate.plan.gradient_checkpointing))
    reasons = _reasons(chosen, found, len(sizes) > 1, len(recomputes) > 1)
    decided = chosen.plan.model_copy(update={"reasons": draft.reasons | reasons})
    chosen = _refine(Candidate(decided, chosen.forecast), target, first)
    return decided.model_copy(update={"forecast": chosen.forecast})


def _refine(rough: Candidate, target: Target, first: FirstAnswer | None) -> Candidate:
    """Replaces the forecast of an eager step by that of the compiled one, where the plan is compiled."""
    if rough.forecast.is_refined:
        return rough
    if first is not None and not _is_known(rough.plan, target):
        first.tell(rough.plan.model_copy(update={"forecast": rough.forecast}))
        if not first.is_refined:
            return rough
    return _evaluate(rough.plan, target, may_compile=True)


def list_alternatives(plan: Plan, target: Target) -> Iterator[Alternative]:
    """Forecasts the same training with one thing changed at a time; the first row is the plan itself."""
    yield _row(Candidate(plan, plan.forecast) if plan.forecast else _evaluate(plan, target), {}, is_chosen=True)
    for changes in _changes(plan):
        changed = plan.model_copy(update=changes)
        yield _row(_evaluate(changed, target, may_compile=_is_known(changed, target)), changes)


def _row(candidate: Candidate, changes: dict[str, Any], *, is_chosen: bool = False) -> Alternative:
    memory = candidate.forecast.memory
    shown = {key: value for key, value in changes.items() if key not in ("eval_batch_size", "total_batch_size")}
    if "optimizer" in shown:
        shown["optimizer"] = shown["optimizer"].name
    return Alternative(
        settings=shown,
        peak_bytes=memory.peak_bytes,
        step_s=candidate.step_s,
        fits=memory.fits,
        is_chosen=is_chosen,
        is_rough=not candidate.forecast.is_refined,
    )


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    micro, length = plan.micro_batch_size, plan.max_seq_length
    for size in (2 * micro, micro // 2, 1):
        if 1 <= size <= plan.rows_per_step and size != micro:
            yield {"micro_batch_size": size, "eval_batch_size": min(plan.eval_batch_size, size)}
    yield {"gradient_checkpointing": not plan.gradient_checkpointing}
    yield {"torch_compile": not plan.torch_compile}
    for name in other_optimizers(plan):
        yield {"optimizer": plan.optimizer.model_copy(update={"name": name})}
    if length >= 128:
        # The same tokens per step, in shorter sequences; as many chats, which are cut.
        total = plan.total_batch_size if plan.task == "sft" else 2 * plan.total_batch_size
        yield {"max_seq_length": length // 2, "total_batch_size": total}


def _is_open(recipe: Recipe) -> bool:
    return recipe.per_device_train_batch_size == "auto" and recipe.gradient_accumulation_steps == "auto"


def _micro_batches(draft: Plan) -> list[int]:
    """Powers of two up to the whole step, and the whole step."""
    total = draft.rows_per_step
    return [*(1 << power for power in range(total.bit_length()) if 1 << power < total), total]


def _largest_that_fits(draft: Plan, sizes: list[int], target: Target) -> Candidate | None:
    """Finds the largest micro-batch that fits, and gives the fastest of those looked at.

    Memory is nearly a straight line over sizes, so each trace tells where to look next: two or three are enough.
    """
    looked_at: list[Candidate] = []
    low, high = 0, len(sizes) - 1
    place = (low + high + 1) // 2
    while low <= high:
        changes = {"micro_batch_size": sizes[place], "eval_batch_size": sizes[place]}
        candidate = _evaluate(draft.model_copy(update=changes), target)
        looked_at.append(candidate)
        low, high = (place + 1, high) if candidate.is_safe else (low, place - 1)
        expected = [_expect_share(looked_at, size) for size in sizes[low : high + 1]]
        if expected and expected[0] > _HOPELESS_SHARE:
            break
        place = low + max(0, sum(share <= 1.0 for share in expected) - 1)
    fitting = [candidate for candidate in looked_at if candidate.is_safe]
    return min(fitting, key=lambda one: (one.step_s or 0.0, -one.plan.micro_batch_size)) if fitting else None


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
        start, start_bytes = 0, sum(memory.breakdown.get(part, 0) for part in ("weights", "gradients", "optimizer"))
    slope = (memory.peak_bytes - start_bytes) / (last.plan.micro_batch_size - start)
    expected = memory.peak_bytes + slope * (size - last.plan.micro_batch_size)
    return expected / (_RESERVED_SHARE * memory.limit_bytes)


def _evaluate(plan: Plan, target: Target, *, may_compile: bool = False) -> Candidate:
    # A search looks at many candidates; the compiler takes its time with each, and saves memory with all of them.
    return Candidate(plan, forecast(plan, target, may_compile=may_compile).forecast)


def _is_known(plan: Plan, target: Target) -> bool:
    assert target.capability is not None
    return is_known(plan, target.capability)


def _reasons(chosen: Candidate, found: list[Candidate], has_sizes: bool, has_checkpointing: bool) -> dict[str, str]:
    memory, reasons = chosen.forecast.memory, dict[str, str]()
    if has_sizes:
        reasons["micro_batch_size"] = (
            f"the fastest that fits: {format_bytes(memory.peak_bytes)} of {format_bytes(memory.limit_bytes)}"
        )
    if has_checkpointing:
        others = [other for other in found if other is not chosen]
        if chosen.plan.gradient_checkpointing:
            reasons["gradient_checkpointing"] = (
                "faster, for the larger micro-batch it allows" if others else "does not fit without"
            )
        else:
            reasons["gradient_checkpointing"] = "fits without, so nothing is computed twice"
    return reasons


def _does_not_fit(given: Candidate, target: Target) -> DoesNotFitError:
    """Says what is missing and which changes would fit, each with its figures."""
    plan, memory = given.plan, given.forecast.memory
    what = (
        f"this does not fit {target.name}: a step of {plan.micro_batch_size} x {plan.max_seq_length} tokens needs "
        f"{format_bytes(memory.peak_bytes)}, and {format_bytes(memory.limit_bytes)} can be had"
    )
    static = sum(memory.breakdown.get(part, 0) for part in ("weights", "optimizer"))
    remedies = [row for row in _remedies(plan, target, static > memory.limit_bytes) if row.fits]
    told = plan.model_copy(update={"forecast": given.forecast, "alternatives": tuple(remedies)})
    if static > memory.limit_bytes and not remedies:
        return DoesNotFitError(
            f"{what}; weights and optimizer state alone are {format_bytes(static)}: choose a smaller model, a larger "
            "card, or another method",
            told,
        )
    if not remedies:
        return DoesNotFitError(f"{what}; a single sequence at a time does not fit either: choose a smaller model", told)
    lines = [f"{what}. What would:"]
    for row in remedies:
        words = " ".join(_flag(key, value) for key, value in row.settings.items())
        time = f", {row.step_s:.3g} s a step" if row.step_s else ""
        lines.append(f"  {words}: {format_bytes(row.peak_bytes)}{time}")
    return DoesNotFitError("\n".join(lines), told)


def _remedies(plan: Plan, target: Target, is_state_too_large: bool) -> Iterator[Alternative]:
    """Checkpointing, then smaller micro-batches, then both, until two fit; where none does, state in 8 bits as well."""
    sizes = [size for size in reversed(_micro_batches(plan)) if size < plan.micro_batch_size]
    tried: list[dict[str, Any]] = []
    if not plan.gradient_checkpointing:
        tried.append({"gradient_checkpointing": True})
    for recompute in sorted({plan.gradient_checkpointing, True}):
        kept = {} if recompute == plan.gradient_checkpointing else {"gradient_checkpointing": True}
        tried += [{"micro_batch_size": size, "eval_batch_size": size, **kept} for size in sizes]
    if is_state_too_large:
        tried = []
    if plan.optimizer.name in ("adamw", "paged_adamw") and "adamw_8bit" in other_optimizers(plan):
        smaller = {"optimizer": plan.optimizer.model_copy(update={"name": f"{plan.optimizer.name}_8bit"})}
        tried.append(smaller)
        if not plan.gradient_checkpointing:
            tried.append(smaller | {"gradient_checkpointing": True})
        if sizes:
            tried.append(tried[-1] | {"micro_batch_size": 1, "eval_batch_size": 1})
    num_found = 0
    for changes in tried:
        row = _row(_evaluate(plan.model_copy(update=changes), target), changes)
        yield row
        num_found += row.fits
        if num_found == 2:
            return


def _flag(key: str, value: Any) -> str:
    names = {"micro_batch_size": "per_device_train_batch_size", "optimizer": "optim"}
    return f"--{names.get(key, key)} {str(value).lower()}"
