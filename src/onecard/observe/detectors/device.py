"""Why a device computes less than it could: its load, heat, power, and others on it."""

from collections.abc import Sequence
from typing import Any

from onecard.observe.detectors.batch import micro_batch_setting
from onecard.observe.detectors.catalogue import make_finding
from onecard.observe.detectors.history import History, mean
from onecard.observe.detectors.speed import (
    find_frequent_evaluation,
    find_frequent_saving,
    find_starvation,
    typical_step_s,
)
from onecard.observe.events import DeviceEvent
from onecard.spec import Alternative, Finding
from onecard.units import GIB, format_bytes

_NUM_READINGS = 6
_IDLE_SHARE = 0.7
_LIMIT_SHARE = 0.8
_FASTER = 0.9
# Beyond the plan's own band; forecasts of cards that nobody measured yet are coarse.
_SLOWER = 1.5
_OTHERS_CPU_SHARE = 0.25
_HEAT = ("sw_thermal", "hw_thermal")
_POWER_FAILURE = ("power_brake",)
# Their driver pages memory of the card to that of the machine, and does not tell a desktop from what computes.
_WINDOWS = ("windows", "wsl")


def find_idle_gpu(history: History) -> Finding | None:
    """A GPU that is not busy, for reasons other than data and saving."""
    readings = _last_readings(history)
    shares = [reading.gpu_share for reading in readings if reading.gpu_share is not None]
    if not history.is_on_gpu or len(shares) < _NUM_READINGS or not history.is_long_enough():
        return None
    share = mean(shares)
    if share >= _IDLE_SHARE or any(find(history) for find in (find_starvation, find_frequent_saving)):
        return None
    evidence = f"the card computed in {share:.0%} of the time over the last {len(shares)} readings"
    plan = history.plan
    # Where compiling was not switched off by name, it would be refused, fail, or come too late to pay.
    if not plan.torch_compile and plan.reasons.get("torch_compile") == "asked for":
        better = _faster(history, "torch_compile")
        return make_finding(
            "compile-missing",
            f"{evidence}; torch_compile is false (asked for)",
            "torch_compile: true",
            effect=_effect(better, plan.forecast) if better else "",
        )
    if (larger := _larger_batch(history)) is None:
        return None
    better = _faster(history, "per_device_train_batch_size")
    return make_finding(
        "batch-too-small",
        f"{evidence}; a step of {plan.total_batch_size} samples is made of {plan.num_micro_batches} micro-batches",
        f"per_device_train_batch_size: {better.settings['per_device_train_batch_size']}" if better else larger,
        effect=_effect(better, plan.forecast) if better else "",
    )


def _larger_batch(history: History) -> str | None:
    """Settings that give the card up to twice as much at a time; None where that may be more than it has memory for."""
    plan, taken = history.plan, history.steps[-1].memory_bytes
    limit = plan.memory_limit_bytes
    if limit is None and history.devices:
        limit = history.devices[-1].card_total_bytes
    if taken is not None and limit is not None and 2 * taken > limit:
        return None
    if plan.num_micro_batches == 1:
        return f"total_batch_size: {2 * plan.total_batch_size}, with half the steps"
    return micro_batch_setting(plan, min(2 * plan.micro_batch_size, plan.rows_per_step))


def find_heat(history: History) -> Finding | None:
    hot = _held(history, _HEAT)
    if not hot:
        return None
    degrees = [reading.temperature_c for reading in hot if reading.temperature_c is not None]
    limit = hot[-1].usual_power_limit_w or hot[-1].power_limit_w
    setting = f"`nvidia-smi -pl {0.8 * limit:.0f}` (sudo, or as administrator)" if limit else ""
    return make_finding(
        "throttled-by-heat",
        f"the driver slowed the clock for heat in {len(hot)} of the last {len(_last_readings(history))} readings"
        + (f", at up to {max(degrees):.0f} degrees Celsius" if degrees else ""),
        setting,
    )


