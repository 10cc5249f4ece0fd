"""The same training with other settings: what else there is, and what would fit where a plan does not.

Compiled rows come by their eager steps first, all of them in seconds each; the compiler takes its time with every row,
so it is asked in the order of what a person would want to know.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from onecard.errors import DoesNotFitError, InputError
from onecard.planner.candidate import Candidate, evaluate, is_answered
from onecard.planner.depth import expect_trace_s
from onecard.planner.device import Target, find_compiler_problem, offered_bytes
from onecard.planner.optimizers import other_optimizers
from onecard.planner.shape import usual_loss_chunk
from onecard.planner.state_size import least_state
from onecard.planner.trace_cache import CannotTrace
from onecard.spec import AdaptPlan, Alternative, Plan
from onecard.units import GIB, format_bytes

_HALF = 0.5
_NUM_REMEDIES = 2
# A change that follows from others, told where it is to be typed.
_FOLLOWING = "eval_batch_size"


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
        shown = {key: value for key, value in self.changes.items() if key != _FOLLOWING}
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
    for changes in _changes(plan, target):
        changed = plan.model_copy(update=changes)
        yield _Rung(changes, evaluate(changed, target, may_compile=is_answered(changed, target)))
    for changes in _other_methods(plan):
        if (candidate := _try_method(plan, changes, target)) is not None:
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


def micro_batches(plan: Plan) -> list[int]:
    """Powers of two up to the whole step, and the whole step."""
    total = plan.rows_per_step
    return [*(1 << power for power in range(total.bit_length()) if 1 << power < total), total]


def does_not_fit(given: Candidate, target: Target) -> DoesNotFitError:
    """Says what is missing and which changes would fit, each with its figures and all that it takes to get them."""
    plan, memory = given.plan, given.forecast.memory
    state_bytes = sum(least_state(plan).values())
    is_state_too_large = state_bytes > memory.limit_bytes
    what = f"this does not fit {target.name}: " + (
        f"weights, gradients and optimizer state alone are {format_bytes(state_bytes)}"
        if is_state_too_large
        else f"a step of {plan.micro_batch_size} x {plan.max_seq_length} tokens needs {format_bytes(memory.peak_bytes)}"
    )
    what += f", and {format_bytes(memory.limit_bytes)} can be had"
    remedies = [*_settings_that_fit(plan, target, is_state_too_large), *_method_that_fits(plan, target)]
    remedies = remedies or [*_limit_that_fits(given, target)]
    told = plan.model_copy(update={"forecast": given.forecast, "alternatives": tuple(remedies)})
    if is_state_too_large and not remedies:
        return DoesNotFitError(f"{what}: choose a smaller model, or a card with more memory", told)
    if not remedies:
        return DoesNotFitError(f"{what}; a single sequence at a time does not fit either: choose a smaller model", told)
    lines = [f"{what}. What would:"]
    for row in remedies:
        words = " ".join(_flag(key, value) for key, value in row.settings.items())
        step = f", {row.step_s:.3g} s a step" if row.step_s else ""
        mark = "" if row.is_refined else ", before compiling"
        lines.append(f"  {words}: {format_bytes(row.peak_bytes)}{step}{mark}")
    return DoesNotFitError("\n".join(lines), told)


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


def _changes(plan: Plan, target: Target) -> Iterator[dict[str, Any]]:
    micro, length = plan.micro_batch_size, plan.max_seq_length
    for size in (2 * micro, micro // 2, 1):
        if 1 <= size <= plan.rows_per_step and size != micro:
            yield _micro_batch(plan, size)
    for share in (False, _HALF, True):
        if share != plan.gradient_checkpointing:
            yield {"gradient_checkpointing": share}
    yield from _other_losses(plan)
    may_compile = plan.attn_implementation != "apart" and find_compiler_problem(target) is None
    if plan.torch_compile or may_compile:
        yield {"torch_compile": not plan.torch_compile}
    for name in other_optimizers(plan):
        yield {"optimizer": plan.optimizer.model_copy(update={"name": name})}
    if length >= 128:
        # The same tokens per step, in shorter sequences; as many chats, which are cut.
        total = plan.total_batch_size if plan.task == "sft" else 2 * plan.total_batch_size
        yield {"max_seq_length": length // 2, "total_batch_size": total}


def _micro_batch(plan: Plan, size: int) -> dict[str, Any]:
    """Another micro-batch, with the total that keeps the step as it is whatever a recipe accumulates."""
    evaluation = min(plan.eval_batch_size, size)
    return {"micro_batch_size": size, "total_batch_size": plan.total_batch_size, "eval_batch_size": evaluation}


def _other_losses(plan: Plan) -> Iterator[dict[str, Any]]:
    """The loss in chunks where it is not, and with all logits at once where they are more than a chunk's."""
    usual = usual_loss_chunk(plan.model, "cuda")
    if plan.loss_chunk_size == "full":
        yield {"loss_chunk_size": usual}
    elif plan.micro_batch_size * plan.max_seq_length > (plan.loss_chunk_size or usual):
        yield {"loss_chunk_size": "full"}


