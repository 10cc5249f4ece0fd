"""Where a plan does not fit: what would, each change with its figures."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onecard.errors import DoesNotFitError
from onecard.planner.candidate import Candidate, evaluate
from onecard.planner.changes import other_losses, other_methods, other_strategies, with_micro_batch
from onecard.planner.device import Target, offered_bytes
from onecard.planner.ladder import row_of, try_method
from onecard.planner.optimizers import other_optimizers
from onecard.planner.ranks import even_sizes
from onecard.planner.state_size import least_state
from onecard.spec import Alternative, Plan
from onecard.spec.forecast import MOST_RANKS
from onecard.units import GIB, format_bytes

_NUM_REMEDIES = 2


def does_not_fit(given: Candidate, target: Target) -> DoesNotFitError:
    """Says what is missing and which changes would fit, each with its figures and all that it takes to get them."""
    plan, memory = given.plan, given.forecast.memory
    state_bytes = sum(least_state(plan, target.num_ranks).values())
    is_state_too_large = state_bytes > memory.limit_bytes
    what = f"this does not fit {target.name}: " + (
        f"weights, gradients and optimizer state alone are {format_bytes(state_bytes)}"
        if is_state_too_large
        else f"a step of {plan.micro_batch_size} x {plan.max_seq_length} tokens needs {format_bytes(memory.peak_bytes)}"
    )
    what += f", and {format_bytes(memory.limit_bytes)} can be had"
    remedies = [*_settings_that_fit(plan, target, is_state_too_large), *_method_that_fits(plan, target)]
    remedies += _groups_that_fit(plan, target)
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


def _settings_that_fit(plan: Plan, target: Target, is_state_too_large: bool) -> Iterator[Alternative]:
    """No compiler, checkpointing, smaller micro-batches, both, until two fit; where none does, state in 8 bits, too."""
    sizes = [size for size in reversed(even_sizes(plan, target.num_ranks)) if size < plan.micro_batch_size]
    recomputes_all = plan.gradient_checkpointing == 1
    tried = [changes for changes in other_losses(plan) if plan.loss_chunk_size == "full"]
    if plan.torch_compile:
        tried.append({"torch_compile": False})
    if not recomputes_all:
        tried.append({"gradient_checkpointing": True})
    for kept in [{}] if recomputes_all else [{}, {"gradient_checkpointing": True}]:
        tried += [with_micro_batch(plan, size) | kept for size in sizes]
    if is_state_too_large:
        tried = []
    if plan.optimizer.name in ("adamw", "paged_adamw") and "adamw_8bit" in other_optimizers(plan):
        smaller = {"optimizer": plan.optimizer.model_copy(update={"name": f"{plan.optimizer.name}_8bit"})}
        tried.append(smaller)
        if not recomputes_all:
            tried.append(smaller | {"gradient_checkpointing": True})
        if sizes:
            tried.append(tried[-1] | with_micro_batch(plan, 1))
    num_found = 0
    for changes in tried:
        changed = plan.model_copy(update=changes)
        if _may_hold(changed, target.num_ranks) and (row := row_of(evaluate(changed, target), changes)).fits:
            yield row
            num_found += 1
        if num_found == _NUM_REMEDIES:
            return


def _method_that_fits(plan: Plan, target: Target) -> Iterator[Alternative]:
    """The first of the methods with less state that fits: by itself, recomputing, and with single sequences, too."""
    recomputing: list[dict[str, Any]] = [] if plan.gradient_checkpointing == 1 else [{"gradient_checkpointing": True}]
    single = with_micro_batch(plan, 1) | {"gradient_checkpointing": True}
    for method in other_methods(plan):
        if method["adapt"] is None or (method["adapt"].method == "lora" and plan.adapt is not None):
            continue  # has more state, not less
        if not _may_hold(plan.model_copy(update=method), target.num_ranks):
            continue
        for more in ({}, *recomputing, single):
            candidate = try_method(plan, method | more, target)
            if candidate is not None and candidate.forecast.memory.fits:
                yield row_of(candidate, method | more)
                return


def _may_hold(plan: Plan, num_ranks: int) -> bool:
    """Whether there is room for what stays, so that a trace may tell more: that of a large model takes minutes."""
    return sum(least_state(plan, num_ranks).values()) <= (plan.memory_limit_bytes or 0)


def _groups_that_fit(plan: Plan, target: Target) -> Iterator[Alternative]:
    """State in parts, and then on up to eight times as many cards: the first that fits."""
    if target.group is None or plan.adapt is not None:
        return
    strategies = [{}] if plan.strategy == "fsdp" else [*other_strategies(plan, target)]
    for changes in strategies:
        changed = plan.model_copy(update=changes)
        for factor in (1, 2, 4, 8):
            num = factor * target.num_ranks
            if num > min(plan.rows_per_step, MOST_RANKS) or (factor == 1 and not changes):
                continue
            size = even_sizes(changed, num)[0] if factor > 1 else changed.micro_batch_size
            on_more = replace(target, group=target.group.model_copy(update={"num": num}))
            smaller = changes | ({} if size == plan.micro_batch_size else with_micro_batch(plan, size))
            candidate_plan = plan.model_copy(update=smaller)
            if not _may_hold(candidate_plan, num):
                continue
            candidate = evaluate(candidate_plan, on_more)
            if candidate.forecast.memory.fits:
                yield row_of(candidate, smaller | ({"num_processes": num} if factor > 1 else {}))
                return


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
