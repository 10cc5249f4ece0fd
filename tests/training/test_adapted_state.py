"""A model with adapters trains, is saved and goes on as any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from onecard.checkpoint import read_checkpoint, write_checkpoint
from onecard.errors import CheckpointError
from onecard.spec import AdaptPlan
from onecard.training.micro_batch import MicroBatch
from onecard.training.snapshot import restore, snapshot
from onecard.training.state import TrainState
from onecard.training.step import train_step

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a"
    )


@pytest.fixture
def make_state(tiny_state: Callable[..., TrainState]) -> Callable[..., TrainState]:
    def make(name: str = "llama", *, method: str = "qlora", r: int = 4, **changes: object) -> TrainState:
        adapt = AdaptPlan(method=method, r=r, bias="all" if name == "gpt2" else "none")
        return tiny_state(name, optimizer="adamw", adapt=adapt, **changes)

    return make


def step(state: TrainState, batch: MicroBatch) -> float:
    torch.manual_seed(0)
    return float(train_step(state, [batch], 1e-2, max_grad_norm=1.0).loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "method"), [("llama", "qlora"), ("gpt2", "qlora"), ("qwen3", "lora")])
def test_a_resumed_run_goes_on_bit_for_bit(
    name: str,
    method: str,
    precision: str,
    make_state: Callable[..., TrainState],
    random_micro_batch: Callable[..., MicroBatch],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    whole = make_state(name, method=method, precision=precision)
    for seed in range(3):
        step(whole, random_micro_batch(4, seed))
    write_checkpoint(tmp_path / "step-000003", snapshot(whole, tokenizer, {}))
    assert not (tmp_path / "step-000003" / "model.safetensors").exists()

    resumed = make_state(name, method=method, precision=precision)
    restore(resumed, read_checkpoint(tmp_path / "step-000003"))
    for state in (whole, resumed):
        for seed in range(3, 6):
            step(state, random_micro_batch(4, seed))
    assert whole.optimizer.masters.keys() == resumed.optimizer.masters.keys()
    for name, master in whole.optimizer.masters.items():
        assert torch.equal(master, resumed.optimizer.masters[name]), name
    expected = whole.optimizer.state_tensors()
    for name, tensor in resumed.optimizer.state_tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_other_adapters_is_refused(
    make_state: Callable[..., TrainState], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "step-000000", snapshot(make_state(r=4), tokenizer, {}))
    with pytest.raises(CheckpointError, match="belongs to another model or optimizer"):
        restore(make_state(r=8), read_checkpoint(tmp_path / "step-000000"))
    write_checkpoint(tmp_path / "step-000000", snapshot(make_state("gpt2"), tokenizer, {}))
    with pytest.raises(CheckpointError, match="belongs to another model or optimizer"):
        restore(make_state("llama"), read_checkpoint(tmp_path / "step-000000"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_recomputed_layers_give_the_same_update(
    method: str, make_state: Callable[..., TrainState], random_micro_batch: Callable[..., MicroBatch]
) -> None:
    kept, recomputed = (make_state(method=method, gradient_checkpointing=flag) for flag in (False, True))
    for seed in range(3):
        assert step(kept, random_micro_batch(4, seed)) == step(recomputed, random_micro_batch(4, seed))
    for name, master in kept.optimizer.masters.items():
        assert torch.equal(master, recomputed.optimizer.masters[name]), name
    assert all(".lora_" in name for name in kept.optimizer.masters)


def test_frozen_weights_stay_as_they_are_and_have_no_master(
    make_state: Callable[..., TrainState], random_micro_batch: Callable[..., MicroBatch]
) -> None:
    state = make_state(precision="bf16")
    frozen = {name: tensor.clone() for name, tensor in state.model.state_dict().items() if ".lora_" not in name}
    moving = {name: master.detach().clone() for name, master in state.optimizer.masters.items()}
    assert {tensor.dtype for name, tensor in frozen.items() if name.endswith("qweight")} == {torch.uint8}
    assert {tensor.dtype for name, tensor in frozen.items() if name.endswith("absmax")} == {torch.float32}
    assert {master.dtype for master in moving.values()} == {torch.float32}
    for seed in range(2):
        step(state, random_micro_batch(4, seed))
    now = state.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert all(not torch.equal(state.optimizer.masters[name], master) for name, master in moving.items())
