"""The worst case is tried without leaving a trace."""

from collections.abc import Callable

import pytest
import torch

from onecard.run import probe
from onecard.run.probe import probe_worst_case
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.state import TrainState
from onecard.training.step import StepStats


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = {**state.model.state_dict(), **state.optimizer.masters, **state.optimizer.state_tensors()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_of_the_state_changes(optimizer: str, precision: str, tiny_plan: Callable[..., Plan]) -> None:
    state = assemble(tiny_plan(optimizer=optimizer, precision=precision, micro_batch_size=2, total_batch_size=5))
    before, progress = everything(state), state.progress
    assert probe_worst_case(state) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(state).items())
    assert state.progress == progress
    assert state.loss_scale.value.item() == 1.0
    assert all(master.grad is None for master in state.optimizer.masters.values())
    assert state.model.training


def test_the_longest_batches_are_tried(tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    step = probe.train_step

    def watch(state: TrainState, batches: list, *args: float, **keywords: float) -> StepStats:
        seen.extend(tuple(batch.ids.shape) for batch in batches)
        assert all(batch.borders is not None for batch in batches)
        return step(state, batches, *args, **keywords)

    monkeypatch.setattr(probe, "train_step", watch)
    monkeypatch.setattr(probe, "sum_rows", lambda decoder, head, batch, backend: seen.append(tuple(batch.ids.shape)))
    state = assemble(tiny_plan(micro_batch_size=3, total_batch_size=7, eval_batch_size=6))
    probe_worst_case(state)
    assert seen == [(3, 16), (3, 16), (6, 16)]
