"""What the plan of a run says of other settings, while it goes on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sick_runs import Kind, Place, on_card, run

from onecard.hardware import find_card
from onecard.planner import target_of_card
from onecard.planner.candidate import evaluate
from onecard.planner.device import Target
from onecard.run import foresight
from onecard.run.foresight import Foresight

if TYPE_CHECKING:
    from collections.abc import Callable

    from onecard.spec import Plan

SMALLER = {"micro_batch_size": 2, "eval_batch_size": 2}


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Target:
    """A card of the catalogue, as if it were that of this machine."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    found = target_of_card(find_card("rtx-3060-12gb"), "linux")
    monkeypatch.setattr(foresight, "find_target", lambda *_: found)
    return found


@pytest.fixture
def planned(tiny_plan: "Callable[..., Plan]", target: Target) -> "Plan":
    plan = tiny_plan("llama", device="cuda:0", precision="bf16", memory_limit_bytes=target.limit_bytes)
    return plan.model_copy(update={"forecast": evaluate(plan, target).forecast})


def test_a_row_is_that_of_the_plan_with_the_change(planned: "Plan", target: Target) -> None:
    row = Foresight()(planned, SMALLER, 3600.0)
    alone = evaluate(planned.model_copy(update=SMALLER), target)
    assert row is not None
    assert (row.step_s, row.peak_bytes) == (alone.step_s, alone.forecast.memory.peak_bytes)
    assert row.fits


def test_a_row_is_made_once(planned: "Plan", target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Foresight()
    row = ask(planned, SMALLER, 3600.0)
    monkeypatch.setattr(foresight, "foresee", lambda *_: pytest.fail("asked again"))
    assert ask(planned, SMALLER, 3600.0) == row


def test_what_would_take_long_beside_the_rest_of_the_run_is_not_told(planned: "Plan", target: Target) -> None:
    assert Foresight()(planned, SMALLER, 20.0) is None
    # Once remembered it costs nothing.
    assert Foresight()(planned, SMALLER, 3600.0) is not None
    assert Foresight()(planned, SMALLER, 20.0) is not None


def test_nothing_is_compiled_for_a_remedy(planned: "Plan", target: Target) -> None:
    assert Foresight()(planned, {"torch_compile": True}, 1e9) is None


def test_a_plan_that_knows_nothing_says_nothing(planned: "Plan", target: Target) -> None:
    assert Foresight()(planned.model_copy(update={"device": "cpu"}), SMALLER, 1e9) is None
    assert Foresight()(planned.model_copy(update={"forecast": None}), SMALLER, 1e9) is None


@pytest.mark.parametrize(("id", "settings"), [("batch-too-small", "auto"), ("memory-spilled", False)])
def test_a_remedy_of_a_real_run_has_the_figures_of_its_plan(
    id: str, settings: Any, place: Place, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def on_this_card(plan: "Plan") -> dict[str, Any]:
        """The plan that the card would have; for memory that spills, one whose steps are much faster."""
        moved = plan.model_copy(
            update={"device": "cuda:0", "precision": "bf16", "memory_limit_bytes": target.limit_bytes}
        )
        forecast = evaluate(moved, target).forecast
        assert forecast.time is not None
        if id == "memory-spilled":
            keys = ("step_s", "step_low_s", "step_high_s")
            sooner = {key: getattr(forecast.time, key) / 20 for key in keys}
            forecast = forecast.model_copy(update={"time": forecast.time.model_copy(update=sooner)})
        assert forecast.time is not None
        seen.append(forecast.time.step_s)
        return {"precision": "bf16", "memory_limit_bytes": target.limit_bytes, "forecast": forecast}

    ill = {"share": 40} if id == "batch-too-small" else {"used": 12 * 2**30 - 1, "platform": "windows"}
    # The little that is left of a tiny run pays for no forecast.
    monkeypatch.setattr(foresight, "_MOST_SHARE", 1e6)
    kind = Kind({"max_steps": 40, "torch_compile": settings}, on_card(plan=on_this_card, **ill), is_timed=True)
    remedy = run(kind, place, monkeypatch)[id].remedy
    assert "(planned: " in remedy
    assert f" s a step instead of {seen[0]:.3g}, " in remedy
    assert "tokens/s instead of" in remedy
