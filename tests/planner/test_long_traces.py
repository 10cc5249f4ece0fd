"""Traces that take minutes are told of before they begin."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.model.build import count_parameters
from onecard.planner import trace_cache
from onecard.planner.trace_cache import CannotTrace, trace_cached
from onecard.spec import Plan


@pytest.mark.parametrize(
    ("family", "length", "is_told"), [("mamba", 4096, True), ("mamba", 16, False), ("llama", 4096, False)]
)
def test_a_trace_that_takes_minutes_is_told_of_before_it_begins(
    family: str,
    length: int,
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
    plan = tiny_plan("llama", max_seq_length=length)
    if family != "llama":
        settings = {"model_type": family, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
        total, matrices = count_parameters(settings)
        counts = {"settings": settings, "num_parameters": total, "num_matrix_parameters": matrices}
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=counts)})
    with caplog.at_level(logging.WARNING), pytest.raises(CannotTrace, match="far enough"):
        trace_cached(plan, (8, 0))
    assert told == [1 if is_told else 0]
    if is_told:
        assert f"{family} goes from token to token" in caplog.text
