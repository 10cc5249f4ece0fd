"""A state in training goes back in place, and lets go of what a step that broke off has left."""

from collections.abc import Callable

import pytest
import torch

from onecard.spec import Plan
from onecard.spec.fallback import find_smaller_step
from onecard.training.assemble import adopt, assemble, start_again
from onecard.training.micro_batch import MicroBatch
from onecard.training.state import Progress, TrainState
from onecard.training.step import train_step


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    weights = {f"weight.{name}": tensor for name, tensor in state.model.state_dict().items()}
    found = weights | state.optimizer.masters | state.optimizer.state_tensors()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def step(state: TrainState, batch: MicroBatch) -> None:
    train_step(state, [batch], 1e-2, max_grad_norm=1.0)
    state.progress.step += 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_beginning_is_where_it_was(
    optimizer: str, precision: str, tiny_plan: Callable[..., Plan], random_micro_batch: Callable[..., MicroBatch]
) -> None:
    state = assemble(tiny_plan(optimizer=optimizer, precision=precision))
    before, places = tensors(state), {name: m.data_ptr() for name, m in state.optimizer.masters.items()}
    for seed in range(2):
        step(state, random_micro_batch(4, seed))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(state).items())
    start_again(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(state).items())
    assert state.progress == Progress()
    assert places == {name: m.data_ptr() for name, m in state.optimizer.masters.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_backward_pass_that_broke_off_leaves_no_gradient(
    precision: str, tiny_plan: Callable[..., Plan], random_micro_batch: Callable[..., MicroBatch]
) -> None:
    clean, torn = (assemble(tiny_plan(optimizer="adamw", precision=precision)) for _ in range(2))
    for parameter in torn.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torn.optimizer.forget_gradients()
    for state in (clean, torn):
        step(state, random_micro_batch(4))
    assert all(torch.equal(tensor, tensors(clean)[name]) for name, tensor in tensors(torn).items())


def test_a_smaller_step_is_the_same_step(
    tiny_plan: Callable[..., Plan], random_micro_batch: Callable[..., MicroBatch]
) -> None:
    plan = tiny_plan(optimizer="adamw", micro_batch_size=1, adam_epsilon=1e-4)
    usual, smaller = assemble(plan), assemble(plan)
    while (fallback := find_smaller_step(smaller.plan)) is not None:
        adopt(smaller, fallback.plan)
    assert smaller.plan.gradient_checkpointing is True
    assert smaller.head.chunk_size == 64
    assert any(getattr(module, "gradient_checkpointing", False) for module in smaller.model.modules())
    for state in (usual, smaller):
        step(state, random_micro_batch(4))
    for name, master in usual.optimizer.masters.items():
        torch.testing.assert_close(smaller.optimizer.masters[name], master, rtol=0, atol=1e-5)
