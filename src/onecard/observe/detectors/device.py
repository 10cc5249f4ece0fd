"""Why a device computes less than it could: its load, heat, power, and others on it."""

from collections.abc import Sequence
from typing import Any

from onecard.observe.detectors.batch import describe, effect_of, micro_batch_setting, resized, smaller_batch
from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import NUM_READINGS, OTHERS_CPU_SHARE, History, mean
from onecard.observe.detectors.phrases import phrase
from onecard.observe.detectors.speed import (
    find_frequent_evaluation,
    find_frequent_saving,
    find_starvation,
    typical_step_s,
)
from onecard.observe.events import DeviceEvent
from onecard.spec import Finding
from onecard.units import GIB, format_bytes

_IDLE_SHARE = 0.7
_LIMIT_SHARE = 0.8
# Beyond the plan's own band; forecasts of cards that nobody measured yet are coarse.
_SLOWER = 1.5
_HEAT = ("sw_thermal", "hw_thermal")
_POWER_FAILURE = ("power_brake",)
# Their driver pages memory of the card to that of the machine, and does not tell a desktop from what computes.
_WINDOWS = ("windows", "wsl")


def find_idle_gpu(history: History) -> Finding | None:
    """A GPU that is not busy, for reasons other than data and saving."""
    readings = _last_readings(history)
    shares = [reading.gpu_share for reading in readings if reading.gpu_share is not None]
    if not history.is_on_gpu or len(shares) < NUM_READINGS or not history.is_long_enough():
        return None
    # While it rests nobody expects anything of it.
    share = min(1.0, mean(shares) / history.may_compute)
    if share >= _IDLE_SHARE or any(find(history) for find in (find_starvation, find_frequent_saving)):
        return None
    how = "idle-card" if history.may_compute == 1 else "idle-card-resting"
    evidence = phrase(how, share=f"{share:.0%}", num=len(shares))
    plan = history.plan
    # Where compiling was not switched off by name, it would be refused, fail, or come too late to pay.
    if not plan.torch_compile and plan.reasons.get("torch_compile") == "asked for":
        effect = effect_of(history, {"torch_compile": True})
        return make_finding(
            "compile-missing", f"{evidence}; {phrase('not-compiled')}", "torch_compile: true", effect=effect
        )
    if (changes := _larger_batch(history)) is None:
        return None
    row = history.foresee(changes)
    # Of what was measured twice as much may fit, and the plan know better.
    if row is not None and not row.fits:
        return None
    cut = phrase("micro-batches", total=plan.total_batch_size, num=plan.num_micro_batches)
    effect = "" if row is None else describe(plan, changes, row)
    return make_finding("batch-too-small", f"{evidence}; {cut}", _name_batch(history, changes), effect=effect)


def _larger_batch(history: History) -> dict[str, Any] | None:
    """What gives the card up to twice as much at a time; None where that may be more than it has memory for."""
    plan, taken = history.plan, history.steps[-1].memory_bytes
    limit = plan.memory_limit_bytes
    if limit is None and history.devices:
        limit = history.devices[-1].card_total_bytes
    if taken is not None and limit is not None and 2 * taken > limit:
        return None
    if plan.num_micro_batches == 1:
        return {"total_batch_size": 2 * plan.total_batch_size, "micro_batch_size": 2 * plan.micro_batch_size}
    return resized(plan, min(2 * plan.micro_batch_size, plan.rows_per_step))


def _name_batch(history: History, changes: dict[str, Any]) -> str:
    if (total := changes.get("total_batch_size")) is not None:
        return f"total_batch_size: {total}, {phrase('half-the-steps')}"
    return micro_batch_setting(history.plan, changes["micro_batch_size"])


def find_heat(history: History) -> Finding | None:
    hot = _held(history, _HEAT)
    if not hot:
        return None
    degrees = [reading.temperature_c for reading in hot if reading.temperature_c is not None]
    limit = hot[-1].usual_power_limit_w or hot[-1].power_limit_w
    setting = phrase("power-limit", watts=f"{0.8 * limit:.0f}") if limit else ""
    told = [phrase("slowed-by-heat", num=len(hot), all=len(_last_readings(history)))]
    told += [phrase("degrees", degrees=f"{max(degrees):.0f}")] if degrees else []
    return make_finding("throttled-by-heat", "; ".join(told), setting)