def _other_methods(plan: Plan) -> Iterator[dict[str, Any]]:
    """Other methods for a run that starts from a model, adapters as recipes have them by default."""
    if plan.model.base is None:
        return
    if plan.adapt is not None:
        yield {"adapt": None}
    for method in ("lora", "qlora"):
        if (plan.adapt is None or plan.adapt.method != method) and (method == "lora" or find_spec("bitsandbytes")):
            given = plan.adapt.model_dump() if plan.adapt else {}
            yield {"adapt": AdaptPlan(**given | {"method": method})}


def _try_method(plan: Plan, changes: dict[str, Any], target: Target) -> Candidate | None:
    """Forecasts a plan with another method; None for a model that cannot be adapted so."""
    changed = plan.model_copy(update=changes)
    try:
        return evaluate(changed, target, may_compile=is_answered(changed, target))
    except (InputError, CannotTrace):
        return None


def _settings_that_fit(plan: Plan, target: Target, is_state_too_large: bool) -> Iterator[Alternative]:
    """No compiler, checkpointing, smaller micro-batches, both, until two fit; where none does, state in 8 bits, too."""
    sizes = [size for size in reversed(micro_batches(plan)) if size < plan.micro_batch_size]
    recomputes_all = plan.gradient_checkpointing == 1
    tried = [changes for changes in _other_losses(plan) if plan.loss_chunk_size == "full"]
    if plan.torch_compile:
        tried.append({"torch_compile": False})
    if not recomputes_all:
        tried.append({"gradient_checkpointing": True})
    for kept in [{}] if recomputes_all else [{}, {"gradient_checkpointing": True}]:
        tried += [_micro_batch(plan, size) | kept for size in sizes]
    if is_state_too_large:
        tried = []
    if plan.optimizer.name in ("adamw", "paged_adamw") and "adamw_8bit" in other_optimizers(plan):
        smaller = {"optimizer": plan.optimizer.model_copy(update={"name": f"{plan.optimizer.name}_8bit"})}
        tried.append(smaller)
        if not recomputes_all:
            tried.append(smaller | {"gradient_checkpointing": True})
        if sizes:
            tried.append(tried[-1] | _micro_batch(plan, 1))
    num_found = 0
    for changes in tried:
        changed = plan.model_copy(update=changes)
        if _may_hold(changed) and (row := row_of(evaluate(changed, target), changes)).fits:
            yield row
            num_found += 1
        if num_found == _NUM_REMEDIES:
            return


def _method_that_fits(plan: Plan, target: Target) -> Iterator[Alternative]:
    """The first of the methods with less state that fits: by itself, recomputing, and with single sequences, too."""
    recomputing: list[dict[str, Any]] = [] if plan.gradient_checkpointing == 1 else [{"gradient_checkpointing": True}]
    single = _micro_batch(plan, 1) | {"gradient_checkpointing": True}
    for method in _other_methods(plan):
        if method["adapt"] is None or (method["adapt"].method == "lora" and plan.adapt is not None):
            continue  # has more state, not less
        if not _may_hold(plan.model_copy(update=method)):
            continue
        for more in ({}, *recomputing, single):
            candidate = _try_method(plan, method | more, target)
            if candidate is not None and candidate.forecast.memory.fits:
                yield row_of(candidate, method | more)
                return


def _may_hold(plan: Plan) -> bool:
    """Whether there is room for what stays, so that a trace may tell more: that of a large model takes minutes."""
    return sum(least_state(plan).values()) <= (plan.memory_limit_bytes or 0)


def _limit_that_fits(given: Candidate, target: Target) -> Iterator[Alternative]:
    """The plan as it is, where only its own memory_limit_gb is in the way."""
    memory, offered = given.forecast.memory, offered_bytes(target)
    enough_gb = math.ceil(10 * memory.peak_bytes / GIB) / 10
    if offered is not None and memory.limit_bytes < offered and enough_gb * GIB <= offered:
        yield row_of(given, {"memory_limit_gb": enough_gb}).model_copy(update={"fits": True})


def _flag(key: str, value: Any) -> str:
    names = {
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "optimizer": "optim",
    }
    return f"--{names.get(key, key)} {str(value).lower()}"
