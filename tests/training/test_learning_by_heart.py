"""Every mode learns eight lines by heart."""

from collections.abc import Callable

import pytest
import torch

from onecard.spec import AdaptPlan, Plan
from onecard.training.assemble import assemble
from onecard.training.micro_batch import MicroBatch
from onecard.training.step import train_step

LINES = (
    "I met a traveller from an antique land",
    "Who said: Two vast and trunkless legs of stone",
    "Stand in the desert. Near them, on the sand,",
    "Half sunk, a shattered visage lies, whose frown,",
    "And wrinkled lip, and sneer of cold command,",
    "Tell that its sculptor well those passions read",
    "Which yet survive, stamped on these lifeless things,",
    "The hand that mocked them and the heart that fed.",
)


def lines_as_batch() -> MicroBatch:
    """One row per line; the first bytes are given, since nothing foretells which line it is."""
    length = max(map(len, LINES))
    ids = torch.tensor([[0, *(byte - 31 for byte in line.encode().ljust(length))] for line in LINES])
    targets = ids[:, 1:].clone()
    targets[:, :2] = -100
    return MicroBatch(ids[:, :-1].contiguous(), targets, None)


@pytest.mark.parametrize(
    ("name", "optimizer", "precision"),
    [("gpt2", "adamw", "fp32"), ("qwen3", "muon", "fp32"), ("qwen3", "muon", "bf16"), ("llama", "adamw", "bf16")],
)
def test_eight_lines_are_learnt_by_heart(
    name: str, optimizer: str, precision: str, tiny_plan: Callable[..., Plan]
) -> None:
    plan = tiny_plan(name, optimizer=optimizer, precision=precision, learning_rate=1e-2, init="zero-output")
    check_learning(plan)


# Adapters beside random weights: the head stays as it is drawn, so it is drawn large enough for sure answers.
@pytest.mark.parametrize(
    ("name", "method", "precision"),
    [("gpt2", "lora", "fp32"), ("qwen3", "lora", "bf16"), ("llama", "qlora", "bf16"), ("gpt2", "qlora", "fp32")],
)
def test_adapters_learn_eight_lines_by_heart(
    name: str, method: str, precision: str, tiny_plan: Callable[..., Plan]
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plan = tiny_plan(
        name, optimizer="adamw", precision=precision, learning_rate=1e-2, adapt=AdaptPlan(method=method, r=16)
    )
    check_learning(plan, initializer_range=0.2)


def check_learning(plan: Plan, **changes: float) -> None:
    settings = plan.model.settings | {"hidden_size": 64, "max_position_embeddings": 64, "num_attention_heads": 4}
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"settings": settings | changes})})
    state, batch = assemble(plan), lines_as_batch()
    losses = []
    for step in range(120):
        rate = plan.optimizer.learning_rate * min(1.0, (step + 1) / 10, (120 - step) / 40)
        losses.append(float(train_step(state, [batch], rate, max_grad_norm=1.0).loss))
        if losses[-1] < 0.1:
            break
    assert losses[0] > 3.0
    assert losses[-1] < 0.1
