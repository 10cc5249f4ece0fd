"""Memory and time of a plan for this machine's CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DoesNotFitError
from onecard.hardware import Machine
from onecard.planner import on_cpu, trace_cache
from onecard.planner.on_cpu import forecast_on_cpu
from onecard.planner.parts import share_of
from onecard.planner.replay import replay
from onecard.planner.trace import record_plan
from onecard.spec import CardGroup, Plan

MACHINE = Machine(
    gpus=(),
    gpu_problem=None,
    driver=None,
    num_cores=2,
    ram_bytes=8 * 2**30,
    free_ram_bytes=4 * 2**30,
    platform="linux",
    python="3.11.0",
    has_bf16_cpu=False,
    bf16_cpu_reason="a test",
)


PROCESS = 300 * 2**20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "loaded_bytes", lambda: PROCESS // 2)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans whose step was tried; it takes half a second."""
    seen: list[Plan] = []

    def measure(plan: Plan, _: float) -> float:
        seen.append(plan)
        return 0.5

    monkeypatch.setattr(on_cpu, "measure_step", measure)
    return seen


def test_tensors_are_those_of_a_real_step(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    plan = tiny_plan("llama")
    memory = forecast_on_cpu(plan, MACHINE, PROCESS).forecast.memory
    real = replay(record_plan(plan), workspace_bytes=0)
    assert memory.allocated_bytes == sum(real.parts.values()) == max(real.phase_bytes.values())
    assert sum(memory.breakdown.values()) == memory.peak_bytes == memory.host_peak_bytes
    assert memory.breakdown["process"] == PROCESS
    assert 0 < memory.breakdown["malloc"] < memory.allocated_bytes
    assert memory.fits
    assert memory.peak_low_bytes < memory.peak_bytes < memory.peak_high_bytes
    assert memory.limit_bytes == MACHINE.free_ram_bytes + PROCESS


def test_a_short_step_is_tried(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    plan = tiny_plan("llama")
    time = forecast_on_cpu(plan, MACHINE, PROCESS).forecast.time
    assert tried == [plan]
    assert (time.step_s, time.step_low_s, time.step_high_s) == (0.5, 0.4, 0.7)
    assert time.tokens_per_s == plan.tokens_per_step / 0.5
    assert time.total_s > 0.5 * plan.schedule.num_steps
    assert time.share_of_peak == pytest.approx(plan.flops_per_token * plan.tokens_per_step / 0.5 / plan.peak_flops)
    hours = plan.model_copy(update={"max_hours": 20 * 0.25 / 3600})
    assert forecast_on_cpu(hours, MACHINE, PROCESS).forecast.time.step_s == 0.25
    compiled = forecast_on_cpu(plan.model_copy(update={"torch_compile": True}), MACHINE, PROCESS).forecast
    assert not tried[-1].torch_compile
    assert compiled.time.step_low_s < 0.4
    assert "eager step" in compiled.memory.note


def test_a_long_step_is_not_tried_and_has_a_wide_band(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    plan = tiny_plan("llama", flops_per_token=1e12)
    time = forecast_on_cpu(plan, MACHINE, PROCESS).forecast.time
    assert not tried
    assert time.share_of_peak == pytest.approx(0.4)
    assert time.step_high_s > 5 * time.step_low_s


def test_what_does_not_fit_names_a_micro_batch_that_does(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    plan = tiny_plan("llama", max_seq_length=256, micro_batch_size=8, eval_batch_size=8)
    sizes = {
        size: forecast_on_cpu(
            plan.model_copy(update={"micro_batch_size": size, "eval_batch_size": size}), MACHINE, PROCESS
        ).forecast.memory.allocated_bytes
        for size in (1, 4, 8)
    }
    between = replace(MACHINE, free_ram_bytes=int(1.4 * (sizes[4] + sizes[8]) / 2))
    with pytest.raises(DoesNotFitError, match=r"can be had\. --per_device_train_batch_size 4 ") as caught:
        forecast_on_cpu(plan, between, PROCESS)
    assert f"--total_batch_size {plan.total_batch_size} --per_device_eval_batch_size 4 takes" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not caught.value.plan.forecast.memory.fits
    with pytest.raises(DoesNotFitError, match="a single sequence at a time does not fit either"):
        forecast_on_cpu(plan, replace(MACHINE, free_ram_bytes=sizes[1] // 2), PROCESS)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_of_one_machine_share_its_memory(
    tiny_plan: Callable[..., Plan], tried: list[Plan], strategy: str
) -> None:
    plan, group = tiny_plan("llama", optimizer="adamw", strategy=strategy), CardGroup(num=4)
    memory = forecast_on_cpu(plan, MACHINE, PROCESS, group).forecast.memory
    others = 3 * memory.host_other_bytes
    assert memory.host_machine_bytes == memory.peak_bytes + others
    assert memory.peak_bytes == memory.host_other_bytes  # so small a checkpoint is written without a copy
    assert memory.limit_bytes == MACHINE.free_ram_bytes + PROCESS - others
    assert sum(memory.breakdown.values()) == memory.peak_bytes == memory.host_peak_bytes
    full = replace(MACHINE, free_ram_bytes=memory.host_machine_bytes - PROCESS)
    assert forecast_on_cpu(plan, full, PROCESS, group).forecast.memory.fits
    with pytest.raises(DoesNotFitError, match="beside 3 other processes that need"):
        forecast_on_cpu(plan, replace(full, free_ram_bytes=full.free_ram_bytes - 1), PROCESS, group)


def test_processes_share_the_batches_of_an_evaluation(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    plan = tiny_plan("llama", eval_batches=10, total_batch_size=8, micro_batch_size=1)
    corpus = plan.corpus.model_copy(update={"num_heldout_tokens": 10 * plan.eval_batch_size * plan.max_seq_length})
    plan = plan.model_copy(update={"corpus": corpus})
    alone = forecast_on_cpu(share_of(plan, 4), MACHINE, PROCESS).forecast.time
    time = forecast_on_cpu(plan, MACHINE, PROCESS, CardGroup(num=4)).forecast.time
    assert time.evaluation_s == pytest.approx(alone.evaluation_s * 3 / 10)
    aside_s = time.num_evaluations * time.evaluation_s + time.num_saves * time.save_s
    assert time.total_s == pytest.approx(plan.schedule.num_steps * time.step_s + aside_s)


def test_nothing_is_guessed_where_a_step_cannot_be_traced(
    tiny_plan: Callable[..., Plan], tried: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr(trace_cache, "trace_plan", fail)
    plan = forecast_on_cpu(tiny_plan("llama"), MACHINE, PROCESS)
    assert plan.forecast is None
    assert "a value was asked for" in plan.reasons["forecast"]


def test_what_the_trace_brought_along_is_counted(
    tiny_plan: Callable[..., Plan], tried: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = forecast_on_cpu(tiny_plan("llama"), MACHINE, PROCESS).forecast.memory
    monkeypatch.setattr(on_cpu, "loaded_bytes", lambda: PROCESS + 1000)
    after = forecast_on_cpu(tiny_plan("llama"), MACHINE, PROCESS).forecast.memory
    assert after.peak_bytes == before.peak_bytes + 1000
    assert after.limit_bytes == before.limit_bytes


def test_chats_of_many_lengths_have_a_wider_band(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    corpus = tiny_plan().corpus.model_copy(update={"num_train_rows": 100})

    def memory(**changes: Any) -> Any:
        return forecast_on_cpu(tiny_plan("llama", **changes), MACHINE, PROCESS).forecast.memory

    chats = {"task": "sft", "packing": "flat", "corpus": corpus}
    wide = memory(precision="bf16", **chats)
    assert "chats of many lengths" in wide.note
    assert wide.peak_high_bytes > wide.peak_bytes + 2**29
    for changes in ({"precision": "fp32", **chats}, {"precision": "bf16"}):
        found = memory(**changes)
        assert found.note is None
        assert found.peak_high_bytes < 1.3 * found.peak_bytes


def test_the_most_a_process_held_is_no_less_than_what_it_holds() -> None:
    block = bytearray(b"1") * (200 * 2**20)
    held = on_cpu.peak_process_bytes()
    del block
    assert 200 * 2**20 < held < 2**40
    assert on_cpu.peak_process_bytes() >= held


def test_rests_are_part_of_the_time_that_is_predicted(tiny_plan: Callable[..., Plan], tried: list[Plan]) -> None:
    whole, half = (
        forecast_on_cpu(tiny_plan("llama", max_power_share=share), MACHINE, PROCESS).forecast.time
        for share in (None, 0.5)
    )
    for key in ("step_s", "step_low_s", "step_high_s", "total_s"):
        assert getattr(half, key) == pytest.approx(2 * getattr(whole, key)), key
    for key in ("tokens_per_s", "share_of_peak"):
        assert getattr(half, key) == pytest.approx(0.5 * getattr(whole, key)), key
    assert (half.evaluation_s, half.save_s) == (whole.evaluation_s, whole.save_s)
    assert (half.note, whole.note) == ("max_power_share 0.5: rests for 50% of the time", None)
    hours = tiny_plan("llama", max_power_share=0.5, max_hours=4 / 3600)
    assert forecast_on_cpu(hours, MACHINE, PROCESS).forecast.time.step_s == pytest.approx(4 / 20)
