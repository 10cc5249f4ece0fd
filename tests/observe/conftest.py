"""Events as a run makes them."""

from collections.abc import Callable
from typing import Any

import pytest

from onecard.observe import (
    EvaluatedEvent,
    FindingEvent,
    FinishedEvent,
    RecoveredEvent,
    Sample,
    SampledEvent,
    SavedEvent,
    StepEvent,
)
from onecard.observe.events import ChosenEvent, ScoredEvent


@pytest.fixture
def step_event() -> Callable[..., StepEvent]:
    def make(step: int, **fields: Any) -> StepEvent:
        usual: dict[str, Any] = {
            "elapsed_s": step * 0.5,
            "loss": 2.5,
            "learning_rate": 3e-3,
            "grad_norm": 0.7,
            "num_target_tokens": 1000,
            "tokens_seen": step * 1000,
            "is_finite": True,
            "step_s": 0.5,
            "tokens_per_s": 2000.0,
            "wait_s": 0.001,
        }
        return StepEvent(step=step, **(usual | fields))

    return make


@pytest.fixture
def evaluated() -> EvaluatedEvent:
    return EvaluatedEvent(
        step=20,
        elapsed_s=10.0,
        loss=1.75,
        bits_per_byte=1.25,
        standard_error=0.0125,
        num_target_tokens=5000,
        is_best=True,
        seconds=0.5,
    )


@pytest.fixture
def sampled() -> SampledEvent:
    samples = (
        Sample(prompt="def [bold]add(", completion="a, b):\n    return a  # [/bold]"),
        Sample(prompt="你好", completion="，世界"),
    )
    return SampledEvent(step=20, elapsed_s=10.5, samples=samples, seconds=0.2)


@pytest.fixture
def saved() -> SavedEvent:
    return SavedEvent(step=20, elapsed_s=11.0, checkpoint="step-20", reason="best", num_bytes=3 << 20, seconds=0.1)


@pytest.fixture
def scored() -> ScoredEvent:
    return ScoredEvent(
        step=20,
        elapsed_s=11.0,
        checkpoint="step-20",
        task="ifeval",
        metric="strict",
        scores={"strict": 0.25, "loose": 0.375},
        standard_error=0.0625,
        n=64,
        is_whole=False,
        is_best=True,
        seconds=75.0,
    )


@pytest.fixture
def chosen() -> ChosenEvent:
    return ChosenEvent(
        step=40,
        elapsed_s=60.0,
        task="ifeval",
        metric="strict",
        checkpoint="step-20",
        value=0.25,
        standard_error=0.0186,
        n=541,
        num_scored=2,
        finalists=("step-20", "step-40"),
        undecided=("step-40",),
    )


@pytest.fixture
def finding() -> FindingEvent:
    return FindingEvent(
        step=20,
        elapsed_s=11.0,
        symptom="a fifth of the time goes into waiting for data",
        evidence="wait_s is 0.1 of 0.5",
        likely_cause="one worker cannot keep up",
        remedy="dataloader_num_workers: 4",
    )


@pytest.fixture
def recovered() -> RecoveredEvent:
    return RecoveredEvent(
        step=2,
        elapsed_s=11.0,
        problem="out of memory",
        during="step",
        evidence="CUDA out of memory. Tried to allocate 1.50 GiB",
        remedy="repeated with micro_batch_size 4 -> 2",
        settings={"micro_batch_size": 2},
        held_bytes={"tensors": 3 << 30, "weights": 1 << 29},
    )


@pytest.fixture
def finished() -> FinishedEvent:
    return FinishedEvent(
        step=40,
        elapsed_s=65.0,
        reason="completed",
        loss=1.8,
        best_loss=1.75,
        best_step=20,
        tokens_seen=40_000,
        num_steps=40,
        tokens_per_s=2000.0,
        seconds=65.0,
    )
