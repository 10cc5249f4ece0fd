"""The micro-batch of a plan for a CPU, by trying a few."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from onecard.hardware import Machine
from onecard.planner.measure import measure_micro_batches
from onecard.planner.micro_batch import fastest, try_micro_batches
from onecard.spec import Plan

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
LONG_RUN_S = 1000.0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))


@dataclass
class Clock:
    """A trial of which the seconds are given."""

    seconds: dict[int, float]
    budgets: list[float] = field(default_factory=list)

    def __call__(self, plan: Plan, sizes: Sequence[int], budget_s: float) -> dict[int, float]:
        self.budgets.append(budget_s)
        return {size: self.seconds[size] for size in sizes if size in self.seconds}


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan]) -> Plan:
    return tiny_plan("llama", micro_batch_size=16, total_batch_size=32, reasons={"micro_batch_size": "the rule"})


def test_the_fastest_is_taken_and_the_effective_batch_stays(plan: Plan) -> None:
    clock = Clock({1: 0.1, 2: 9.0, 4: 0.5, 8: 0.7, 16: 0.8})
    made = try_micro_batches(plan, MACHINE, LONG_RUN_S, clock)
    # One sequence at a time is less than an eighth of what the rule takes: not tried.
    assert (made.micro_batch_size, made.total_batch_size) == (4, 32)
    assert "2: 9, 4: 0.5, 8: 0.7, 16: 0.8" in made.reasons["micro_batch_size"]
    assert made == plan.model_copy(update={"micro_batch_size": 4, "reasons": made.reasons})


def test_it_is_tried_once_for_each_content(plan: Plan) -> None:
    clock = Clock({2: 0.9, 4: 0.5, 8: 0.7, 16: 0.8})
    first = try_micro_batches(plan, MACHINE, LONG_RUN_S, clock)
    # A short run gets the answer of a long one: it costs nothing.
    for again in (plan, plan.model_copy(update={"seed": 5})):
        assert try_micro_batches(again, MACHINE, 0.0, clock).reasons == first.reasons
    assert len(clock.budgets) == 1
    try_micro_batches(plan.model_copy(update={"max_seq_length": 8}), MACHINE, LONG_RUN_S, clock)
    try_micro_batches(plan, replace(MACHINE, num_cores=4), LONG_RUN_S, clock)
    assert len(clock.budgets) == 3


@pytest.mark.parametrize("changes", [{"deterministic": True}, {"micro_batch_size": 1}])
def test_there_is_nothing_to_try(plan: Plan, changes: dict[str, Any]) -> None:
    plan, clock = plan.model_copy(update=changes), Clock({})
    assert try_micro_batches(plan, MACHINE, LONG_RUN_S, clock) == plan
    assert not clock.budgets


def test_trying_takes_a_small_share_of_the_run(plan: Plan) -> None:
    clock = Clock({})
    for run_s in (1.0, 100.0, 1e6):
        assert try_micro_batches(plan, MACHINE, run_s, clock) == plan
    assert [budget <= 0.05 * run_s for budget, run_s in zip(clock.budgets, (100.0, 1e6), strict=True)] == [True, True]
    assert clock.budgets[1] < 10


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({2: 1.0, 4: 0.9, 8: 0.95, 16: 1.0}, 4),
        ({2: 1.0, 4: 0.7}, 16),  # the budget ended while doubling still gained
        ({2: 1.0, 4: 1.02}, 16),  # or did not clearly lose
        ({2: 0.9, 4: 1.2}, 16),  # two sizes show no trend
        ({2: 0.95, 4: 0.9, 8: 1.0}, 4),
    ],
)
def test_sizes_out_of_reach_are_judged_by_the_last_doubling(seconds: dict[int, float], chosen: int) -> None:
    assert fastest(seconds, 16) == chosen


def test_where_the_rule_stays_its_reason_does(plan: Plan) -> None:
    made = try_micro_batches(plan, MACHINE, LONG_RUN_S, Clock({2: 1.0, 4: 0.5}))
    assert made.micro_batch_size == 16
    assert made.reasons["micro_batch_size"].startswith("the rule; smaller ones were slower here")


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_passes_of_real_steps_are_timed(tiny_plan: Callable[..., Plan], task: str) -> None:
    corpus = tiny_plan().corpus.model_copy(update={"num_train_rows": 100} if task == "sft" else {})
    plan = tiny_plan("llama", task=task, total_batch_size=8, corpus=corpus)
    found = measure_micro_batches(plan, [1, 2, 8], 5.0)
    assert list(found) == [1, 2, 8]
    # Of a whole step: eight passes of one sequence each take longer than one of all.
    assert found[1] > found[8] > 0
    assert measure_micro_batches(plan, [1, 2, 8], 0.0) == {}
