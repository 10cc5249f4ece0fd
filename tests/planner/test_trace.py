"""A trace without storage allocates what a real step does, and what a card's kernels would."""

from collections.abc import Callable

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.planner.trace import record_plan
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
