"""Saved models are what every other tool opens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.errors import CheckpointError
from onecard.model.build import build_model
from onecard.model.folder import load_masters, load_model_folder, save_model_folder

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


def test_a_folder_without_a_model_is_refused(tmp_path: Path, settings_of: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match="holds no model that transformers can read"):
        load_model_folder(tmp_path, torch.float32)
    model = build_model(settings_of("llama"), dropout=0.0, init="transformers", seed=0)
    save_model_folder(model, {}, tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        load_model_folder(tmp_path, torch.float32)
