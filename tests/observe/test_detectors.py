"""Detectors, each on a history that has what it looks for and on its healthy neighbours."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onecard.observe.detectors import DETECTORS, History, Surroundings, Watch, entries
from onecard.observe.events import (
    DeviceEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    FinishedEvent,
    SavedEvent,
    StepEvent,
)
from onecard.spec import AdaptPlan, Alternative, BasePlan, Forecast, MemoryForecast, ModelPlan, Plan, TimeForecast

GIB = 1024**3
STEP_S = 0.5
Course = Callable[[int], dict[str, Any]]

TRAINED = ModelPlan(
    settings={}, dropout=0.0, init="pretrained", num_parameters=1, num_matrix_parameters=1, base=BasePlan(name="gpt2")
)
FORECAST = Forecast(
    card="rtx-3060",
    memory=MemoryForecast(
        fits=True,
        limit_bytes=11 * GIB,
        peak_bytes=8 * GIB,
        peak_low_bytes=7 * GIB,
        peak_high_bytes=9 * GIB,
        allocated_bytes=7 * GIB,
        context_bytes=GIB // 2,
        breakdown={},
        peak_phase="backward",
        phase_bytes={},
        host_peak_bytes=GIB,
        disk_bytes=GIB,
    ),
    time=TimeForecast(
        step_s=STEP_S,
        step_low_s=0.4,
        step_high_s=0.6,
        tokens_per_s=2000.0,
        total_s=500.0,
        limited_by="arithmetic",
        share_of_peak=0.4,
        energy_wh=None,
    ),
)


def falling(step: int) -> float:
    """A loss that falls from that of guessing among 97 words, with the noise of batches."""
    return 1.5 + 3.07 * math.exp(-(step - 1) / 60) + 0.05 * random.Random(step).gauss(0, 1)


@pytest.fixture
def make_plan(tiny_plan) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        return tiny_plan(**{"num_steps": 1000, "num_warmup_steps": 10, "optimizer": "adamw"} | changes)

    return make


def steps(number: int, course: Course | None = None, *, first: int = 1) -> list[Event]:
    """So many steps of a healthy run, but for what `course` says of a step."""
    made: list[Event] = []
    for step in range(first, first + number):
        usual: dict[str, Any] = {
            "elapsed_s": step * STEP_S,
            "loss": falling(step),
            "learning_rate": 1e-3,
            "grad_norm": 0.7 + 0.1 * random.Random(-step).random(),
            "num_target_tokens": 1000,
            "tokens_seen": step,
            "is_finite": True,
            "step_s": STEP_S,
            "tokens_per_s": 2000.0,
            "wait_s": 0.001,
        }
        made.append(StepEvent(step=step, **usual | (course(step) if course else {})))
    return made


def evaluated(step: int, loss: float, **fields: Any) -> EvaluatedEvent:
    usual = {"elapsed_s": step * STEP_S, "bits_per_byte": None, "standard_error": 0.005, "num_target_tokens": 9}
    return EvaluatedEvent(step=step, loss=loss, **usual | {"is_best": True, "seconds": 1.0} | fields)


def saved(step: int, seconds: float = 0.1, reason: Any = "interval") -> SavedEvent:
    name = f"step-{step:06d}"
    return SavedEvent(step=step, elapsed_s=step, checkpoint=name, reason=reason, num_bytes=1, seconds=seconds)


def readings(number: int, **fields: Any) -> list[Event]:
    return [
        DeviceEvent(step=i, elapsed_s=10.0 * i, **{k: v(i) if callable(v) else v for k, v in fields.items()})
        for i in range(1, number + 1)
    ]


def found_in(plan: Plan, events: list[Event], surroundings: Surroundings | None = None) -> dict[str, Any]:
    """What all detectors together make of a history, by id."""
    history = History.of(plan, events, surroundings)
    findings = [finding for detector in DETECTORS if (finding := detector.detect(history)) is not None]
    return {finding.id: finding for finding in findings}


ON_CARD = {"gpu_share": 0.97, "temperature_c": 70.0, "power_limit_w": 170.0, "usual_power_limit_w": 170.0}
ON_CARD |= {"card_total_bytes": 12 * GIB, "num_others": 0, "on_battery": False}
SLOW: Course = lambda step: {"step_s": 2.0, "elapsed_s": 2.0 * step}  # noqa: E731


def test_a_healthy_history_has_no_finding(make_plan) -> None:
    host = {"own_bytes": GIB, "cpu_share": 0.6, "own_cpu_share": 0.55, "free_ram_bytes": 8 * GIB}
    quiet = readings(40, **ON_CARD, **host, throttled_by=("sw_power_cap",))
    milestones = [evaluated(100 * i, 3 - i / 4) for i in range(1, 6)] + [saved(100 * i) for i in range(1, 6)]
    events = [*quiet, *steps(600, lambda step: {"memory_bytes": 8 * GIB}), *milestones]
    for plan in (make_plan(), make_plan(device="cuda:0", forecast=FORECAST), make_plan(precision="fp16")):
        assert found_in(plan, events) == {}


def test_nothing_is_found_before_anything_happened(make_plan) -> None:
    assert found_in(make_plan(), []) == {}


def test_a_card_that_is_not_used_is_named(make_plan) -> None:
    here = Surroundings(gpus=("NVIDIA GeForce RTX 3060",), torch_cuda=None)
    found = found_in(make_plan(), steps(1), here)
    assert found["gpu-unused"].evidence == (
        "the run is on the CPU; this machine has NVIDIA GeForce RTX 3060; the installed PyTorch is built without CUDA"
    )
    assert not found_in(make_plan(), steps(1), dataclasses.replace(here, is_device_asked=True))
    assert not found_in(make_plan(device="cuda:0"), steps(1), here)


def test_waiting_for_data_is_measured(make_plan) -> None:
    waiting = steps(100, lambda step: {"wait_s": 0.2})
    found = found_in(make_plan(), waiting, Surroundings(num_cores=8))
    assert found["starved-by-data"].evidence.startswith("40% of the last 50 steps was waiting: 0.2 of 0.5 s")
    assert (
        "dataloader_num_workers: 2 instead of 0 (without waiting a step takes 0.3 s)" in found["starved-by-data"].remedy
    )
    # A GPU computes meanwhile: only its idleness shows that it waits.
    assert not found_in(make_plan(device="cuda:0"), waiting)
    idle = readings(6, gpu_share=0.5)
    assert "starved-by-data" in found_in(make_plan(device="cuda:0"), [*waiting, *idle])
    assert not found_in(make_plan(), steps(30, lambda step: {"wait_s": 0.2}))  # fifteen seconds say nothing


def test_frequent_saving_names_an_interval(make_plan) -> None:
    events = [*steps(200), *(saved(step, seconds=2.0) for step in range(10, 201, 10))]
    found = found_in(make_plan(save_steps=10), events)
    # 40 of 100 s; 2 s are a hundredth of 200 s, which are so many steps of 60 s / 200.
    assert "save_steps: 667 instead of 10" in found["saving-too-often"].remedy
    assert not found_in(make_plan(), [*steps(200), *(saved(step, seconds=0.2) for step in range(10, 201, 10))])
    best = [*steps(200), *(saved(step, 2.0, "best") for step in range(10, 201, 10))]
    assert "eval_steps: 667" in found_in(make_plan(), best)["saving-too-often"].remedy


def test_frequent_evaluation_names_an_interval(make_plan) -> None:
    events = [*steps(200), *(evaluated(step, 2.0, seconds=5.0) for step in range(20, 201, 20))]
    found = found_in(make_plan(eval_steps=20), events)
    assert "eval_steps: 180 instead of 20" in found["evaluating-too-often"].remedy


def test_slowness_is_said_where_nothing_explains_it(make_plan) -> None:
    plan = make_plan(device="cuda:0", forecast=FORECAST)
    found = found_in(plan, steps(100, SLOW))
    assert found["slower-than-planned"].evidence == "a step takes 2 s, planned were 0.5 s (0.4 to 0.6)"
    assert set(found) == {"slower-than-planned"}
    others = readings(6, **ON_CARD | {"num_others": 1, "others_bytes": 3 * GIB})
    found = found_in(plan, [*steps(100, SLOW), *others])
    assert set(found) == {"card-shared"}
    assert found["card-shared"].evidence.startswith("1 other processes compute on the card, which hold 3.0 GiB")
    # Others that do not slow the run, as a desktop, are nobody's concern.
    assert not found_in(plan, [*steps(100), *others])


def test_a_cpu_that_others_use_is_named(make_plan) -> None:
    plan = make_plan(forecast=FORECAST, num_threads=4)
    busy = readings(3, cpu_share=0.9, own_cpu_share=0.4)
    found = found_in(plan, [*steps(100, SLOW), *busy])
    assert set(found) == {"cpu-shared"}
    assert "OMP_NUM_THREADS=3" in found["cpu-shared"].remedy
    assert set(found_in(plan, [*steps(100, SLOW), *readings(3, cpu_share=0.9, own_cpu_share=0.85)])) == {
        "slower-than-planned"
    }


def test_an_idle_card_wants_a_compiled_step_or_larger_batches(make_plan) -> None:
    idle = [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.4})]
    rows = (
        Alternative(settings={"torch_compile": True}, peak_bytes=7 * GIB, step_s=0.3, fits=True),
        Alternative(settings={"per_device_train_batch_size": 16}, peak_bytes=9 * GIB, step_s=0.4, fits=True),
        Alternative(settings={"per_device_train_batch_size": 32}, peak_bytes=19 * GIB, step_s=0.2, fits=False),
    )
    plan = make_plan(device="cuda:0", forecast=FORECAST, alternatives=rows)
    assert "torch_compile: true (planned: 0.3 s a step instead of 0.5" in found_in(plan, idle)["compile-missing"].remedy
    compiled = plan.model_copy(update={"torch_compile": True})
    found = found_in(compiled, idle)
    assert set(found) == {"batch-too-small"}
    assert "per_device_train_batch_size: 16 (planned: 0.4 s" in found["batch-too-small"].remedy


def test_heat_and_weak_power_are_told_from_the_usual_limit(make_plan) -> None:
    plan = make_plan(device="cuda:0")
    hot = readings(6, **ON_CARD | {"throttled_by": ("sw_thermal",), "temperature_c": 87.0})
    found = found_in(plan, [*steps(100), *hot])
    assert set(found) == {"throttled-by-heat"}
    assert "87 degrees" in found["throttled-by-heat"].evidence
    assert "--power-limit 136" in found["throttled-by-heat"].remedy
    lowered = readings(6, **ON_CARD | {"throttled_by": ("sw_power_cap",), "power_limit_w": 100.0})
    assert set(found_in(plan, [*steps(100), *lowered])) == {"throttled-by-power"}
    assert not found_in(plan, [*steps(100), *readings(6, **ON_CARD | {"throttled_by": ("sw_power_cap",)})])
    brake = readings(6, **ON_CARD | {"throttled_by": ("power_brake",)})
    assert set(found_in(plan, [*steps(100), *brake])) == {"throttled-by-power"}


def test_a_battery_is_named(make_plan) -> None:
    assert set(found_in(make_plan(), [*steps(40), *readings(2, on_battery=True)])) == {"on-battery"}
    assert not found_in(make_plan(), [*steps(40), *readings(2, on_battery=None)])


def test_memory_that_windows_pages_out_is_named(make_plan) -> None:
    plan = make_plan(device="cuda:0", forecast=FORECAST)
    course: Course = lambda step: SLOW(step) | {"memory_bytes": 14 * GIB}  # noqa: E731
    events = [*steps(100, course), *readings(6, **ON_CARD)]
    found = found_in(plan, events, Surroundings(platform="windows"))
    assert set(found) == {"memory-spilled"}
    assert "per_device_train_batch_size: 2" in found["memory-spilled"].remedy
    assert "memory-spilled" not in found_in(plan, events, Surroundings(platform="linux"))


def test_memory_that_grows_is_told_from_memory_that_has_grown(make_plan) -> None:
    plan = make_plan(device="cuda:0", forecast=FORECAST)
    growing = steps(600, lambda step: {"memory_bytes": 4 * GIB + step * 8 * 1024**2})
    found = found_in(plan, growing)["card-memory-grows"]
    assert "in the last 480 steps; at this pace 11.0 GiB are full in" in found.evidence
    settled = steps(600, lambda step: {"memory_bytes": 4 * GIB + min(step, 250) * 8 * 1024**2})
    assert not found_in(plan, settled)
    leak = readings(30, own_bytes=lambda i: GIB + i * 64 * 1024**2, free_ram_bytes=4 * GIB)
    found = found_in(make_plan(), [*steps(100), *leak])["host-memory-grows"]
    assert found.evidence.endswith("the machine's memory is full in 10:40")
    assert not found_in(make_plan(), [*steps(100), *readings(30, own_bytes=lambda i: GIB + min(i, 15) * 64 * 1024**2)])


def flat(step: int) -> dict[str, Any]:
    return {"loss": 4.57 + 0.05 * random.Random(step).gauss(0, 1)}


@pytest.mark.parametrize(("rate", "id", "setting"), [(1e-9, "rate-too-low", "1e-03"), (0.5, "rate-too-high", "1e-03")])
def test_a_flat_loss_is_blamed_on_a_rate_far_from_the_usual(rate, id, setting, make_plan) -> None:
    found = found_in(make_plan(learning_rate=rate), steps(120, flat))
    assert set(found) == {id}
    assert f"learning_rate: {setting}" in found[id].remedy
    assert not found_in(make_plan(learning_rate=rate), steps(60, flat))


def test_a_flat_loss_of_an_existing_model_needs_more_to_be_blamed(make_plan) -> None:
    def found(rate: float, number: int) -> set[str]:
        plan = make_plan(learning_rate=rate).model_copy(update={"model": TRAINED})
        return set(found_in(plan, steps(number, lambda step: {"loss": 2.0 + 0.1 * (step % 2)})))

    assert found(2e-5, 400) == set()
    assert found(1e-9, 150) == set()
    assert found(1e-9, 400) == {"rate-too-low"}
    assert found(1e-2, 400) == {"rate-too-high"}


def test_steps_without_targets_stop_the_run(make_plan) -> None:
    nothing: Course = lambda step: {"loss": 0.0, "num_target_tokens": 0, "grad_norm": 0.0}  # noqa: E731
    found = found_in(make_plan(), steps(10, nothing))
    assert set(found) == {"everything-masked"}
    assert found["everything-masked"].stops_run
    few = found_in(make_plan(), steps(10, lambda step: {"num_target_tokens": 3}))
    assert set(few) == {"everything-masked"}
    assert not few["everything-masked"].stops_run


def test_a_gradient_of_exactly_zero_stops_the_run(make_plan) -> None:
    dead: Course = lambda step: {"loss": 3.0, "grad_norm": 0.0}  # noqa: E731
    plan = make_plan().model_copy(update={"adapt": AdaptPlan(method="lora")})
    found = found_in(plan, steps(10, dead))
    assert set(found) == {"nothing-trains"}
    assert found["nothing-trains"].stops_run
    assert "all-linear" in found["nothing-trains"].remedy
    # What is known by heart has no gradient either.
    assert not found_in(plan, steps(10, lambda step: {"loss": 0.0, "grad_norm": 0.0}))


@pytest.mark.parametrize("level", [6.5, 80.0])
def test_a_loss_that_runs_away_stops_the_run(level, make_plan) -> None:
    away: Course = lambda step: {"loss": falling(step) if step < 20 else level + random.Random(step).random()}  # noqa: E731
    found = found_in(make_plan(learning_rate=0.3), steps(60, away))
    assert found["divergence"].stops_run
    assert "learning_rate: 1e-03" in found["divergence"].remedy
    assert "divergence" not in found_in(make_plan(), steps(30, away))


def test_a_loss_that_rises_back_names_the_checkpoint_before(make_plan) -> None:
    risen: Course = lambda step: {"loss": falling(step) if step < 300 else 3.6}  # noqa: E731
    events = [*steps(400, risen), *(saved(step) for step in range(100, 401, 100))]
    found = found_in(make_plan(), events)
    assert set(found) == {"loss-rising"}
    assert "checkpoints/step-000300" in found["loss-rising"].remedy
    assert not found["loss-rising"].stops_run


def test_a_spike_is_one_when_it_is_over(make_plan) -> None:
    spike: Course = lambda step: {"loss": 6.0, "grad_norm": 30.0} if step == 281 else {}  # noqa: E731
    found = found_in(make_plan(), steps(300, spike))
    assert set(found) == {"loss-spike"}
    assert "loss 6.000 and gradient norm 30 at step 281" in found["loss-spike"].evidence
    assert not found_in(make_plan(), steps(282, spike))
    stays: Course = lambda step: {"loss": 6.0, "grad_norm": 30.0} if step >= 281 else {}  # noqa: E731
    assert "loss-spike" not in found_in(make_plan(), steps(300, stays))
    odd: Course = lambda step: {"loss": 6.0} if step == 281 else {}  # noqa: E731
    assert not found_in(make_plan(), steps(300, odd))  # an odd batch without a large gradient


def test_overfitting_names_the_best_checkpoint(make_plan) -> None:
    heldout = {100: 2.5, 200: 2.0, 300: 2.1, 400: 2.3}
    events: list[Event] = []
    for step, loss in heldout.items():
        events += [*steps(100, first=step - 99), evaluated(step, loss), saved(step)]
    found = found_in(make_plan(), events)["overfitting"]
    assert "held-out loss 2.0000 at step 200, 2.3000" in found.evidence
    assert "best checkpoint: step-000200" in found.evidence
    assert "0.4 passes over the text, 0.2 at the best" in found.evidence
    assert "num_train_epochs: 0.2" in found.remedy
    assert not found_in(make_plan(early_stopping_patience=2), events)
    assert not found_in(make_plan(), events[:-102])  # one that rose is no trend
    noisy = [dataclasses.replace(e, standard_error=0.2) if isinstance(e, EvaluatedEvent) else e for e in events]
    assert not found_in(make_plan(), noisy)


def test_passes_that_no_longer_help_are_counted(make_plan) -> None:
    repeated: Course = lambda step: {"tokens_seen": 10 * step, "loss": max(0.3, 3 - step / 100)}  # noqa: E731
    events: list[Event] = []
    for step, loss in {100: 2.5, 200: 2.2, 300: 2.1, 400: 2.1, 500: 2.1, 600: 2.1}.items():
        events += [*steps(100, repeated, first=step - 99), evaluated(step, loss)]
    found = found_in(make_plan(), events)
    assert set(found) == {"data-repeated"}
    assert found["data-repeated"].evidence.startswith("6.0 passes over 1,000 tokens; the last pass lowered")
    helping = [dataclasses.replace(e, loss=3 - e.step / 300) if isinstance(e, EvaluatedEvent) else e for e in events]
    assert not found_in(make_plan(), helping)


def test_text_learned_by_heart_is_said_where_nothing_is_held_out(make_plan) -> None:
    course: Course = lambda step: {"tokens_seen": 100 * step, "loss": 3.0 if step < 20 else 0.05}  # noqa: E731
    found = found_in(make_plan(), steps(250, course))
    assert set(found) == {"data-repeated"}
    assert "eval_fraction: 0.05" in found["data-repeated"].remedy
    assert not found_in(make_plan(), steps(100, course))


def test_gradients_that_vanish_and_gradients_that_are_always_clipped(make_plan) -> None:
    vanished: Course = lambda step: {"grad_norm": 1e-8 if step > 100 else 0.7, "loss": 3.0}  # noqa: E731
    assert "gradient-vanishing" in found_in(make_plan(), steps(200, vanished))
    assert not found_in(make_plan(), steps(200, lambda step: {"grad_norm": 1e-8, "loss": 0.001}))
    found = found_in(make_plan(), steps(200, lambda step: {"grad_norm": 40.0}))
    assert "max_grad_norm: 80" in found["clipping-always"].remedy
    assert not found_in(make_plan(), steps(200, lambda step: {"grad_norm": 3.0}))
    assert not found_in(make_plan(max_grad_norm=None), steps(200, lambda step: {"grad_norm": 40.0}))


def test_a_scale_that_collapses_is_told_from_one_that_is_being_found(make_plan) -> None:
    refused: Course = lambda step: {"is_finite": step % 8 != 0, "loss": math.nan if step % 8 == 0 else falling(step)}  # noqa: E731
    plan = make_plan(precision="fp16")
    assert set(found_in(plan, steps(200, refused))) == {"loss-scale-collapsing"}
    assert not found_in(make_plan(), steps(200, refused))
    assert not found_in(plan, steps(200, lambda step: {"is_finite": step > 12}))
    assert not found_in(plan, steps(60, lambda step: {"is_finite": step > 12}))


def hear(watch: Watch, events: list[Event]) -> Iterator[FindingEvent]:
    for event in events:
        yield from watch.hear(event)


def test_a_finding_is_said_once_and_only_when_it_lasts(make_plan) -> None:
    wait: Course = lambda step: {"wait_s": 0.2}  # noqa: E731
    watch = Watch(make_plan())
    (finding,) = hear(watch, steps(300, wait))
    assert (finding.id, finding.step, finding.is_timed) == ("starved-by-data", 70, True)
    one_bad_check: Course = lambda step: {"wait_s": 25.0, "step_s": 25.0} if step == 100 else {}  # noqa: E731
    assert not list(hear(Watch(make_plan()), steps(105, one_bad_check)))


def test_a_resumed_run_says_what_it_would_have_said_and_nothing_again(make_plan) -> None:
    events: list[Event] = []
    for step, loss in {100: 2.5, 200: 2.0, 300: 2.1, 400: 2.3, 500: 2.5}.items():
        events += [*steps(100, first=step - 99), evaluated(step, loss), saved(step)]
    told = list(hear(Watch(make_plan()), events))
    assert [(finding.id, finding.step, finding.is_timed) for finding in told] == [("overfitting", 410, False)]
    for cut in (250, 405, 480, 505):
        recorded = events[:cut]
        recorded += [finding for finding in told if finding.step <= getattr(events[cut - 1], "step", 0)]
        watch = Watch(make_plan())
        watch.recall(recorded)
        rest = [finding for finding in told if finding not in recorded]
        assert list(hear(watch, events[cut:])) == rest


def test_an_end_is_asked_too_and_an_interruption_is_none(make_plan) -> None:
    events: list[Event] = []
    for step, loss in {100: 2.5, 200: 2.0, 300: 2.1, 400: 2.3}.items():
        events += [*steps(100, first=step - 99), evaluated(step, loss), saved(step)]
    end = {"step": 400, "elapsed_s": 200.0, "loss": 2.3, "best_loss": 2.0, "best_step": 200, "tokens_seen": 400}
    end |= {"num_steps": 400, "tokens_per_s": 1.0, "seconds": 200.0}
    for reason, ids in (("completed", ["overfitting"]), ("interrupted", [])):
        watch = Watch(make_plan())
        assert [f.id for f in hear(watch, [*events, FinishedEvent(reason=reason, **end)])] == ids  # type: ignore[arg-type]


def test_timed_findings_are_those_of_the_catalogue() -> None:
    timed = {entry.id for entry in entries().values() if entry.is_timed}
    assert {"starved-by-data", "gpu-unused", "host-memory-grows", "slower-than-planned"} < timed
    assert not timed & {"overfitting", "divergence", "rate-too-low", "loss-spike", "everything-masked"}