def find_weak_power(history: History) -> Finding | None:
    """Power that something holds back; that a card at full load meets its own limit is as it should be."""
    readings = _last_readings(history)
    if held := _held(history, _POWER_FAILURE):
        evidence = f"the card's power brake was on in {len(held)} of the last {len(readings)} readings"
        return make_finding("throttled-by-power", evidence, "")
    capped = _held(history, ("sw_power_cap",))
    if not capped:
        return None
    limit, usual = capped[-1].power_limit_w, capped[-1].usual_power_limit_w
    if limit is None or usual is None or limit >= _LIMIT_SHARE * usual:
        return None
    return make_finding(
        "throttled-by-power",
        f"the clock is held down to keep {limit:.0f} W; the card's usual limit is {usual:.0f} W",
        f"`nvidia-smi -pl {usual:.0f}` (sudo, or as administrator), unless the limit is meant",
        effect=f"up to {usual / limit:.1f} times the power",
    )


def find_battery(history: History) -> Finding | None:
    if len(history.devices) < 2 or not all(reading.on_battery for reading in history.devices[-2:]):
        return None
    return make_finding("on-battery", "the battery is not being charged, the mains are not connected", "")


def find_others_on_card(history: History) -> Finding | None:
    """Others that compute on the card while its steps are slow."""
    readings = _last_readings(history)
    with_others = [reading for reading in readings if reading.num_others]
    slowness = find_slowness_figures(history)
    # What merely rests there, as a desktop does, is nobody's concern.
    if not history.is_on_gpu or len(with_others) < _NUM_READINGS or slowness is None:
        return None
    last = with_others[-1]
    held = f", which hold {format_bytes(last.others_bytes)}" if last.others_bytes else ""
    evidence = f"{last.num_others} other processes compute on the card{held}"
    if history.surroundings.platform in _WINDOWS:
        # The programs of a desktop are listed with those that compute: only more of them than at first say anything.
        before = max(reading.num_others or 0 for reading in history.devices[:_NUM_READINGS])
        if min(reading.num_others or 0 for reading in with_others) <= before:
            return None
        evidence = f"{last.num_others} other programs hold memory of the card, {before} did when the run began"
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
    size = history.plan.micro_batch_size
    return make_finding(
        "memory-spilled",
        f"{format_bytes(taken)} are taken on a card of {format_bytes(total)}, by all programs together; {slowness}",
        micro_batch_setting(history.plan, size // 2) if size > 1 else "",
    )


def find_busy_cpu(history: History) -> Finding | None:
    shares = [
        reading.cpu_share - reading.own_cpu_share
        for reading in _last_readings(history)
        if reading.cpu_share is not None and reading.own_cpu_share is not None
    ]
    slowness = find_slowness_figures(history)
    if len(shares) < 3 or slowness is None or mean(shares) < _OTHERS_CPU_SHARE:
        return None
    threads = history.plan.num_threads or history.surroundings.num_cores
    return make_finding(
        "cpu-shared",
        f"other programs use {mean(shares):.0%} of the CPU; {slowness}",
        f"OMP_NUM_THREADS={max(1, threads - 1)} in the environment of a new run"
        if threads > 1 and not history.is_on_gpu
        else "",
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
    return (
        f"a step takes {taken_s:.3g} s, planned were {time.step_s:.3g} s "
        f"({time.step_low_s:.3g} to {time.step_high_s:.3g})"
    )


def _last_readings(history: History) -> list[DeviceEvent]:
    return history.devices[-_NUM_READINGS:]


def _held(history: History, reasons: Sequence[str]) -> list[DeviceEvent]:
    """The last readings in which a reason held, if it did in most of them."""
    readings = _last_readings(history)
    held = [reading for reading in readings if any(reason in reading.throttled_by for reason in reasons)]
    return held if len(readings) == _NUM_READINGS and len(held) > len(readings) / 2 else []


def _faster(history: History, key: str) -> Alternative | None:
    """The fastest alternative of the plan that fits, changes `key` and saves a tenth of a step."""
    plan = history.plan
    now = plan.forecast.time.step_s if plan.forecast and plan.forecast.time else None
    found = [
        row
        for row in plan.alternatives
        if row.fits and key in row.settings and now and row.step_s is not None and row.step_s < _FASTER * now
    ]
    return min(found, key=lambda row: row.step_s or 0.0, default=None)


def _effect(row: Alternative, forecast: Any) -> str:
    return f"planned: {row.step_s:.3g} s a step instead of {forecast.time.step_s:.3g}, {format_bytes(row.peak_bytes)}"
