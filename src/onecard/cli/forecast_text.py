"""A forecast as short lines, a bar picture and a JSON document."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onecard.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from onecard.spec import Alternative, Plan, TimeForecast

_BAR_WIDTH = 48
_FULL, _EMPTY = "█", "·"
_NO_FORECAST = ("fits", "peak_bytes", "context_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes")
_MEMORY_KEYS = (
    *(*_NO_FORECAST, "limit_bytes", "breakdown", "peak_phase", "phase_bytes", "host_peak_bytes", "disk_bytes", "note"),
)
_TIME_KEYS = (
    *("step_s", "step_low_s", "step_high_s", "tokens_per_s", "total_s", "limited_by", "share_of_peak", "energy_wh"),
)


def forecast_rows(plan: "Plan") -> list[tuple[str, str]]:
    """Says how much memory and time a plan takes: label and text per row; nothing for a plan without a forecast."""
    if plan.forecast is None:
        return []
    memory = plan.forecast.memory
    verdict = "fits" if memory.fits else "does NOT fit"
    rows = [
        (
            "memory",
            f"{verdict}: {format_bytes(memory.peak_bytes)} ({format_bytes(memory.peak_low_bytes)} to "
            f"{format_bytes(memory.peak_high_bytes)}) of {format_bytes(memory.limit_bytes)} that "
            f"{_who_has(plan, memory.context_bytes)}; fullest in: {memory.peak_phase}",
        ),
        *([("", memory.note)] if memory.note else []),
        ("phases", ", ".join(f"{phase} {format_bytes(size)}" for phase, size in _phases(memory.phase_bytes))),
        ("host, disk", f"{format_bytes(memory.host_peak_bytes)} of RAM, {format_bytes(memory.disk_bytes)} on the disk"),
    ]
    if plan.forecast.time is not None:
        rows += _time_rows(plan, plan.forecast.time)
    return rows


def _who_has(plan: "Plan", context_bytes: int) -> str:
    if plan.device == "cpu":
        return "are free"
    return f"PyTorch can have, besides {format_bytes(context_bytes)} for CUDA"


def _phases(phase_bytes: dict[str, int]) -> list[tuple[str, int]]:
    """The fullest moment of each phase in the order of a run, without what others begin with."""
    return [(phase, size) for phase, size in phase_bytes.items() if phase not in ("resident", "batch")]


def bar_lines(plan: "Plan") -> list[str]:
    """Draws what fills the card: a bar per part, on the scale of what can be had."""
    if plan.forecast is None:
        return []
    memory = plan.forecast.memory
    scale = max(memory.limit_bytes, memory.peak_bytes)
    shown = {part: num_bytes for part, num_bytes in memory.breakdown.items() if num_bytes >= scale / 1000}
    if memory.limit_bytes > memory.peak_bytes:
        shown["free"] = memory.limit_bytes - memory.peak_bytes
    width = max(map(len, shown))
    lines, before = [], 0
    for part, num_bytes in shown.items():
        start, end = (round(_BAR_WIDTH * edge / scale) for edge in (before, before + num_bytes))
        bar = _EMPTY * start + _FULL * max(1, end - start)
        lines.append(f"  {part:{width}}  {bar[:_BAR_WIDTH]:{_EMPTY}<{_BAR_WIDTH}}  {format_bytes(num_bytes):>9}")
        before += num_bytes
    return lines


def alternative_row(row: "Alternative") -> tuple[str, ...]:
    """One row of the ladder: what is changed, memory, time of a step, whether it fits."""
    time = "" if row.step_s is None else f"{row.step_s:.3g} s a step"
    mark = ", interpolated" if row.is_interpolated else "" if row.is_refined else ", before compiling"
    return changes_of(row), format_bytes(row.peak_bytes), time, ("fits" if row.fits else "does not fit") + mark


def changes_of(row: "Alternative") -> str:
    """What an alternative changes, in words."""
    return ", ".join(f"{name} {_word(value)}" for name, value in row.settings.items()) or "as planned"


def card_row(plan: "Plan", host: str) -> tuple[str, ...]:
    """One card of several side by side."""
    assert plan.forecast is not None
    memory, time = plan.forecast.memory, plan.forecast.time
    return (
        plan.forecast.card,
        host,
        "fits" if memory.fits else "does not fit",
        f"{format_bytes(memory.peak_bytes)} of {format_bytes(memory.limit_bytes)}",
        f"{plan.micro_batch_size} x {plan.num_micro_batches}" + _recomputed(plan.gradient_checkpointing),
        "" if time is None else f"{format_count(time.tokens_per_s)} tokens/s",
        "" if time is None else format_seconds(time.total_s),
    )


def card_notes(plans: "Iterable[Plan]") -> list[str]:
    """What the figures of several cards side by side leave open, a line for each note and the cards it is about."""
    cards: dict[str, list[str]] = {}
    for plan in plans:
        if plan.forecast is not None and plan.forecast.memory.note:
            for note in plan.forecast.memory.note.split("; "):
                cards.setdefault(note, []).append(plan.forecast.card)
    return [f"{', '.join(names)}: {note}" for note, names in cards.items()]


def _recomputed(share: float) -> str:
    if 0 < share < 1:
        return f", {share:.0%} recomputed"
    return ", recomputed" if share else ""


def plan_document(plan: "Plan", alternatives: "Iterable[Alternative]" = ()) -> dict[str, Any]:
    """The plan for programs; forecasts of a plan for a CPU are null."""
    forecast = plan.forecast
    memory = forecast.memory.model_dump(mode="json") if forecast else {}
    time = forecast.time.model_dump(mode="json") if forecast and forecast.time else {}
    settings = plan.model_dump(mode="json", exclude={"forecast", "alternatives", "reasons"})
    return {
        "card": forecast.card if forecast else None,
        "is_refined": forecast.is_refined if forecast else None,
        "is_interpolated": forecast.is_interpolated if forecast else None,
        **{key: memory.get(key) for key in _MEMORY_KEYS},
        **{key: time.get(key) for key in _TIME_KEYS},
        "settings": settings,
        "choices": plan.reasons,
        "alternatives": [row.model_dump(mode="json") for row in alternatives],
    }


def _time_rows(plan: "Plan", time: "TimeForecast") -> list[tuple[str, str]]:
    device = "CPU" if plan.device == "cpu" else "card"
    energy = "" if time.energy_wh is None else f", {_kwh(*time.energy_wh)} kWh"
    return [
        (
            "speed",
            f"{time.step_s:.3g} s a step ({time.step_low_s:.3g} to {time.step_high_s:.3g}), "
            f"{format_count(time.tokens_per_s)} tokens/s, "
            f"{time.share_of_peak:.0%} of the {device}'s peak; limited by {time.limited_by}",
        ),
        ("whole run", f"{format_seconds(time.total_s)}{energy}{_per_parameter(plan)}"),
    ]


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
