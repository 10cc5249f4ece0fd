"""Other weights for a model that is there already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onecard.errors import CheckpointError
from onecard.model.in_place import load_in_place

Make = Callable[..., PreTrainedModel]


@pytest.fixture
def make(settings_of: Callable[..., dict[str, Any]]) -> Make:
    def make(seed: int, name: str = "llama", **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        settings = settings_of(name, **changes)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()

    return make


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"name": "gpt2"}])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_it_is_the_model_of_the_folder(make: Make, tmp_path: Path, changes: dict[str, Any], shard_size: str) -> None:
    other, model = make(1, **changes), make(2, **changes)
    other.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert not torch.equal(logits(model), logits(other))
    assert load_in_place(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_weights_of_another_shape_change_nothing(make: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    make(1, **changes).save_pretrained(tmp_path)
    model = make(2)
    before = logits(model)
    assert not load_in_place(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_adapters_are_not_whole_models(make: Make, tmp_path: Path) -> None:
    make(1).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert not load_in_place(make(2), tmp_path)


def test_weights_that_are_no_numbers_are_refused(make: Make, tmp_path: Path) -> None:
    other = make(1)
    other.lm_head.weight.data[3, 4] = float("nan")
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight are not finite"):
        load_in_place(make(2), tmp_path)
