"""New tokens beside adapters: their rows move as if all rows did, and plain PEFT reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from onecard.errors import CheckpointError, InputError
from onecard.model.adapt import adapt
from onecard.model.build import build_model
from onecard.model.decoder import Decoder
from onecard.model.folder import load_model_folder, save_adapter_folder, save_model_folder
from onecard.model.lora import merge
from onecard.model.loss import find_head, sum_loss, token_losses
from onecard.model.new_tokens import add_tokens
from onecard.model.weight_files import fingerprint
from onecard.spec import AdaptPlan, BasePlan

NUM_OLD, NUM_NEW = 97, 3
NEW = range(NUM_OLD, NUM_OLD + NUM_NEW)
IDS = torch.randint(NUM_OLD + NUM_NEW, (4, 16), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(NUM_OLD + NUM_NEW, (64,), generator=torch.Generator().manual_seed(1))
NAMES = ["llama", "qwen3", "gpt2"]
LORA = AdaptPlan(method="lora", r=4)


@pytest.fixture
def build(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., PreTrainedModel]:
    def make(name: str, is_tied: bool = True, num_new: int = NUM_NEW) -> PreTrainedModel:
        model = build_model(
            settings_of(name, tie_word_embeddings=is_tied), dropout=0.0, init="transformers", seed=0
        ).eval()
        add_tokens(model, num_new)
        return model

    return make


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)


def loss_of(model: PreTrainedModel) -> Tensor:
    return sum_loss(Decoder(model, compiled=False)(IDS, None), find_head(model), TARGETS)


@pytest.mark.parametrize("tokens", [list(NEW), [0, 41, 98]], ids=["new", "scattered"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_learned_tokens_get_the_gradient_that_whole_matrices_would(
    name: str, is_tied: bool, tokens: list[int], build: Callable[..., PreTrainedModel]
) -> None:
    whole, model = build(name, is_tied), build(name, is_tied)
    adapt(model, LORA, seed=0, tokens=tokens)
    moving = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert len(moving) == (1 if is_tied else 2)
    with torch.no_grad():  # after some updates, of which the frozen matrices know nothing yet
        for matrix, module in (
            (whole.get_input_embeddings().weight, model.get_input_embeddings()),
            (whole.get_output_embeddings().weight, model.get_output_embeddings()),
        ):
            torch.manual_seed(2)
            matrix[tokens] = torch.randn(len(tokens), matrix.shape[1])
            module.rows.copy_(matrix[tokens])
    losses = loss_of(whole), loss_of(model)
    torch.testing.assert_close(losses[1], losses[0])
    head = find_head(model)
    assert torch.allclose(token_losses(Decoder(model, compiled=False)(IDS, None), head, TARGETS).sum(), losses[0])
    for loss in losses:
        loss.backward()
    for expected, module in (
        (whole.get_input_embeddings(), model.get_input_embeddings()),
        (whole.get_output_embeddings(), model.get_output_embeddings()),
    ):
        torch.testing.assert_close(module.rows.grad, expected.weight.grad[tokens], rtol=1e-4, atol=1e-5)
        assert module.weight.grad is None
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_a_merged_model_is_plain_and_has_the_rows(is_tied: bool, build: Callable[..., PreTrainedModel]) -> None:
    model = build("llama", is_tied)
    names = {name: type(module) for name, module in build("llama", is_tied).named_modules()}
    adapt(model, LORA, seed=0, tokens=NEW)
    disturb(model)
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied


# PEFT asks transformers for a property by its old name (0.21 and 5.23).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_peft_loads_them_into_a_resized_base(
    name: str, is_tied: bool, tmp_path: Path, build: Callable[..., PreTrainedModel]
) -> None:
    from peft import PeftModel

    model = saved(name, is_tied, LORA, tmp_path, build)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(NUM_OLD + NUM_NEW, mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "method"), [("llama", "lora"), ("gpt2", "lora"), ("qwen3", "qlora")])
def test_an_adapter_folder_opens_as_the_model_that_was_trained(
    name: str, method: str, is_tied: bool, tmp_path: Path, build: Callable[..., PreTrainedModel]
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = saved(name, is_tied, AdaptPlan(method=method, r=4), tmp_path, build)
    loaded, _ = load_model_folder(tmp_path / "adapter", torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path, build: Callable[..., PreTrainedModel]) -> None:
    saved("llama", True, LORA, tmp_path, build)
    load_model_folder(tmp_path / "adapter", torch.float32)
    other = build("llama", num_new=0)
    with torch.no_grad():
        other.model.norm.weight += 0.01
    save_model_folder(other, {}, tmp_path / "base")
    with pytest.raises(CheckpointError, match="adapter for other weights than those in"):
        load_model_folder(tmp_path / "adapter", torch.float32)
    (tmp_path / "adapter" / "frozen_weights.json").unlink()  # as another tool writes it
    load_model_folder(tmp_path / "adapter", torch.float32)


def saved(
    name: str, is_tied: bool, plan: AdaptPlan, root: Path, build: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    save_model_folder(build(name, is_tied, num_new=0), {}, root / "base")
    model = build(name, is_tied)
    model.config.name_or_path = str(root / "base")
    adapt(model, plan, seed=0, tokens=NEW)
    disturb(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a"
    )
    tokenizer.save_pretrained(root / "adapter")
    base = BasePlan(name="x", fingerprint=fingerprint(root / "base"), num_new_tokens=NUM_NEW)
    save_adapter_folder(model, {}, root / "adapter", base)
    config = json.loads((root / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert all(tokens == [97, 98, 99] for tokens in config["trainable_token_indices"].values())
    return model


def test_an_embedding_that_does_more_than_look_up_is_refused(build: Callable[..., PreTrainedModel]) -> None:
    class Scaled(torch.nn.Embedding):
        pass

    model = build("llama")
    model.set_input_embeddings(Scaled(100, 32))
    with pytest.raises(InputError, match="use method full"):
        adapt(model, LORA, seed=0, tokens=NEW)


# Dynamo instantiates torch.autograd.Function, which warns against that (PyTorch 2.13).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_moving_rows_compile_without_a_graph_break(build: Callable[..., PreTrainedModel]) -> None:
    model = build("gpt2")
    adapt(model, LORA, seed=0, tokens=NEW)
    disturb(model)
    decoder, gradients = Decoder(model, compiled=False), []
    for compiled in (False, True):
        if compiled:
            decoder._call = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
        decoder(IDS, None).square().sum().backward()
        gradients.append(model.get_input_embeddings().rows.grad)
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
