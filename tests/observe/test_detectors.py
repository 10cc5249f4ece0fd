"""Detectors, each on a history that has what it looks for and on its healthy neighbours."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onecard.observe.detectors import DETECTORS, History, Surroundings, Watch, as_event, entries, make_finding
from onecard.observe.detectors.learning import find_rise
from onecard.observe.events import (
    DeviceEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    FinishedEvent,
    RecoveredEvent,
    SampledEvent,
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


def saved(step: int, seconds: float = 0.1, reason: Any = "interval", wait_s: float | None = None) -> SavedEvent:
    written = {"num_bytes": 1, "seconds": seconds, "wait_s": wait_s}
    return SavedEvent(step=step, elapsed_s=step, checkpoint=f"step-{step:06d}", reason=reason, **written)


def sampled(step: int, seconds: float) -> SampledEvent:
    return SampledEvent(step=step, elapsed_s=step * STEP_S, samples=(), seconds=seconds)


def recovered(**settings: Any) -> RecoveredEvent:
    usual = {"problem": "out of memory", "during": "step", "evidence": "full", "remedy": "smaller"}
    return RecoveredEvent(step=1, elapsed_s=1.0, settings=settings, **usual)


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
    # Where others have the CPU, the thread that prepares batches waits for it, and more threads would, too.
    taken = readings(3, cpu_share=0.9, own_cpu_share=0.4)
    assert not found_in(make_plan(), [*waiting, *taken])
    assert "starved-by-data" in found_in(make_plan(), [*waiting, *taken[:2]])
    assert "starved-by-data" in found_in(make_plan(device="cuda:0"), [*waiting, *readings(6, gpu_share=0.5), *taken])


def test_frequent_saving_names_an_interval(make_plan) -> None:
    events = [*steps(200), *(saved(step, seconds=2.0) for step in range(10, 201, 10))]
    found = found_in(make_plan(save_steps=10), events)
    # 40 of 100 s; 2 s are a hundredth of 200 s, which are so many steps of 60 s / 200.
    assert "save_steps: 667 instead of 10" in found["saving-too-often"].remedy
    assert not found_in(make_plan(), [*steps(200), *(saved(step, seconds=0.2) for step in range(10, 201, 10))])
    best = [*steps(200), *(saved(step, 2.0, "best") for step in range(10, 201, 10))]
    assert "eval_steps: 667" in found_in(make_plan(), best)["saving-too-often"].remedy
    clocked = [*steps(200), *(saved(step, 2.0, "clock") for step in range(10, 201, 10))]
    remedy = found_in(make_plan(save_minutes=1.0), clocked)["saving-too-often"].remedy
    assert "save_minutes: 4 instead of 1 (" in remedy


def test_saving_in_the_background_takes_as_long_as_training_stands_still(make_plan) -> None:
    assert not found_in(make_plan(), [*steps(200), *(saved(step, 3.0, wait_s=0.01) for step in range(10, 201, 10))])
    waiting = [*steps(200), *(saved(step, 3.0, wait_s=2.0) for step in range(10, 201, 10))]
    assert "save_steps: 667 instead of 10" in found_in(make_plan(save_steps=10), waiting)["saving-too-often"].remedy


def test_frequent_evaluation_names_an_interval(make_plan) -> None:
    events = [*steps(200), *(evaluated(step, 2.0, seconds=5.0) for step in range(20, 201, 20))]
    found = found_in(make_plan(eval_steps=20), events)
    assert "eval_steps: 180 instead of 20" in found["evaluating-too-often"].remedy
    assert "sample_steps" not in found["evaluating-too-often"].remedy
    samples = [*steps(200), *(sampled(step, 5.0) for step in range(20, 201, 20))]
    remedy = found_in(make_plan(eval_steps=20, sample_steps=20), samples)["evaluating-too-often"].remedy
    assert "sample_steps: 180 instead of 20" in remedy
    assert "eval_steps" not in remedy


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


def test_a_desktop_of_windows_is_not_taken_for_a_program_that_computes(make_plan) -> None:
    plan, here = make_plan(device="cuda:0", forecast=FORECAST), Surroundings(platform="windows")
    desktop = readings(12, **ON_CARD | {"num_others": 12})
    assert set(found_in(plan, [*steps(100, SLOW), *desktop], here)) == {"slower-than-planned"}
    joined = readings(12, **ON_CARD | {"num_others": lambda i: 12 if i <= 6 else 13})
    found = found_in(plan, [*steps(100, SLOW), *joined], here)
    assert set(found) == {"card-shared"}
    assert found["card-shared"].evidence.startswith("13 other programs hold memory of the card, 12 did when the run")


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
    rows = {
        "torch_compile": Alternative(settings={}, peak_bytes=7 * GIB, step_s=0.3, fits=True),
        "micro_batch_size": Alternative(settings={}, peak_bytes=9 * GIB, step_s=0.4, fits=True),
    }
    asked: list[tuple[dict[str, Any], float]] = []

    def ask_plan(plan: Plan, changes: Any, left_s: float) -> Alternative | None:
        asked.append((dict(changes), left_s))
        return rows.get(next(iter(changes)))

    def remedies(plan: Plan) -> dict[str, str]:
        history = History.of(plan, idle)
        history.ask_plan = ask_plan
        findings = [finding for detector in DETECTORS if (finding := detector.detect(history)) is not None]
        return {finding.id: finding.remedy for finding in findings}

    plan = make_plan(device="cuda:0", forecast=FORECAST, reasons={"torch_compile": "asked for"})
    told = "planned: 0.3 s a step instead of 0.5, 427 tokens/s instead of 2.00K, 7.0 GiB of memory"
    assert remedies(plan)["compile-missing"].endswith(f"torch_compile: true ({told})")
    # 900 steps of half a second are left.
    assert asked[0] == ({"torch_compile": True}, 450.0)
    compiled = plan.model_copy(update={"torch_compile": True})
    (remedy,) = remedies(compiled).values()
    assert "per_device_train_batch_size: 8, gradient_accumulation_steps: 1 (planned: 0.4 s" in remedy
    assert asked[-1][0] == {"micro_batch_size": 8, "eval_batch_size": 4}
    # What the plan knows not to fit is no remedy.
    rows["micro_batch_size"] = rows["micro_batch_size"].model_copy(update={"fits": False})
    assert not remedies(compiled)
    # Where nobody can tell, words do.
    rows.clear()
    assert remedies(plan)["compile-missing"].endswith(
        "torch_compile: true (fewer operations to start, so the card waits less)"
    )


def test_a_card_that_may_rest_is_not_idle_while_it_does(make_plan) -> None:
    half = make_plan(device="cuda:0", max_power_share=0.5)
    assert not found_in(half, [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.45})])
    found = found_in(half, [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.2})])
    assert found["batch-too-small"].evidence.startswith("the card computed in 40% of the time that it may compute")


@pytest.mark.parametrize("why", ["the run is over before compiling pays", "no C compiler", "the compiler failed"])
def test_compiling_is_offered_only_where_it_was_switched_off_by_name(why, make_plan) -> None:
    idle = [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.4})]
    plan = make_plan(device="cuda:0", reasons={"torch_compile": why})
    assert set(found_in(plan, idle)) == {"batch-too-small"}
    asked = make_plan(device="cuda:0", reasons={"torch_compile": "asked for"})
    assert set(found_in(asked, idle)) == {"compile-missing"}


@pytest.mark.parametrize(
    ("micro", "total", "setting"),
    [
        (4, 16, "per_device_train_batch_size: 8, gradient_accumulation_steps: 2"),
        (3, 4, "per_device_train_batch_size: 4, gradient_accumulation_steps: 1"),
        (4, 9, "per_device_train_batch_size: 8, total_batch_size: 9"),
        (8, 8, "total_batch_size: 16, with half the steps"),
    ],
)
def test_larger_batches_are_possible_ones(micro, total, setting, make_plan) -> None:
    plan = make_plan(device="cuda:0", micro_batch_size=micro, total_batch_size=total)
    idle = readings(6, **ON_CARD | {"gpu_share": 0.4})
    found = found_in(plan, [*steps(100, lambda step: {"memory_bytes": 5 * GIB}), *idle])
    assert f": {setting} (" in found["batch-too-small"].remedy
    # Twice as much may be more than the card of 12 GiB has.
    assert not found_in(plan, [*steps(100, lambda step: {"memory_bytes": 7 * GIB}), *idle])


def test_a_step_of_packed_chats_that_fits_one_micro_batch_is_one(make_plan) -> None:
    plan = make_plan(device="cuda:0", task="sft", packing="rows", micro_batch_size=8, total_batch_size=32)
    plan = plan.model_copy(update={"corpus": plan.corpus.model_copy(update={"num_train_rows": 500})})
    found = found_in(plan, [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.4})])
    assert "total_batch_size: 64" in found["batch-too-small"].remedy
    assert "per_device_train_batch_size: 16" not in found["batch-too-small"].remedy


def test_less_memory_is_told_in_figures_of_the_plan(make_plan) -> None:
    row = Alternative(settings={}, peak_bytes=5 * GIB, step_s=0.6, fits=True)
    course: Course = lambda step: SLOW(step) | {"memory_bytes": 8 * GIB}  # noqa: E731
    full = [*steps(100, course), *readings(6, **ON_CARD | {"card_bytes": 12 * GIB - 1})]
    plan, here = make_plan(device="cuda:0", forecast=FORECAST), Surroundings(platform="windows")
    history = History.of(plan, full, here)
    history.ask_plan = lambda *_: row
    found = {finding.id: finding for detector in DETECTORS if (finding := detector.detect(history)) is not None}
    assert "(planned: 0.6 s a step instead of 0.5" in found["memory-spilled"].remedy
    assert found["memory-spilled"].remedy.endswith("5.0 GiB of memory)")


def test_what_a_run_had_to_change_is_what_detectors_go_by(make_plan) -> None:
    plan = make_plan(device="cuda:0", forecast=FORECAST, torch_compile=True)
    slow = steps(100, SLOW)
    assert set(found_in(plan, slow)) == {"slower-than-planned"}
    assert not found_in(plan, [recovered(micro_batch_size=2), *slow])
    assert set(found_in(plan, [recovered(eval_batch_size=2), *slow])) == {"slower-than-planned"}
    assert not found_in(plan, [as_event(make_finding("compile-failed", "no Triton", ""), 1, 1.0), *slow])
    idle = [*steps(100), *readings(6, **ON_CARD | {"gpu_share": 0.4})]
    remedy = found_in(plan, [recovered(micro_batch_size=1), *idle])["batch-too-small"].remedy
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 4" in remedy
    # Of a resumed run the plan has it already, and may have been changed since.
    resumed = Watch(plan.model_copy(update={"micro_batch_size": 3}))
    resumed.recall([recovered(micro_batch_size=2), *slow])
    assert (resumed.history.plan.micro_batch_size, resumed.history.plan.forecast) == (3, None)


def test_heat_and_weak_power_are_told_from_the_usual_limit(make_plan) -> None:
    plan = make_plan(device="cuda:0")
    hot = readings(6, **ON_CARD | {"throttled_by": ("sw_thermal",), "temperature_c": 87.0})
    found = found_in(plan, [*steps(100), *hot])
    assert set(found) == {"throttled-by-heat"}
    assert "87 degrees" in found["throttled-by-heat"].evidence
    assert "nvidia-smi -pl 136" in found["throttled-by-heat"].remedy
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
    # What the run itself takes stays below the limit it was given; others fill the card.
    course: Course = lambda step: SLOW(step) | {"memory_bytes": 8 * GIB}  # noqa: E731
    events = [*steps(100, course), *readings(6, **ON_CARD | {"card_bytes": 12 * GIB - 1})]
    found = found_in(plan, events, Surroundings(platform="windows"))
    assert set(found) == {"memory-spilled"}
    assert "per_device_train_batch_size: 2" in found["memory-spilled"].remedy
    assert "memory-spilled" not in found_in(plan, events, Surroundings(platform="linux"))
    roomy = [*steps(100, course), *readings(6, **ON_CARD | {"card_bytes": 10 * GIB})]
    assert "memory-spilled" not in found_in(plan, roomy, Surroundings(platform="windows"))


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
    scaled: Course = lambda step: flat(step) | {"is_finite": step not in (*range(1, 13), 100)}  # noqa: E731
    assert set(found_in(make_plan(learning_rate=rate, precision="fp16"), steps(120, scaled))) == {id}


def test_a_flat_loss_under_muon_is_blamed_on_both_rates_or_on_none(make_plan) -> None:
    def found(**rates: float) -> dict[str, Any]:
        return found_in(make_plan(optimizer="muon", **rates), steps(120, flat))

    # Embeddings and norms that hardly move hinder no matrix.
    assert not found(learning_rate=1e-9, muon_learning_rate=0.02)
    remedy = found(learning_rate=1e-9, muon_learning_rate=1e-9)["rate-too-low"].remedy
    assert "learning_rate: 1e-03, muon_learning_rate: 1e-02" in remedy
    remedy = found(learning_rate=3e-3, muon_learning_rate=5.0)["rate-too-high"].remedy
    assert ": muon_learning_rate: 1e-02 (" in remedy


def test_a_flat_loss_of_an_existing_model_needs_more_to_be_blamed(make_plan) -> None:
    def found(rate: float, number: int, rise: float = 0.0) -> set[str]:
        plan = make_plan(learning_rate=rate).model_copy(update={"model": TRAINED})
        return set(found_in(plan, steps(number, lambda step: {"loss": 2.0 + 0.1 * (step % 2) + rise * step})))

    assert found(2e-5, 400) == set()
    assert found(1e-9, 150) == set()
    assert found(1e-9, 400) == {"rate-too-low"}
    # What has been learned stands still at any rate.
    assert found(1e-2, 400) == set()
    assert found(1e-2, 400, rise=0.001) == {"rate-too-high"}
    assert found(2e-5, 400, rise=0.001) == set()


def test_steps_without_targets_stop_the_run(make_plan) -> None:
    nothing: Course = lambda step: {"loss": 0.0, "num_target_tokens": 0, "grad_norm": 0.0}  # noqa: E731
    found = found_in(make_plan(), steps(10, nothing))
    assert set(found) == {"everything-masked"}
    assert found["everything-masked"].stops_run
    few = found_in(make_plan(), steps(10, lambda step: {"num_target_tokens": 3}))
    assert set(few) == {"everything-masked"}
    assert not few["everything-masked"].stops_run
    # A long question with a short answer has a target in each sample.
    long: Course = lambda step: {"num_target_tokens": 8, "tokens_per_s": 80_000.0}  # noqa: E731
    assert not found_in(make_plan(), steps(10, long))


def test_a_gradient_of_exactly_zero_stops_the_run(make_plan) -> None:
    dead: Course = lambda step: {"loss": 3.0, "grad_norm": 0.0}  # noqa: E731
    plan = make_plan().model_copy(update={"adapt": AdaptPlan(method="lora", target_modules=("q_proj",))})
    found = found_in(plan, steps(10, dead))
    assert set(found) == {"nothing-trains"}
    assert found["nothing-trains"].stops_run
    assert "all-linear" in found["nothing-trains"].remedy
    everywhere = plan.model_copy(update={"adapt": AdaptPlan(method="lora")})
    assert found_in(everywhere, steps(10, dead))["nothing-trains"].remedy.endswith(
        ": method: full (a gradient above 0, so that the loss can fall)"
    )
    assert "method: full" not in found_in(make_plan(), steps(10, dead))["nothing-trains"].remedy
    # What is known by heart has no gradient either.
    assert not found_in(plan, steps(10, lambda step: {"loss": 0.0, "grad_norm": 0.0}))


@pytest.mark.parametrize("level", [6.5, 80.0])
def test_a_loss_that_runs_away_stops_the_run(level, make_plan) -> None:
    away: Course = lambda step: {"loss": falling(step) if step < 20 else level + random.Random(step).random()}  # noqa: E731
    found = found_in(make_plan(learning_rate=0.3), steps(60, away))
    assert found["divergence"].stops_run
    assert "learning_rate: 1e-03" in found["divergence"].remedy
    assert "divergence" not in found_in(make_plan(), steps(30, away))


def test_a_start_far_above_guessing_is_no_divergence(make_plan) -> None:
    coming_down: Course = lambda step: {"loss": 12 - 0.08 * step}  # noqa: E731
    assert not found_in(make_plan(), steps(60, coming_down))
    standing: Course = lambda step: {"loss": 12 + 0.05 * random.Random(step).gauss(0, 1)}  # noqa: E731
    assert set(found_in(make_plan(learning_rate=1e-9), steps(120, standing))) == {"rate-too-low"}
    lost: Course = lambda step: {"loss": 12.0 if step < 10 else 2.0 if step < 100 else 6.0}  # noqa: E731
    assert found_in(make_plan(), steps(140, lost))["divergence"].stops_run
    refused: Course = lambda step: lost(step) | {"is_finite": step > 3}  # noqa: E731
    assert "divergence" in found_in(make_plan(precision="fp16"), steps(140, refused))


def test_a_base_that_knows_its_text_may_vary_by_a_third(make_plan) -> None:
    plan = make_plan(learning_rate=2e-5).model_copy(update={"model": TRAINED})
    assert not found_in(plan, steps(60, lambda step: {"loss": 0.1 if step <= 20 else 0.2}))
    assert "divergence" in found_in(plan, steps(60, lambda step: {"loss": 0.1 if step <= 20 else 0.6}))


def test_a_loss_that_rises_back_names_the_checkpoint_before(make_plan) -> None:
    risen: Course = lambda step: {"loss": falling(step) if step < 300 else 3.6}  # noqa: E731
    events = [*steps(480, risen), *(saved(step) for step in range(100, 401, 100))]
    found = found_in(make_plan(), events)
    assert set(found) == {"loss-rising"}
    assert "model_name_or_path: RUN/checkpoints/step-000200, learning_rate" in found["loss-rising"].remedy
    removed = found_in(make_plan(save_total_limit=2), events)["loss-rising"].remedy
    assert "checkpoints" not in removed
    best = [*events, evaluated(200, 1.5)]
    assert "step-000200" in found_in(make_plan(save_total_limit=2), best)["loss-rising"].remedy
    assert not found["loss-rising"].stops_run


def test_the_noise_of_a_batch_of_one_is_no_rise(make_plan) -> None:
    history = History(make_plan(num_steps=6400))
    noise = random.Random(5)
    for step in steps(6400, lambda step: {"loss": 2.0 + 0.7 * noise.gauss(0, 1)}):
        history.add(step)
        assert step.step % 32 or find_rise(history) is None, step.step


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
    assert not list(hear(Watch(make_plan()), steps(135, one_bad_check)))


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
    assert {"checkpoint-not-written", "drive-wear", "left-out"} < timed
    assert not timed & {"overfitting", "divergence", "rate-too-low", "loss-spike", "everything-masked"}
