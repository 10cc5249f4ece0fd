"""Finished runs teach the next plan for their card."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from onecard.hardware import Machine, find_card
from onecard.observe.events import StepEvent
from onecard.planner import on_cpu
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.device import Target, target_of_card
from onecard.planner.forecast import forecast
from onecard.planner.on_cpu import forecast_on_cpu
from onecard.planner.outcomes import Outcome, memory_factor, outcomes_file, outcomes_of, remember
from onecard.planner.trace_cache import CannotTrace
from onecard.run import outcome as run_outcome
from onecard.run.folder import RunFolder
from onecard.run.outcome import compare, make_outcome
from onecard.spec import Plan, Recipe

MACHINE = Machine((), None, "580.1", 4, 2**34, 2**33, "linux", "3.11", False, "a test")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def target() -> Target:
    return target_of_card(find_card("rtx-3060-12gb"))


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan], target: Target) -> Plan:
    return tiny_plan(precision="bf16", device="cuda:0", max_seq_length=256, memory_limit_bytes=target.limit_bytes)


def steps(count: int, memory_bytes: int, step_s: float) -> list[StepEvent]:
    return [
        StepEvent(
            step=step,
            elapsed_s=1.0,
            loss=1.0,
            learning_rate=1.0,
            grad_norm=1.0,
            wait_s=0.0,
            num_target_tokens=1,
            tokens_seen=1,
            is_finite=True,
            tokens_per_s=1.0,
            step_s=step_s if step > 10 else 50.0,
            memory_bytes=memory_bytes,
        )
        for step in range(1, count + 1)
    ]


def outcome_of(plan: Plan, target: Target, ratio: float) -> Outcome:
    predicted = forecast(plan, target).forecast
    assert predicted.time is not None
    measured = int(predicted.memory.peak_bytes * ratio)
    found = make_outcome(plan, target, MACHINE, steps(40, measured, 2 * predicted.time.step_s))
    assert found is not None
    return found


def test_an_outcome_sets_a_run_beside_its_plan(plan: Plan, target: Target) -> None:
    outcome = outcome_of(plan, target, 1.1)
    assert outcome.measured_peak_bytes == pytest.approx(1.1 * outcome.predicted_peak_bytes, rel=1e-6)
    assert outcome.measured_step_s == pytest.approx(2 * outcome.predicted_step_s)  # without the slow first steps
    assert (outcome.card, outcome.driver, outcome.settings["micro_batch_size"]) == ("rtx-3060-12gb", "580.1", 4)
    assert "(+10.0%)" in outcome.describe()
    assert "(+100%)" in outcome.describe()
    assert "/" not in json.dumps(asdict(outcome))  # no path


def test_too_short_a_run_and_an_unknown_card_tell_nothing(plan: Plan, target: Target) -> None:
    assert make_outcome(plan, target, MACHINE, steps(19, 10**9, 0.1)) is None
    assert make_outcome(plan, replace(target, card=None), MACHINE, steps(40, 10**9, 0.1)) is None


def test_a_run_on_a_cpu_is_set_beside_its_plan_and_teaches_no_card(
    tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cpu, "measure_step", lambda plan, _: 0.5)
    plan = forecast_on_cpu(tiny_plan("llama"), replace(MACHINE, free_ram_bytes=2**40), 300 * 2**20)
    folder = RunFolder.create(tmp_path / "run", Recipe(dataset="x"), plan, None)
    compare(folder, MACHINE, steps(2, 0, 0.6))
    assert folder.outcome() is None
    compare(folder, MACHINE, steps(40, 0, 0.6))
    outcome = folder.outcome()
    assert outcome is not None
    assert (outcome.card, outcome.predicted_step_s, outcome.measured_step_s) == ("CPU", 0.5, 0.6)
    assert outcome.predicted_peak_bytes == plan.forecast.memory.peak_bytes
    assert outcome.measured_peak_bytes > 100 * 2**20
    assert not outcomes_file().exists()


@pytest.mark.parametrize("error", [CannotTrace("no"), CannotTraceCompiled("no")], ids=lambda e: type(e).__name__)
def test_a_finished_run_does_not_fail_for_want_of_a_trace(
    error: Exception, plan: Plan, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_outcome, "trace_any_depth", fail)
    assert make_outcome(plan, target, MACHINE, steps(40, 10**9, 0.1)) is None


def test_the_next_plan_is_corrected(plan: Plan, target: Target) -> None:
    before = forecast(plan, target).forecast
    for outcome in [outcome_of(plan, target, ratio) for ratio in (1.08, 1.10, 1.12)]:
        remember(outcome)
    after = forecast(plan, target).forecast
    assert after.memory.peak_bytes == pytest.approx(1.1 * before.memory.peak_bytes, rel=1e-3)
    assert sum(after.memory.breakdown.values()) == after.memory.peak_bytes + after.memory.context_bytes
    assert after.memory.note is not None
    assert "+10.0%" in after.memory.note
    other = target_of_card(find_card("rtx-4090"))
    assert memory_factor(find_card("rtx-4090")) == 1.0
    assert forecast(plan, other).forecast.memory.note is None


@pytest.fixture
def slow_target(target: Target) -> Target:
    """A card whose memory is so slow that steps wait for it, not for Python."""
    assert target.card is not None
    return replace(target, card=replace(target.card, bandwidth_bytes_per_s=1e8))


def test_what_is_far_beyond_every_error_of_a_plan_corrects_nothing(plan: Plan, slow_target: Target) -> None:
    target = slow_target
    assert target.card is not None
    before = forecast(plan, target).forecast
    remember(replace(outcome_of(plan, target, 1.0), measured_peak_bytes=10**12))
    assert memory_factor(target.card) == 1.0
    remember(replace(outcome_of(plan, target, 1.0), measured_step_s=1e9))
    after = forecast(plan, target).forecast
    assert after.memory.peak_bytes == before.memory.peak_bytes
    assert after.memory.note == "1 earlier run on this card, too far from what was predicted, left out"
    # The run with too much memory took twice the time, which is believable, and the other one is left out.
    assert before.time.step_s < after.time.step_s < 2.1 * before.time.step_s
    assert "1 earlier run on this card" in after.time.note


def test_a_corrected_time_says_so(plan: Plan, slow_target: Target) -> None:
    before = forecast(plan, slow_target).forecast.time
    assert before.note is None
    for _ in range(5):
        remember(outcome_of(plan, slow_target, 1.0))
    after = forecast(plan, slow_target).forecast.time
    share = after.step_s / before.step_s - 1
    assert share > 0.5
    assert after.note == f"corrected by {share:+.1%} after earlier runs on this card"


def test_lines_that_are_no_outcomes_are_skipped(plan: Plan, target: Target) -> None:
    remember(outcome_of(plan, target, 1.0))
    with outcomes_file().open("a", encoding="utf-8") as file:
        file.write("nothing\n{}\n[1]\n")
        whole = asdict(outcome_of(plan, target, 1.0))
        damaged = [{"measured_step_s": value} for value in ("x", None, float("nan"), float("inf"), 0, True, 10**400)]
        damaged += [{"seconds": value} for value in ({"gemm_16bit": None}, {"gemm_16bit": -1.0}, {"copy": "x"}, [])]
        damaged += [{"measured_peak_bytes": "1"}, {"predicted_peak_bytes": None}, {"card": 3}, {"settings": None}]
        file.writelines(json.dumps(whole | change) + "\n" for change in damaged)
    assert len(outcomes_of()) == len(outcomes_of("rtx-3060-12gb")) == 1
    assert outcomes_of("rtx-4090") == []
