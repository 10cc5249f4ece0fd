"""A plan that has to be compiled answers by its eager step first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.hardware import find_card
from onecard.planner import depth
from onecard.planner.device import Target, target_of_card
from onecard.planner.fit import FirstAnswer, fit_plan
from onecard.planner.ladder import list_alternatives
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import trace_cached
from onecard.spec import Plan, Recipe

MIB = 2**20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def target() -> Target:
    return target_of_card(find_card("rtx-3060-12gb"), "linux")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans whose compiled step was asked for; the eager one stands in, so that nothing has to be compiled."""
    seen: list[Plan] = []

    def trace(plan: Plan, capability: tuple[int, int]) -> Trace:
        if plan.torch_compile:
            seen.append(plan)
        return trace_cached(plan.model_copy(update={"torch_compile": False}), capability)

    monkeypatch.setattr(depth, "trace_cached", trace)
    return seen


@pytest.fixture
def draft(tiny_plan: Callable[..., Plan], target: Target) -> Plan:
    values = {"max_seq_length": 64, "micro_batch_size": 4, "total_batch_size": 4, "eval_batch_size": 4}
    limit = {"memory_limit_bytes": target.limit_bytes}
    return tiny_plan("qwen3", precision="bf16", device="cuda:0", torch_compile=True, **limit, **values)


@pytest.mark.parametrize("given", [{}, {"per_device_train_batch_size": 4, "gradient_checkpointing": False}])
def test_the_first_answer_comes_before_the_compiler_is_asked(
    given: dict[str, Any], draft: Plan, target: Target, compiled: list[Plan]
) -> None:
    told: list[tuple[Plan, int]] = []
    first = FirstAnswer(lambda plan: told.append((plan, len(compiled))))
    plan = fit_plan(draft, Recipe(dataset="x", **given), target, first)
    ((early, num_compiled),) = told
    assert num_compiled == 0
    assert len(compiled) == 1
    assert not early.forecast.is_refined
    assert plan.forecast.is_refined
    assert early.forecast.memory.note == "traced without the compiler, so the band is wide"
    assert early.model_copy(update={"forecast": None}) == plan.model_copy(update={"forecast": None})


def test_an_answer_may_stay_the_first(draft: Plan, target: Target, compiled: list[Plan]) -> None:
    plan = fit_plan(draft, Recipe(dataset="x"), target, FirstAnswer(lambda _: None, is_refined=False))
    assert not plan.forecast.is_refined
    assert all(row.is_refined == (row.settings == {"torch_compile": False}) for row in list_alternatives(plan, target))
    assert not compiled


def test_what_is_known_needs_no_first_answer(
    draft: Plan, target: Target, compiled: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.planner.fit.is_answered", lambda *_: True)
    told: list[Plan] = []
    plan = fit_plan(draft, Recipe(dataset="x"), target, FirstAnswer(told.append))
    assert plan.forecast.is_refined
    assert not told


def test_an_eager_plan_has_one_answer(draft: Plan, target: Target, compiled: list[Plan]) -> None:
    told: list[Plan] = []
    eager = draft.model_copy(update={"torch_compile": False})
    plan = fit_plan(eager, Recipe(dataset="x"), target, FirstAnswer(told.append))
    assert plan.forecast.is_refined
    assert not told
    assert not compiled


def test_few_traces_find_the_largest_micro_batch(draft: Plan, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven sizes four at most are traced, and what is found is what looking at all of them finds."""
    from onecard.planner import fit, ranks

    draft = draft.model_copy(update={"total_batch_size": 64, "torch_compile": False})
    recipe = Recipe(dataset="x", gradient_checkpointing=False)
    sizes = ranks.even_sizes(draft, 1)
    evaluate, seen = fit.evaluate, list[int]()

    def count(plan: Plan, *arguments: Any, **named: Any) -> fit.Candidate:
        seen.append(plan.micro_batch_size)
        return evaluate(plan, *arguments, **named)

    monkeypatch.setattr(fit, "evaluate", count)
    for limit in (70, 10_000):
        capped = draft.model_copy(update={"memory_limit_bytes": limit * MIB})
        safe = [
            size
            for size in sizes
            if evaluate(capped.model_copy(update={"micro_batch_size": size, "eval_batch_size": size}), target).is_safe
        ]
        seen.clear()
        chosen = fit_plan(capped, recipe, target)
        assert len(seen) <= 4
        assert max(safe) in seen
        assert chosen.micro_batch_size in safe
