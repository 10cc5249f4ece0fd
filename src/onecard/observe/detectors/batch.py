"""Other sizes of a step, for remedies: the setting, and what the plan says of it."""

from typing import Any

from onecard.observe.detectors.history import History
from onecard.observe.detectors.phrases import phrase
from onecard.spec import Alternative, Plan
from onecard.units import format_bytes, format_count


def micro_batch_setting(plan: Plan, size: int) -> str:
    """Names a micro-batch of so many rows and, beside it, what keeps the step as it is.

    A recipe that has `gradient_accumulation_steps` would refuse the size alone.
    """
    if plan.packing == "off" and plan.total_batch_size % size == 0:
        beside = f"gradient_accumulation_steps: {plan.total_batch_size // size}"
    else:  # of packed chats the rows are counted, of a step the chats
        beside = f"total_batch_size: {plan.total_batch_size}"
    return f"per_device_train_batch_size: {size}, {beside}"


def smaller_batch(history: History) -> tuple[str, str]:
    """Half the micro-batch: setting and effect, both empty where a single row is one."""
    size = history.plan.micro_batch_size // 2
    if not size:
        return "", ""
    return micro_batch_setting(history.plan, size), effect_of(history, resized(history.plan, size))


def resized(plan: Plan, size: int) -> dict[str, Any]:
    """What changes in a plan with another micro-batch."""
    return {"micro_batch_size": size, "eval_batch_size": min(plan.eval_batch_size, size)}


def effect_of(history: History, changes: dict[str, Any]) -> str:
    """What the plan foretells of some changes; empty where it cannot."""
    row = history.foresee(changes)
    return "" if row is None else describe(history.plan, changes, row)


def describe(plan: Plan, changes: dict[str, Any], row: Alternative) -> str:
    """Says step, speed and memory of a row of the plan's ladder beside those of the plan."""
    memory = format_bytes(row.peak_bytes)
    time = plan.forecast.time if plan.forecast else None
    if time is None or row.step_s is None:
        return phrase("planned-memory", memory=memory)
    return phrase(
        "planned",
        step=f"{row.step_s:.3g}",
        now=f"{time.step_s:.3g}",
        speed=format_count(plan.model_copy(update=changes).tokens_per_step / row.step_s),
        speed_now=format_count(time.tokens_per_s),
        memory=memory,
    )