def find_weak_power(history: History) -> Finding | None:
    """Power that something holds back; that a card at full load meets its own limit is as it should be."""
    readings = _last_readings(history)
    if held := _held(history, _POWER_FAILURE):
        evidence = phrase("power-brake", num=len(held), all=len(readings))
        return make_finding("throttled-by-power", evidence, "")
    capped = _held(history, ("sw_power_cap",))
    if not capped:
        return None
    limit, usual = capped[-1].power_limit_w, capped[-1].usual_power_limit_w
    if limit is None or usual is None or limit >= _LIMIT_SHARE * usual:
        return None
    return make_finding(
        "throttled-by-power",
        f"{phrase('power-capped', limit=f'{limit:.0f}')}; {phrase('usual-power', usual=f'{usual:.0f}')}",
        f"{phrase('power-limit', watts=f'{usual:.0f}')}, {phrase('unless-meant')}",
        effect=phrase("more-power", factor=f"{usual / limit:.1f}"),
    )


def find_battery(history: History) -> Finding | None:
    if len(history.devices) < 2 or not all(reading.on_battery for reading in history.devices[-2:]):
        return None
    return make_finding("on-battery", phrase("discharging"), "")


def find_others_on_card(history: History) -> Finding | None:
    """Others that compute on the card while its steps are slow."""
    readings = _last_readings(history)
    with_others = [reading for reading in readings if reading.num_others]
    slowness = find_slowness_figures(history)
    # What merely rests there, as a desktop does, is nobody's concern.
    if not history.is_on_gpu or len(with_others) < NUM_READINGS or slowness is None:
        return None
    last = with_others[-1]
    evidence = phrase("others", num=last.num_others)
    if last.others_bytes:
        evidence = phrase("others-hold", num=last.num_others, size=format_bytes(last.others_bytes))
    if history.surroundings.platform in _WINDOWS:
        # The programs of a desktop are listed with those that compute: only more of them than at first say anything.
        before = max(reading.num_others or 0 for reading in history.devices[:NUM_READINGS])
        if min(reading.num_others or 0 for reading in with_others) <= before:
            return None
        evidence = phrase("programs", num=last.num_others, before=before)
    return make_finding("card-shared", f"{evidence}; {slowness}", "")


def find_spilling(history: History) -> Finding | None:
    """A card that is full, by whomever, where the driver moves memory off it instead of refusing more."""
    reading = next((r for r in reversed(history.devices) if r.card_bytes and r.card_total_bytes), None)
    slowness = find_slowness_figures(history)
    if history.surroundings.platform not in _WINDOWS or reading is None or slowness is None:
        return None
    taken, total = reading.card_bytes or 0, reading.card_total_bytes or 0
    if taken < total - GIB // 2:
        return None
    full = phrase("full-card", taken=format_bytes(taken), total=format_bytes(total))
    return make_finding("memory-spilled", f"{full}; {slowness}", *smaller_batch(history))


def find_busy_cpu(history: History) -> Finding | None:
    share, slowness = history.others_cpu_share, find_slowness_figures(history)
    if slowness is None or share < OTHERS_CPU_SHARE:
        return None
    threads = history.plan.num_threads or history.surroundings.num_cores
    return make_finding(
        "cpu-shared",
        f"{phrase('busy-cpu', share=f'{share:.0%}')}; {slowness}",
        phrase("fewer-threads", num=threads - 1) if threads > 1 and not history.is_on_gpu else "",
    )


def find_slowness(history: History) -> Finding | None:
    """Steps beyond the plan's band that nothing else explains."""
    slowness = find_slowness_figures(history)
    explanations = (
        *(find_starvation, find_frequent_saving, find_frequent_evaluation),
        *(find_idle_gpu, find_heat, find_weak_power, find_battery),
        *(find_others_on_card, find_spilling, find_busy_cpu),
    )
    if slowness is None or any(find(history) for find in explanations):
        return None
    return make_finding("slower-than-planned", slowness, "")


def find_slowness_figures(history: History) -> str | None:
    """Says by how much steps are slower than the plan's band; None where they are not, or nothing was planned."""
    time = history.plan.forecast.time if history.plan.forecast else None
    if time is None or not history.is_long_enough():
        return None
    taken_s = typical_step_s(history)
    if taken_s <= _SLOWER * time.step_high_s:
        return None
    return phrase(
        "slower",
        step=f"{taken_s:.3g}",
        planned=f"{time.step_s:.3g}",
        low=f"{time.step_low_s:.3g}",
        high=f"{time.step_high_s:.3g}",
    )


def _last_readings(history: History) -> list[DeviceEvent]:
    return history.devices[-NUM_READINGS:]


def _held(history: History, reasons: Sequence[str]) -> list[DeviceEvent]:
    """The last readings in which a reason held, if it did in most of them."""
    readings = _last_readings(history)
    held = [reading for reading in readings if any(reason in reading.throttled_by for reason in reasons)]
    return held if len(readings) == NUM_READINGS and len(held) > len(readings) / 2 else []
