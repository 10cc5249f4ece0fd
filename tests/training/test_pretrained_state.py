"""An existing model trains by every method, is saved and goes on, and its own weights alone will do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from onecard.checkpoint import read_checkpoint, write_checkpoint
from onecard.errors import CheckpointError
from onecard.model.build import build_model
from onecard.model.folder import load_model_folder, save_model_folder
from onecard.model.weight_files import fingerprint
from onecard.planner.trace import record_plan
from onecard.spec import AdaptPlan, BasePlan, Plan
from onecard.training.assemble import assemble
from onecard.training.micro_batch import MicroBatch
from onecard.training.snapshot import restore, snapshot
from onecard.training.state import TrainState
from onecard.training.step import train_step

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

NUM_NEW = 2
METHODS = {
    "full": None,
    "lora": AdaptPlan(method="lora", r=4),
    "qlora": AdaptPlan(method="qlora", r=4),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a"
    )


@pytest.fixture
def make_plan(
    tmp_path: Path, tiny_plan: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]
) -> Callable[..., Plan]:
    """A plan for a model that lies in `base`, stored in 16 bits as most are."""

    def make(name: str, method: str, *, num_new: int = NUM_NEW, **changes: Any) -> Plan:
        folder = tmp_path / "base"
        if not folder.exists():
            model = build_model(settings_of(name), dropout=0.0, init="transformers", seed=5)
            save_model_folder(model, {}, folder)
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        base = BasePlan(name=str(folder), folder=str(folder), fingerprint=fingerprint(folder), num_new_tokens=num_new)
        changes |= {"settings": settings_of(name, vocab_size=97 + num_new), "init": "pretrained", "base": base}
        return tiny_plan(name, optimizer="adamw", adapt=METHODS[method], **changes)

    return make


def step(state: TrainState, batch: MicroBatch) -> float:
    torch.manual_seed(0)
    return float(train_step(state, [batch], 1e-2, max_grad_norm=1.0).loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "method"), [("llama", "full"), ("gpt2", "lora"), ("qwen3", "qlora")])
def test_a_resumed_run_goes_on_bit_for_bit_and_its_checkpoint_writes(
    name: str,
    method: str,
    precision: str,
    make_plan: Callable[..., Plan],
    random_micro_batch: Callable[..., MicroBatch],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    plan = make_plan(name, method, precision=precision)
    whole = assemble(plan)
    batches = [random_micro_batch(4, seed) for seed in range(6)]
    for batch in batches:
        batch.ids[:, 3], batch.targets[:, 5] = 97, 98  # the new tokens
    for batch in batches[:3]:
        step(whole, batch)
    write_checkpoint(tmp_path / "step-000003", snapshot(whole, tokenizer, {}))
    resumed = assemble(plan)
    restore(resumed, read_checkpoint(tmp_path / "step-000003"))
    for state in (whole, resumed):
        for batch in batches[3:]:
            step(state, batch)
    assert whole.optimizer.masters.keys() == resumed.optimizer.masters.keys()
    for key, master in whole.optimizer.masters.items():
        assert torch.equal(master, resumed.optimizer.masters[key]), key

    write_checkpoint(tmp_path / "step-000006", snapshot(whole, tokenizer, {}))
    loaded, _ = load_model_folder(tmp_path / "step-000006", torch.float32)
    with torch.no_grad():
        own, again = (model.eval()(input_ids=batches[0].ids).logits.float() for model in (whole.model, loaded))
    assert torch.allclose(own, again, atol=1e-4 if precision == "fp32" else 0.05)
    assert again.shape[-1] == 99


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_weights_of_the_base_and_leaves_its_files_alone(
    method: str, make_plan: Callable[..., Plan], random_micro_batch: Callable[..., MicroBatch], tmp_path: Path
) -> None:
    plan = make_plan("llama", method, num_new=0)
    content = (tmp_path / "base" / "model.safetensors").read_bytes()
    state, batch = assemble(plan), random_micro_batch(4)
    stored = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).named_parameters())
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(state.model.get_parameter(norm), stored[norm])
    first = step(state, batch)
    assert [step(state, batch) for _ in range(8)][-1] < 0.97 * first
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == content


def test_weights_that_changed_after_the_plan_are_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan("llama", "lora")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.model.norm.weight += 0.1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="not those that this run was planned with"):
        assemble(plan)


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_needs_no_weights_and_has_the_bytes_of_a_real_step(method: str, make_plan: Callable[..., Plan]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = make_plan("llama", method)
    assert plan.model.base is not None
    absent = plan.model.base.model_copy(update={"folder": None, "fingerprint": None})
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"base": absent})})
    real = record_plan(plan)
    with FakeTensorMode():
        fake = record_plan(plan)
    assert fake.record.order == real.record.order
    assert fake.record.sizes == real.record.sizes
