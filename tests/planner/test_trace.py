"""A trace without storage allocates what a real step does, and what a card's kernels would."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.planner.recorder import Recorder
from onecard.planner.replay import replay
from onecard.planner.trace import Program, record_plan, record_program
from onecard.spec import Plan


@pytest.mark.parametrize("has_borders", [True, False], ids=["borders", "plain"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "optimizer"), [("qwen3", "muon"), ("llama", "adamw"), ("gpt2", "adamw")])
def test_fake_and_real_steps_allocate_the_same_bytes_in_the_same_order(
    name: str,
    optimizer: str,
    precision: str,
    gradient_checkpointing: bool,
    has_borders: bool,
    tiny_plan: Callable[..., Plan],
) -> None:
    plan = tiny_plan(
        name,
        optimizer=optimizer,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        dropout=0.1,
        micro_batch_size=2,
        total_batch_size=5,
    )
    real = record_plan(plan, has_borders=has_borders)
    with FakeTensorMode():
        fake = record_plan(plan, has_borders=has_borders)
    assert fake.record == real.record
    assert (fake.resident_end, fake.step_end) == (real.resident_end, real.step_end)


def test_a_program_whose_iterations_overlap_is_played_once() -> None:
    weights = torch.zeros(1024, 1024)

    def run(_: Recorder) -> None:
        kept = weights + 1
        for _ in range(3):
            kept = kept + 1

    trace = record_program(Program({"weights": [weights]}, None, run))
    # The weights, what an iteration begins with and what it makes.
    assert replay(trace, workspace_bytes=0).allocated_bytes == 3 * weights.nbytes
    assert trace.resident_end == trace.step_end == 1
