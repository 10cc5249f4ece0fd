"""Saved models are what every other tool opens."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from onecard.errors import CheckpointError, DoesNotFitError
from onecard.model.build import build_model
from onecard.model.folder import is_finite, load_masters, load_model_folder, save_model_folder
from onecard.model.shortage import is_out_of_memory

IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_transformers_loads_the_same_logits(
    name: str, is_tied: bool, tmp_path: Path, settings_of: Callable[..., dict[str, Any]]
) -> None:
    model = build_model(settings_of(name, tie_word_embeddings=is_tied), dropout=0.1, init="transformers", seed=0).eval()
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for parameter in model.parameters():  # as in training with 16 bits: the masters are what counts
            parameter.data = parameter.data.to(torch.bfloat16)
    save_model_folder(model, masters, tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert config["use_cache"] is True
    assert "onecard" not in json.dumps(config)
    assert model.config.use_cache is False
    found = load_masters(tmp_path)
    assert found.keys() == masters.keys()
    assert all(torch.equal(found[key], masters[key]) for key in masters)


def test_weights_of_other_shapes_are_told_in_a_sentence_alone(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] += 1
    config["vocab_size"] += 8
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    heard, logger = list[str](), logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with pytest.raises(CheckpointError, match=r"(?s)its weights are not those.*missing.*another shape"):
            load_model_folder(model_folder, torch.float32)
        assert heard == []
        logger.warning("something else")
        assert heard == ["something else"]
    finally:
        logger.removeHandler(handler)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, settings_of: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model_folder(tmp_path, torch.float32)
    model = build_model(settings_of("llama"), dropout=0.0, init="transformers", seed=0)
    save_model_folder(model, {}, tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        load_model_folder(tmp_path, torch.float32)


@pytest.fixture
def model_folder(tmp_path: Path, settings_of: Callable[..., dict[str, Any]]) -> Path:
    from onecard.data import train_tokenizer

    save_model_folder(build_model(settings_of("llama"), dropout=0.0, init="transformers", seed=0), {}, tmp_path)
    train_tokenizer("bytes", ()).save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"', encoding="utf-8")


def make_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]", encoding="utf-8")


def forget_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "holds no model that transformers can read"),
        (make_list, "holds no model that transformers can read"),
        (lambda folder: edit(folder / "config.json", hidden_size="wide"), "holds no model"),
        (lambda folder: edit(folder / "config.json", model_type="qwen3"), "are not those of the qwen3"),
        (lambda folder: edit(folder / "config.json", model_type="gpt2"), "are not those of the gpt2"),
        (lambda folder: edit(folder / "config.json", model_type="t5"), "a t5 is no causal language model. Choose"),
        (
            lambda folder: edit(folder / "config.json", model_type="ours"),
            "model_type 'ours' is unknown",
        ),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=9), "are not those of the llama"),
        (
            lambda folder: edit(folder / "config.json", intermediate_size=96),
            "are not those of the llama|holds no model",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "damaged weights: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "holds no tokenizer"),
        (forget_tokens, "there are no tokens in it"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "holds no tokenizer"),
    ],
)
def test_a_damaged_folder_is_explained(damage: Callable[[Path], object], message: str, model_folder: Path) -> None:
    load_model_folder(model_folder, torch.float32)
    damage(model_folder)
    with pytest.raises(CheckpointError, match=message):
        load_model_folder(model_folder, torch.float32)


def test_weights_that_are_no_numbers_are_refused(model_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights model\.norm\.weight are not finite"):
        load_model_folder(model_folder, torch.float32)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")],
    ids=["Python", "PyTorch", "GPU"],
)
def test_memory_that_runs_out_is_no_damage(
    error: Exception, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DoesNotFitError, match=r"memory ran out while .* was loaded") as caught:
        load_masters(model_folder)
    assert is_out_of_memory(caught.value)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what operators make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        own = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                self.largest = max(self.largest, tensor.nbytes)
        return result


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
def test_finite_is_told_without_memory_of_the_size(bad: float | None) -> None:
    tensor = torch.randn(64, 64)
    if bad is not None:
        tensor[5, 7] = bad
    with _Allocations() as found:
        assert is_finite(tensor) == (bad is None)
    assert 0 < found.largest <= 16
