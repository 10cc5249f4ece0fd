"""Runs that rest between their steps (`max_power_share`)."""

import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import onecard
from onecard.errors import RecipeError
from onecard.run.rests import Rests

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner

# Steps that are long beside the least that a sleep takes.
LONG: dict[str, Any] = {"max_seq_length": 128, "hidden_size": 128, "total_batch_size": 16, "max_steps": 30}
LONG |= {
    "per_device_train_batch_size": 16,
    "sample_steps": 0,
    "eval_steps": 10,
    "save_steps": 0,
    "max_power_share": None,
}


def _losses(outcome: "Outcome") -> list[float]:
    return [event["loss"] for event in outcome.record if event["event"] in ("step", "evaluated")]


def test_a_run_that_may_compute_half_of_the_time_rests_the_other_half_with_the_same_losses(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner.start("whole", **LONG)
    slept_s: list[float] = []

    def sleep(seconds: float) -> None:
        before_s = time.perf_counter()
        time.sleep(seconds)
        slept_s.append(time.perf_counter() - before_s)

    monkeypatch.setattr("onecard.run.rests.time", SimpleNamespace(perf_counter=time.perf_counter, sleep=sleep))
    half = runner.start("half", **LONG | {"max_power_share": 0.5})
    assert _losses(half) == _losses(whole)
    half.assert_equals(whole)
    lines = map(json.loads, (half.root / "events.jsonl").read_text(encoding="utf-8").splitlines())
    steps_s = sum(event["step_s"] for event in lines if event["event"] == "step")
    # Rests after evaluations count, too, but not as steps.
    assert 0.4 < sum(slept_s) / steps_s < 0.8


def test_the_report_says_that_a_run_rested(runner: "Runner") -> None:
    outcome = runner.start("half", max_power_share=0.5)
    page = onecard.write_report(outcome.root, lang="en").read_text(encoding="utf-8")
    assert "It rested so as to compute at most 50% of the time (max_power_share)." in page
    assert "resting (max_power_share)" in page
    assert "休息（max_power_share）" in onecard.write_report(outcome.root, lang="zh").read_text(encoding="utf-8")


class _Clock:
    """Time that passes when somebody works or sleeps; a sleep lasts a little longer than asked for."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 0.001


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_rests_keep_the_share_whatever_lies_between_them(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr("onecard.run.rests.time", clock)
    begun_s = clock.now_s
    rests, computed_s = Rests(share, lambda: False), 0.0
    for each_s in (0.01, 0.03, 0.002, 0.02) * 5:
        clock.now_s += each_s
        computed_s += each_s
        rests.take()
    assert computed_s / (clock.now_s - begun_s) == pytest.approx(share, rel=0.02)


def test_a_rest_ends_when_the_run_is_to_stop() -> None:
    rests = Rests(0.01, lambda: True)
    time.sleep(0.05)
    begun_s = time.perf_counter()
    rests.take()
    assert time.perf_counter() - begun_s < 1.0


@pytest.mark.parametrize("share", [None, 1.0])
def test_without_a_share_nothing_rests(share: float | None) -> None:
    rests = Rests(share, lambda: False)
    assert not rests.are_taken


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "fast", "50"])
def test_shares_that_are_none_are_refused(share: Any) -> None:
    with pytest.raises(RecipeError, match=r"max_power_share.*0\.01 or more and up to 1"):
        onecard.load_recipe({"dataset": "a.txt", "max_steps": 1, "max_power_share": share})
