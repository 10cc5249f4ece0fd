"""A forecast as short lines, a bar picture and a JSON document."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from onecard.spec import Alternative, MemoryForecast, Plan, TimeForecast

_BAR_WIDTH = 48
_LEAST_BAR_WIDTH = 10
# Indent, two gaps and a size.
_BESIDE_BAR = 15
# Of the peak: smaller parts share a bar.
_LEAST_SHARE = 0.01
# Less than that does not show in the digits of the sum.
_TOLD_SHARE = 0.0005
_FULL, _EMPTY = "█", "·"
_NO_FORECAST = ("fits", "peak_bytes", "context_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes")
_MEMORY_KEYS = (
    *(*_NO_FORECAST, "limit_bytes", "breakdown", "peak_phase", "phase_bytes", "host_peak_bytes", "disk_bytes"),
    *("host_other_bytes", "host_machine_bytes"),
)
_TIME_KEYS = (
    *("step_s", "step_low_s", "step_high_s", "tokens_per_s", "total_s", "limited_by", "share_of_peak", "energy_wh"),
    *("evaluation_s", "num_evaluations", "save_s", "num_saves"),
    *("communication_s", "exposed_communication_s", "efficiency"),
)


def forecast_rows(plan: "Plan") -> list[tuple[str, str]]:
    """Says how much memory and time a plan takes: label and text per row; nothing for a plan without a forecast."""
    if plan.forecast is None:
        return []
    memory = plan.forecast.memory
    # Whatever a plan says of a memory limit is that it changes nothing.
    remarks = [text for text in (memory.note, plan.reasons.get("memory_limit_bytes")) if text]
    verdict = "fits" if memory.fits else "does NOT fit"
    rows = [
        (
            "memory",
            f"{verdict}: {format_bytes(memory.peak_bytes)} ({format_bytes(memory.peak_low_bytes)} to "
            f"{format_bytes(memory.peak_high_bytes)}) of {format_bytes(memory.limit_bytes)} that "
            f"{_who_has(plan, memory)}; fullest in: {memory.peak_phase}",
        ),
        *(("", text) for text in remarks),
        ("tensors in", ", ".join(f"{phase} {format_bytes(size)}" for phase, size in _phases(memory.phase_bytes))),
        (
            "host, disk",
            f"{format_bytes(memory.host_peak_bytes)} of RAM{_others(memory)}, {format_bytes(memory.disk_bytes)} on the "
            "disk",
        ),
    ]
    if plan.forecast.time is not None:
        rows += _time_rows(plan, plan.forecast.time)
    return rows


def _who_has(plan: "Plan", memory: "MemoryForecast") -> str:
    if plan.device == "cpu":
        return "are free" if memory.host_other_bytes is None else "the other processes leave"
    each = " each" if plan.forecast is not None and plan.forecast.num_ranks > 1 else ""
    return f"PyTorch can have, besides {format_bytes(memory.context_bytes)} for CUDA{each}"


def _others(memory: "MemoryForecast") -> str:
    """What other processes on the machine of the first take."""
    if memory.host_other_bytes is None or memory.host_machine_bytes is None:
        return ""
    return (
        f" in the first process and {format_bytes(memory.host_other_bytes)} in each other, "
        f"{format_bytes(memory.host_machine_bytes)} a machine"
    )


def _phases(phase_bytes: dict[str, int]) -> list[tuple[str, int]]:
    """The fullest moment of each phase in the order of a run, without what others begin with."""
    return [(phase, size) for phase, size in phase_bytes.items() if phase not in ("resident", "batch")]


def bar_lines(plan: "Plan", columns: int | None = None) -> list[str]:
    """Draws what fills the card: a bar per part, on the scale of what can be had, in lines of up to `columns`."""
    if plan.forecast is None:
        return []
    memory = plan.forecast.memory
    scale = max(memory.limit_bytes, memory.peak_bytes) + memory.breakdown.get("CUDA context", 0)
    shown = _shown_parts(memory.breakdown)
    if memory.limit_bytes > memory.peak_bytes:
        shown["free"] = memory.limit_bytes - memory.peak_bytes
    labels = max(map(len, shown))
    width = _BAR_WIDTH if columns is None else max(_LEAST_BAR_WIDTH, min(_BAR_WIDTH, columns - labels - _BESIDE_BAR))
    lines, before = [], 0
    for part, num_bytes in shown.items():
        start, end = (round(width * edge / scale) for edge in (before, before + num_bytes))
        # However little it is, it can be seen.
        start = min(start, width - 1)
        bar = _EMPTY * start + _FULL * max(1, end - start)
        lines.append(f"  {part:{labels}}  {bar:{_EMPTY}<{width}}  {format_bytes(num_bytes):>9}")
        before += num_bytes
    return lines


def _shown_parts(breakdown: dict[str, int]) -> dict[str, int]:
    """The parts that are worth a bar, and what the others are together: they add up to the peak."""
    total = sum(breakdown.values())
    shown = {part: num_bytes for part, num_bytes in breakdown.items() if num_bytes >= _LEAST_SHARE * total}
    if (rest := total - sum(shown.values())) >= _TOLD_SHARE * total:
        shown["other"] = rest
    return shown


def alternative_row(row: "Alternative") -> tuple[str, ...]:
    """One row of the ladder: what is changed, memory, time of a step, whether it fits."""
    time = "" if row.step_s is None else f"{row.step_s:.3g} s a step"
    mark = ", interpolated" if row.is_interpolated else "" if row.is_refined else ", before compiling"
    return changes_of(row), format_bytes(row.peak_bytes), time, ("fits" if row.fits else "does not fit") + mark


def changes_of(row: "Alternative") -> str:
    """What an alternative changes, in words."""
    return ", ".join(f"{name} {_word(value)}" for name, value in row.settings.items()) or "as planned"


def plan_document(plan: "Plan", alternatives: "Iterable[Alternative]" = ()) -> dict[str, Any]:
    """The plan for programs; forecasts of a plan for a CPU are null."""
    forecast = plan.forecast
    memory = forecast.memory.model_dump(mode="json") if forecast else {}
    time = forecast.time.model_dump(mode="json") if forecast and forecast.time else {}
    notes = [text for text in (memory.get("note"), time.get("note")) if text]
    settings = plan.model_dump(mode="json", exclude={"forecast", "alternatives", "reasons"})
    return {
        "card": forecast.card if forecast else None,
        "num_ranks": forecast.num_ranks if forecast else None,
        "strategy": plan.strategy if forecast and forecast.num_ranks > 1 else None,
        "is_refined": forecast.is_refined if forecast else None,
        "is_interpolated": forecast.is_interpolated if forecast else None,
        **{key: memory.get(key) for key in _MEMORY_KEYS},
        **{key: time.get(key) for key in _TIME_KEYS},
        "note": "; ".join(notes) or None,
        "time_note": time.get("note"),
        "settings": settings,
        "choices": plan.reasons,
        "alternatives": [row.model_dump(mode="json") for row in alternatives],
    }


def _time_rows(plan: "Plan", time: "TimeForecast") -> list[tuple[str, str]]:
    device = "CPU" if plan.device == "cpu" else "card"
    num_ranks = plan.forecast.num_ranks if plan.forecast else 1
    energy = "" if time.energy_wh is None else f", {_kwh(*time.energy_wh)} kWh"
    return [
        (
            "speed",
            f"{time.step_s:.3g} s a step ({time.step_low_s:.3g} to {time.step_high_s:.3g}), "
            f"{format_count(time.tokens_per_s)} tokens/s, "
            f"{time.share_of_peak:.0%} of the {device}'s peak; limited by {time.limited_by}",
        ),
        *([("together", _communication(time, num_ranks))] if time.communication_s is not None else []),
        *([("", time.note)] if time.note else []),
        ("whole run", f"{format_seconds(time.total_s)}{energy}{_per_parameter(plan)}"),
        *([("of it", aside)] if (aside := _beside_steps(plan, time)) else []),
    ]


def _communication(time: "TimeForecast", num_ranks: int) -> str:
    """What several cards lose to one another."""
    assert time.exposed_communication_s is not None
    assert time.efficiency is not None
    return (
        f"{time.efficiency:.0%} of {num_ranks} times one card's speed with such micro-batches; communication "
        f"{time.communication_s:.3g} s a step, {time.exposed_communication_s:.3g} of them waited for"
    )


def _beside_steps(plan: "Plan", time: "TimeForecast") -> str:
    """What the whole run holds besides its steps, and what it does not hold."""
    told = [
        f"{count} {what if count == 1 else f'{what}s'} of {seconds:.2g} s"
        for count, what, seconds in (
            (time.num_evaluations, "evaluation", time.evaluation_s),
            (time.num_saves, "checkpoint", time.save_s),
        )
        if count and seconds is not None
    ]
    if told and plan.sample_prompts:
        told.append("samples come on top")
    return ", ".join(told)


def _per_parameter(plan: "Plan") -> str:
    """Says whether a model from scratch sees enough text; one that was trained before has seen it."""
    if plan.model.base is not None:
        return ""
    return f"; {plan.schedule.num_steps * plan.tokens_per_step / plan.model.num_parameters:.1f} tokens per parameter"


def _kwh(low_wh: float, high_wh: float) -> str:
    low, high = f"{low_wh / 1000:.2g}", f"{high_wh / 1000:.2g}"
    return low if low == high else f"{low} to {high}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
