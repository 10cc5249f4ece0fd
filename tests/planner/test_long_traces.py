"""Traces that take minutes are told of before they begin."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.model.build import count_parameters
from onecard.planner import looping, trace_cache
from onecard.planner.depth import trace_any_depth
from onecard.planner.looping import find_shortening, launches_of
from onecard.planner.trace_cache import CannotTrace, trace_cached
from onecard.spec import Plan


@pytest.mark.parametrize(
    ("family", "num_layers", "is_told"), [("mamba", 100, True), ("mamba", 2, False), ("llama", 100, False)]
)
def test_a_trace_that_takes_minutes_is_told_of_before_it_begins(
    family: str,
    num_layers: int,
    is_told: bool,
    tiny_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    told: list[int] = []

    def stop(*_: Any, **__: Any) -> None:
        told.append(len(caplog.records))
        raise ValueError("far enough")

    monkeypatch.setattr(trace_cache, "trace_plan", stop)
    plan = tiny_plan("llama", max_seq_length=4096)
    if family != "llama":
        settings = {"model_type": family, "hidden_size": 16, "num_hidden_layers": num_layers, "vocab_size": 64}
        total, matrices = count_parameters(settings)
        counts = {"settings": settings, "num_parameters": total, "num_matrix_parameters": matrices}
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=counts)})
    with caplog.at_level(logging.WARNING), pytest.raises(CannotTrace, match="far enough"):
        trace_cached(plan, (8, 0))
    assert told == [1 if is_told else 0]
    if is_told:
        assert f"{family} goes from token to token" in caplog.text


def test_shorter_rows_and_more_of_them_take_the_memory_of_longer_ones(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    settings = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    total, matrices = count_parameters(settings)
    counts = {"settings": settings, "num_parameters": total, "num_matrix_parameters": matrices}
    plan = tiny_plan("llama", max_seq_length=32, micro_batch_size=4, total_batch_size=4)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update=counts), "attn_implementation": "apart"})
    whole = trace_any_depth(plan, (8, 0))
    monkeypatch.setattr(looping, "_ENOUGH_S", 0.5)
    assert find_shortening(plan) == 4
    short = trace_any_depth(plan, (8, 0))
    assert "rows of 8 tokens, 4 times as many" in str(short.note)
    peaks = [traced.replay(0).allocated_bytes for traced in (whole, short)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)
    launches = [
        sum(count(work.num_calls, plan) for work in one.trace.record.work if work.phase == "forward")
        for one, count in ((whole, lambda num_calls, _: num_calls), (short, launches_of))
    ]
    assert launches[1] == pytest.approx(launches[0], rel=0.15)
