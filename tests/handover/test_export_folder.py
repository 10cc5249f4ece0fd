"""Folders for transformers and PEFT, the card beside them, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import onecard
from onecard.data.chats.template_choice import CHATML, DEFAULT
from onecard.errors import CheckpointError, InputError
from onecard.handover.ollama import FORMS, write_modelfile
from onecard.handover.speech import Speech
from onecard.model.folder import load_as_trained, load_plain

# Llama 2's form, written anew.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(24)[None]).logits
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_fp32_is_the_same_model(family: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder(family)
    result = onecard.export(folder, "hf", dtype="f32", output=tmp_path / "out")
    assert result.fidelity.largest_difference == 0.0
    assert torch.equal(logits(folder), logits(tmp_path / "out"))


def test_16_bits_are_stored_and_stated(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    result = onecard.export(model_folder("llama"), "hf", output=tmp_path / "out")
    assert result.dtype == "bf16"
    assert 0 < result.fidelity.share < 0.02
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_what_is_beyond_fp16_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    model = load_plain(folder, torch.float32)
    model.get_input_embeddings().weight.data[5, 5] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="65504: use --dtype bf16"):
        onecard.export(folder, "hf", dtype="fp16", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_chat_model_stops_where_it_learned_to(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    onecard.export(model_folder("llama", template), "hf", dtype="f32", output=tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    assert settings.eos_token_id == [tokenizer.eos_token_id]
    assert settings.pad_token_id == tokenizer.eos_token_id


def test_the_card_says_what_is_unknown(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    onecard.export(model_folder("llama"), "hf", dtype="f32", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "| Base model | unknown |" in text
    assert "| Largest difference of a logit | 0 " in text


@pytest.mark.parametrize(
    ("to", "dtype", "words"),
    [
        ("hf", "q8_0", "use bf16"),
        ("merged", None, "nothing to merge: use --to hf"),
        ("adapter", None, "no adapter: use --to hf"),
        ("onnx", "f64", "use hf, merged, gguf, adapter\n--dtype 'f64'"),
    ],
)
def test_what_cannot_be_is_refused(
    to: str, dtype: str | None, words: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        onecard.export(model_folder("llama"), to, dtype=dtype, output=tmp_path / "out")


def test_nothing_is_overwritten(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        onecard.export(model_folder("llama"), "hf", output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_before_writing(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="10 B are free"):
        onecard.export(folder, "hf", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_told(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("onecard.handover.export.save_model_folder", fail)
    with pytest.raises(InputError, match=r"cannot be written: .*No space left.*Nothing was kept"):
        onecard.export(model_folder("llama"), "hf", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model .*llama.* knows 100: its tokenizer is another model's"):
        onecard.export(model_folder("llama", vocab_size=100, eos_token_id=0), "hf", output=tmp_path / "out")


def test_a_damaged_model_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="damaged"):
        onecard.export(folder, "hf", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("template", "name", "words"),
    [
        (CHATML, "ChatML", "<|im_start|>user\n{{ .Content }}<|im_end|>"),
        (DEFAULT, "onecard", "Assistant: {{ .Content }}<|endoftext|>"),
        (LLAMA_2, "Llama 2", "[INST] "),
        ("{% for m in messages %}{{ '#' + m.content + '\n' }}{% endfor %}", "", "# No TEMPLATE"),
        (None, "none", "{{ .Prompt }}"),
    ],
)
def test_known_chat_forms_are_recognised(
    template: str | None, name: str, words: str, model_folder: Callable[..., Path]
) -> None:
    model, tokenizer = load_as_trained(model_folder("llama", template))
    text, found = write_modelfile("m.gguf", tokenizer, Speech.of(model, tokenizer), 64)
    assert found == name
    assert words in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert text.startswith("FROM ./m.gguf\n")
    assert text.endswith("PARAMETER num_ctx 64\n")


def test_a_default_system_prompt_becomes_ollamas(model_folder: Callable[..., Path]) -> None:
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
    model, tokenizer = load_as_trained(model_folder("llama", own))
    text, found = write_modelfile("m.gguf", tokenizer, Speech.of(model, tokenizer), 64)
    assert found == "ChatML"
    assert 'SYSTEM """Be kind."""' in text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_go_template_closes_what_it_opens(form: object) -> None:
    text = form.in_go("</s>")  # type: ignore[attr-defined]
    assert text.count("{{ if") + text.count("{{ range") == text.count("{{ end }}")
    assert "{eos}" not in text
