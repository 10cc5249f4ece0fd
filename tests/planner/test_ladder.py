"""The ladder of a compiled plan is refined row by row, and what is chosen fits when it is compiled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import DoesNotFitError
from onecard.hardware import find_card
from onecard.planner import depth
from onecard.planner.candidate import evaluate
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.device import Target, target_of_card
from onecard.planner.fit import FirstAnswer, fit_plan
from onecard.planner.ladder import list_alternatives
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import trace_cached
from onecard.spec import Alternative, Plan, Recipe


class Compiler:
    """Stands in for the compiler: a compiled step takes `growth` times the bytes of its eager one, or fails."""

    def __init__(self) -> None:
        self.growth = 1.0
        self.asked: list[Plan] = []
        self.fails = False

    def trace(self, plan: Plan, capability: tuple[int, int]) -> Trace:
        eager = trace_cached(plan.model_copy(update={"torch_compile": False}), capability)
        if not plan.torch_compile:
            return eager
        self.asked.append(plan)
        if self.fails:
            raise CannotTraceCompiled("it is a test")
        sizes = [int(size * self.growth) for size in eager.record.sizes]
        return replace(eager, record=replace(eager.record, sizes=sizes))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(depth, "trace_cached", stand_in.trace)
    return stand_in


@pytest.fixture
def target() -> Target:
    return target_of_card(find_card("rtx-3060-12gb"), "linux")


@pytest.fixture
def draft(tiny_plan: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]) -> Plan:
    """A compiled plan whose activations outweigh its weights, and both what an allocator rounds to."""
    shape = settings_of("qwen3", hidden_size=512, intermediate_size=1024, max_position_embeddings=512)
    values = {
        "settings": shape,
        "max_seq_length": 512,
        "micro_batch_size": 8,
        "total_batch_size": 8,
        "eval_batch_size": 8,
    }
    return tiny_plan(
        "qwen3",
        optimizer="adamw",
        precision="bf16",
        device="cuda:0",
        torch_compile=True,
        memory_limit_bytes=2**33,
        **values,
    )


def refined(plan: Plan, target: Target) -> tuple[list[Alternative], list[tuple[list[Alternative], float]]]:
    """All rows in the order of their coming, and what was told to be waited for."""
    waits: list[tuple[list[Alternative], float]] = []
    rows = list(list_alternatives(plan, target, lambda left, seconds: waits.append((list(left), seconds))))
    return rows, waits


def with_forecast(plan: Plan, target: Target) -> Plan:
    return plan.model_copy(update={"forecast": evaluate(plan, target, may_compile=True).forecast})


def test_compiled_rows_come_a_second_time(draft: Plan, target: Target, compiler: Compiler) -> None:
    compiler.growth = 0.8
    plan = with_forecast(draft, target)
    rows, waits = refined(plan, target)
    early = [row for row in rows if not row.is_refined]
    late = rows[len(rows) - len(early) :]
    assert len(early) > 5
    assert all(row.is_refined for row in late)
    assert sorted(str(row.settings) for row in early) == sorted(str(row.settings) for row in late)
    peaks = {str(row.settings): row.peak_bytes for row in early}
    assert all(row.peak_bytes < peaks[str(row.settings)] for row in late)
    # The plan itself and its eager step are known from the beginning.
    assert [row.settings for row in rows[: len(early) + 2] if row.is_refined] == [{}, {"torch_compile": False}]
    assert [left[0].settings for left, _ in waits] == [row.settings for row in late]
    assert [len(left) for left, _ in waits] == list(range(len(early), 0, -1))
    assert all(seconds > 0 for _, seconds in waits)


def test_what_is_open_is_compiled_first_and_what_cannot_fit_is_not(
    draft: Plan, target: Target, compiler: Compiler
) -> None:
    peaks = {str(row.settings): row.peak_bytes for row in list_alternatives(with_forecast(draft, target), target)}
    whole = peaks["{'torch_compile': False}"]
    # Half the micro-batch fits whatever the compiler does, the whole one may; more than twice that cannot.
    plan = draft.model_copy(update={"memory_limit_bytes": int(1.2 * whole), "total_batch_size": 64})
    plan = plan.model_copy(update={"micro_batch_size": 4})
    first = next(iter(list_alternatives(with_forecast(plan, target), target)))
    assert first.is_chosen
    rows, waits = refined(with_forecast(plan, target), target)
    waiting = waits[0][0]
    open_verdicts = [1.15 * row.peak_bytes > plan.memory_limit_bytes for row in waiting]
    assert open_verdicts == sorted(open_verdicts, reverse=True)
    steps = [row.step_s for row, is_open in zip(waiting, open_verdicts, strict=True) if not is_open]
    assert steps == sorted(steps)
    half = peaks["{'micro_batch_size': 4, 'total_batch_size': 8}"]
    tight = plan.model_copy(update={"memory_limit_bytes": int(0.45 * half)})
    rows, waits = refined(with_forecast(tight, target), target)
    hopeless = [row for row in rows if not row.is_refined and 0.5 * row.peak_bytes > tight.memory_limit_bytes]
    assert hopeless
    assert not any(row.settings == lost.settings for row in waits[0][0] for lost in hopeless)


def test_rows_stay_as_they_are_where_the_compiler_fails(draft: Plan, target: Target, compiler: Compiler) -> None:
    plan = with_forecast(draft, target)
    compiler.fails = True
    rows, waits = refined(plan, target)
    assert len(waits) > 5
    assert len({str(row.settings) for row in rows}) == len(rows)


def test_nobody_who_does_not_ask_waits(draft: Plan, target: Target, compiler: Compiler) -> None:
    plan = with_forecast(draft, target)
    compiler.asked.clear()
    list(list_alternatives(plan, target))
    assert not compiler.asked


def test_a_card_without_a_compiler_is_offered_none(draft: Plan, compiler: Compiler) -> None:
    windows = target_of_card(find_card("rtx-3060-12gb"), "windows")
    eager = draft.model_copy(update={"torch_compile": False})
    assert {"torch_compile": True} not in [row.settings for row in list_alternatives(eager, windows)]


def test_what_fits_only_before_compiling_gives_way(draft: Plan, target: Target, compiler: Compiler) -> None:
    eager = evaluate(draft, target).forecast.memory.peak_bytes
    limited = draft.model_copy(update={"memory_limit_bytes": int(eager / 0.8)})
    recipe = Recipe(dataset="x")
    as_eager = fit_plan(limited, recipe, target, FirstAnswer(lambda _: None, is_refined=False))
    assert (as_eager.micro_batch_size, as_eager.gradient_checkpointing) == (8, False)
    compiler.growth = 1.6
    told: list[Plan] = []
    plan = fit_plan(limited, recipe, target, FirstAnswer(told.append))
    assert plan.forecast.is_refined
    assert plan.forecast.memory.fits
    assert plan.forecast.memory.peak_bytes <= 0.97 * limited.memory_limit_bytes
    assert (plan.micro_batch_size, plan.gradient_checkpointing) != (8, False)
    assert "fits before compiling, but not compiled" in " ".join(plan.reasons.values())
    assert len(told) == 1
    assert plan.total_batch_size == 8


def test_what_fits_nowhere_when_compiled_is_refused(draft: Plan, target: Target, compiler: Compiler) -> None:
    smallest = {"micro_batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": True}
    least = evaluate(draft.model_copy(update=smallest), target).forecast.memory.peak_bytes
    compiler.growth = 2.0
    with pytest.raises(DoesNotFitError, match=r"--torch_compile false: "):
        fit_plan(draft.model_copy(update={"memory_limit_bytes": int(1.05 * least)}), Recipe(dataset="x"), target)


def test_what_fits_only_when_compiled_is_found(draft: Plan, target: Target, compiler: Compiler) -> None:
    smallest: dict[str, Any] = {"micro_batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": True}
    least = evaluate(draft.model_copy(update=smallest), target).forecast.memory.peak_bytes
    compiler.growth = 0.6
    limited = draft.model_copy(update={"memory_limit_bytes": int(0.9 * least)})
    plan = fit_plan(limited, Recipe(dataset="x"), target)
    assert (plan.micro_batch_size, plan.gradient_checkpointing) == (1, True)
    assert plan.forecast.memory.fits
