"""Existing models start training as they are, and what is not theirs is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onecard.errors import CheckpointError, InputError
from onecard.model.build import build_model
from onecard.model.folder import save_model_folder
from onecard.model.pretrained import load_pretrained, make_hollow, read_settings
from onecard.model.weight_files import fingerprint
from onecard.spec import BasePlan, ModelPlan

IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
NAMES = ["llama", "qwen2", "qwen3", "gpt2"]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model.eval()(input_ids=ids).logits
    return out


@pytest.fixture
def make_folder(tmp_path: Path, settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        if name == "qwen2":
            name, changes = "llama", changes | {"model_type": "qwen2"}
        model = AutoModelForCausalLM.from_config(
            build_model(settings_of(name, **changes), dropout=0.0, init="transformers", seed=3).config, dtype=dtype
        )
        folder = tmp_path / f"{name}-{dtype}"
        model.save_pretrained(folder)
        return folder

    return make


def plan_of(folder: Path, *, num_new: int = 0, dropout: float = 0.0) -> ModelPlan:
    settings = {key: value for key, value in read_settings(folder).items() if key not in ("architectures", "dtype")}
    settings["vocab_size"] += num_new
    base = BasePlan(name="org/name", folder=str(folder), fingerprint=fingerprint(folder), num_new_tokens=num_new)
    return ModelPlan(
        settings=settings, dropout=dropout, init="pretrained", num_parameters=1, num_matrix_parameters=1, base=base
    )


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_computes_what_transformers_loads(
    name: str, is_tied: bool, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(name, tie_word_embeddings=is_tied)
    model = load_pretrained(plan_of(folder), seed=0)
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied
    assert model.config.name_or_path == "org/name"
    without = load_pretrained(plan_of(folder), seed=0, with_weights=False)
    assert {n: p.shape for n, p in without.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {n: b.shape for n, b in without.named_buffers()} == {n: b.shape for n, b in model.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_stay_in_the_type_of_their_file_and_buffers_in_fp32(
    dtype: torch.dtype, make_folder: Callable[..., Path]
) -> None:
    model = load_pretrained(plan_of(make_folder("qwen3", dtype)), seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_dropout_of_the_config_is_the_one_of_the_plan(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("gpt2")
    edit(folder / "config.json", attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3)
    for dropout in (0.0, 0.4):
        model = load_pretrained(plan_of(folder, dropout=dropout), seed=0)
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert found == {dropout}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_new_tokens_get_the_mean_row_and_change_no_other(
    name: str, is_tied: bool, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(name, tie_word_embeddings=is_tied)
    model, plain = (load_pretrained(plan_of(folder, num_new=num_new), seed=0) for num_new in (3, 0))
    torch.testing.assert_close(logits(model)[..., :97], logits(plain))
    for module, old in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        assert module.weight.shape[0] == 100, "the vocabulary is not padded"
        torch.testing.assert_close(module.weight[97:], old.weight.mean(0).expand(3, -1))
    assert model.config.vocab_size == 100
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hollow_model_is_the_loaded_one_without_weights(
    name: str, is_tied: bool, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(name, tie_word_embeddings=is_tied)
    edit(folder / "generation_config.json", eos_token_id=[5, 7], temperature=0.3, do_sample=True)
    plan = plan_of(folder, num_new=3, dropout=0.1)
    model, hollow = load_pretrained(plan, seed=0), make_hollow(plan, backend="sdpa")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in hollow.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in hollow.parameters())
    # These no checkpoint has, and every rank makes them by itself.
    torch.testing.assert_close(dict(hollow.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
    for one, other in ((hollow.config, model.config), (hollow.generation_config, model.generation_config)):
        assert one.to_dict() == other.to_dict()
    assert hollow.config.name_or_path == model.config.name_or_path
    assert (hollow.get_input_embeddings().weight is hollow.get_output_embeddings().weight) is is_tied


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def shard_without_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}', encoding="utf-8")


def set_nan(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"damaged weights: .*model\.safetensors: \d+ bytes instead of \d+"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 1000), "no safetensors file, or cut off"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (shard_without_file, r"1 of 2 weight files are missing \(model-00002-of-00002\.safetensors\)"),
        (index_elsewhere, "it names no files of its own folder"),
        (lambda f: edit_weights(f, set_nan), r"weights model\.norm\.weight are not finite"),
        (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), r"1 are missing \(model\.norm\.weight\)"),
        (
            lambda f: edit_weights(f, lambda w: w.update({"score.weight": torch.ones(2)})),
            r"1 are not of this model \(score\.weight\)",
        ),
        (
            lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(2)})),
            r"1 are of another shape \(model\.norm\.weight\)",
        ),
        (lambda f: edit(f / "config.json", vocab_size=90), "of another shape"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: edit(f / "config.json", model_type="t5"), "a t5 is no causal language model"),
        (lambda f: edit(f / "config.json", model_type="own"), "'own' is unknown to transformers"),
        (lambda f: edit(f / "config.json", architectures=["BertForMaskedLM"]), "it holds a BertForMaskedLM"),
        (lambda f: edit(f / "config.json", model_type=["llama"]), "is unknown to transformers"),
        (lambda f: edit(f / "config.json", architectures="LlamaForCausalLM"), "no list of names"),
        (lambda f: edit(f / "config.json", architectures=[5]), "no list of names"),
        (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantized already"),
        (lambda f: edit(f / "config.json", num_attention_heads="many"), "cannot be used"),
    ],
)
def test_a_damaged_or_wrong_folder_is_explained(
    damage: Callable[[Path], object], message: str, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder("llama")
    plan = plan_of(folder)
    load_pretrained(plan, seed=0)
    damage(folder)
    with pytest.raises(InputError, match=message):
        # What a plan would be made of now, else the fingerprint alone would refuse.
        load_pretrained(plan_again(plan, folder), seed=0)


def plan_again(plan: ModelPlan, folder: Path) -> ModelPlan:
    assert plan.base is not None
    base = plan.base.model_copy(update={"fingerprint": fingerprint(folder)})
    return plan.model_copy(update={"base": base})


def test_other_weights_than_planned_are_refused(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("llama")
    plan = plan_of(folder)
    edit_weights(folder, lambda w: [tensor.add_(1e-3) for tensor in w.values()])
    with pytest.raises(CheckpointError, match="not those that this run was planned with"):
        load_pretrained(plan, seed=0)
    base = BasePlan(name="org/name")
    with pytest.raises(InputError, match="this plan was made without its weights"):
        load_pretrained(plan.model_copy(update={"base": base}), seed=0)


def test_a_fingerprint_is_of_content_and_not_of_files(
    make_folder: Callable[..., Path], tmp_path: Path, settings_of: Callable[..., dict[str, Any]]
) -> None:
    folder = make_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "shards") == fingerprint(folder)
    torch.testing.assert_close(logits(load_pretrained(plan_of(tmp_path / "shards"), seed=0)), logits(model))
    before = fingerprint(folder)
    edit_weights(folder, lambda w: w["model.norm.weight"].add_(1e-3))
    assert fingerprint(folder) != before


def test_pickled_weights_are_read_without_running_them(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("gpt2")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    # As old files have it: causal masks beside the weights.
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(logits(load_pretrained(plan_of(folder), seed=0)), expected)

    torch.save({"weights": PretendedWeights()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no model that transformers can read"):
        load_pretrained(plan_of(folder), seed=0)
    assert not PretendedWeights.was_run


class PretendedWeights:
    was_run = False

    def __init__(self) -> None:
        self.state = 1  # without any, nothing would be called

    def __setstate__(self, state: object) -> None:
        PretendedWeights.was_run = True


def test_an_old_config_without_model_type_is_understood(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("gpt2")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del content["model_type"]
    (folder / "config.json").write_text(json.dumps(content | {"n_special": 0}), encoding="utf-8")
    assert read_settings(folder)["model_type"] == "gpt2"
    plan = plan_of(folder)
    load_pretrained(plan, seed=0)


def test_saved_again_it_is_the_base_with_its_generation_config(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder("llama")
    edit(folder / "generation_config.json", repetition_penalty=1.25)
    edit(folder / "config.json", task_specific_params={"x": 1})
    model = load_pretrained(plan_of(folder), seed=0)
    save_model_folder(model, {}, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert again.generation_config.repetition_penalty == 1.25
    assert again.config.task_specific_params == {"x": 1}
    assert again.config.use_cache is True
