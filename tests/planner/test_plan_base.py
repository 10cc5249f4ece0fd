"""A run that starts from an existing model is planned by its shape, wherever that is known from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from onecard.errors import InputError
from onecard.hardware import probe_machine
from onecard.model.build import build_model, make_config
from onecard.model.folder import save_model_folder
from onecard.model.pretrained import load_pretrained
from onecard.planner import check_recipe
from onecard.planner.known_models import find_known_model
from onecard.planner.pretrained import plan_base
from onecard.planner.shape import attention_width
from onecard.spec import load_recipe


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# As transformers counts them from each published config, tied weights once.
@pytest.mark.parametrize(
    ("name", "num_parameters", "positions"),
    [
        ("gpt2", 124_439_808, 1024),
        ("gpt2-medium", 354_823_168, 1024),
        ("distilgpt2", 81_912_576, 1024),
        ("microsoft/DialoGPT-small", 124_439_808, 1024),
        ("microsoft/DialoGPT-medium", 354_823_168, 1024),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008, 8192),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 8192),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120, 8192),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, 2048),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 32768),
        ("Qwen/Qwen3-0.6B", 596_049_920, 40960),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 131072),
    ],
)
def test_known_models_are_planned_without_network_or_download(name: str, num_parameters: int, positions: int) -> None:
    reasons: dict[str, str] = {}
    plan = plan_base(name, max_seq_length=positions, reasons=reasons)
    assert plan.num_parameters == num_parameters
    assert plan.base is not None
    assert plan.base.fingerprint is None
    known = find_known_model(f"modelscope:{name.upper()}")
    assert known is not None
    stored = num_parameters * (4 if known.dtype == "float32" else 2)
    assert (
        stored <= plan.base.download_bytes <= 1.3 * stored
    )  # a GPT-2 file has causal masks, a Qwen3 file its head twice
    assert "as onecard knows it" in reasons["model.base.name"]
    assert attention_width(plan.settings)[0] == make_config(plan.settings).num_hidden_layers
    with pytest.raises(InputError, match=f"more than the {positions} positions of {name}"):
        plan_base(name, max_seq_length=positions + 1, reasons={})
    with pytest.raises(InputError, match="plan was made without its weights"):
        load_pretrained(plan, seed=0)


@pytest.fixture
def folder(tmp_path: Path, settings_of: Callable[..., dict[str, Any]]) -> Path:
    save_model_folder(build_model(settings_of("gpt2"), dropout=0.0, init="transformers", seed=0), {}, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"attn_pdrop": 0.1, "n_special": 0}), encoding="utf-8")
    return tmp_path / "base"


def test_a_folder_is_planned_and_trained_as_it_is(folder: Path) -> None:
    reasons: dict[str, str] = {}
    plan = plan_base(str(folder), max_seq_length=16, vocab_size=90, reasons=reasons)
    assert plan.base is not None
    assert (plan.base.num_new_tokens, plan.base.download_bytes, plan.dropout) == (0, 0, 0.0)
    assert "0.1" in reasons["model.dropout"]
    model = load_pretrained(plan, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.num_parameters
    with pytest.raises(InputError, match="more than the 32 positions"):
        plan_base(str(folder), max_seq_length=33, reasons={})
    assert plan_base(str(folder), max_seq_length=16, dropout=0.2, reasons=reasons).dropout == 0.2


def test_new_tokens_are_counted_and_nothing_is_padded(folder: Path) -> None:
    plan = plan_base(str(folder), max_seq_length=16, vocab_size=99, reasons=(reasons := {}))
    assert plan.base is not None
    assert (plan.settings["vocab_size"], plan.base.num_new_tokens) == (99, 2)
    assert "97 tokens" in reasons["model.settings.vocab_size"]
    model = load_pretrained(plan, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.num_parameters
    with pytest.raises(InputError, match="tokenizer of another model"):
        plan_base(str(folder), max_seq_length=16, vocab_size=50_000, reasons={})


def test_a_config_alone_is_enough_to_plan(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    plan = plan_base(str(folder), max_seq_length=16, reasons=(reasons := {}))
    assert plan.base is not None
    assert plan.base.fingerprint is None
    assert plan.base.download_bytes == 4 * plan.num_parameters
    assert "not here yet" in reasons["model.base.name"]


@pytest.mark.parametrize(
    ("changes", "message"), [({"lora_r": 64}, "r 64 is more than"), ({"lora_target_modules": "q_proj"}, "no layer of")]
)
def test_adapters_without_a_place_are_refused_before_any_text_is_read(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"model_name_or_path": str(folder), "dataset": "missing.jsonl", "method": "lora", "max_seq_length": 16}
    recipe = load_recipe(given | changes)
    with pytest.raises(InputError, match=message):
        check_recipe(recipe, probe_machine())


def test_what_is_unknown_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not in the cache"):
        plan_base("org/unknown", max_seq_length=16, reasons={})
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    with pytest.raises(InputError, match="no causal language model"):
        plan_base(str(tmp_path), max_seq_length=16, reasons={})
