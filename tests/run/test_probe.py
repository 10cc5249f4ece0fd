"""The worst case is tried without leaving a trace."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from onecard.data import Batch
from onecard.data.chats.batches import BatchShape, lay_out
from onecard.data.chats.packing import Packing
from onecard.run import probe, stepping
from onecard.run.probe import probe_worst_case
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.micro_batch import MicroBatch
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
    step = stepping.train_step

    def watch(state: TrainState, batches: list, *args: float, **keywords: float) -> StepStats:
        seen.extend(tuple(batch.ids.shape) for batch in batches)
        assert all(batch.borders is not None for batch in batches)
        return step(state, batches, *args, **keywords)

    monkeypatch.setattr(stepping, "train_step", watch)
    monkeypatch.setattr(probe, "sum_rows", lambda decoder, head, batch, backend: seen.append(tuple(batch.ids.shape)))
    state = assemble(tiny_plan(micro_batch_size=3, total_batch_size=7, eval_batch_size=6))
    probe_worst_case(state)
    assert seen == [(3, 16), (3, 16), (6, 16)]


@pytest.mark.parametrize("packing", ["off", "rows", "flat"])
def test_no_batch_of_chats_is_larger_than_those_that_are_tried(
    packing: Packing, tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[MicroBatch] = []
    evaluated: list[Batch] = []
    step = stepping.train_step

    def watch(state: TrainState, batches: list[MicroBatch], *args: float, **keywords: float) -> StepStats:
        steps.extend(batches)
        return step(state, batches, *args, **keywords)

    monkeypatch.setattr(stepping, "train_step", watch)
    monkeypatch.setattr(probe, "sum_rows", lambda decoder, head, batch, backend: evaluated.append(batch))
    corpus = tiny_plan().corpus.model_copy(update={"num_train_rows": 100})
    plan = tiny_plan(
        task="sft", packing=packing, corpus=corpus, micro_batch_size=3, total_batch_size=7, eval_batch_size=5
    )
    probe_worst_case(assemble(plan))
    tried = {tuple(batch.ids.shape) for batch in steps}
    generator = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = []
    for most in (plan.max_seq_length, plan.max_seq_length, 5):
        lengths = generator.integers(1, most + 1, 20) if shapes else [most] * 20
        pairs = [(np.ones(length, np.int64), np.ones(length, np.int64)) for length in lengths]
        shape = BatchShape(plan.max_seq_length, plan.micro_batch_size, packing, plan.has_static_shapes)
        batches = lay_out(pairs, shape, 0)
        shapes += [tuple(batch.ids.shape) for batch in batches]
        if packing == "off":
            assert all(batch.documents is None for batch in batches)
    assert tried == {max(shapes, key=math.prod)}
    for batch in steps:
        assert batch.target_index is not None, "targets are picked out of the others, which takes memory"
        assert len(batch.target_index) == batch.ids.numel() - 1
        assert (batch.borders is not None) is (packing != "off")
    (heldout,) = evaluated
    assert (tuple(heldout.ids.shape), heldout.documents) == ((5, plan.max_seq_length), None)


def test_a_compiler_that_fails_is_given_up_and_the_step_is_tried_without(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise TorchDynamoException("no Triton")

    monkeypatch.setattr(torch, "compile", lambda module, **_: fail)
    state = assemble(tiny_plan(torch_compile=True))
    before = everything(state)
    probe_worst_case(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(state).items())
    assert (state.decoder.is_compiled, state.plan.torch_compile) == (False, False)
    assert state.decoder.failure == "no Triton", "kept for the loop to tell"
