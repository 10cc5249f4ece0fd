"""Exports of runs: adapters merged or kept apart, and what the record tells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from safetensors.torch import load_file, save_file

import onecard
from onecard.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from conftest import Runner

SLOW_LEARNERS = {"learning_rate": 0.02, "max_steps": 4, "eval_fraction": 0.25, "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_adapter_answers_as_the_adapter(method: str, tuner: Callable[..., "Runner"], tmp_path: Path) -> None:
    run = tuner("llama", method=method, **SLOW_LEARNERS).start("run")
    for to in ("merged", "adapter"):
        result = onecard.export(run.root, to, dtype="f32")
        assert result.fidelity.share < 1e-5
        assert (Path(result.folder) / "README.md").is_file()
        is_told = any("4 bits" in note for note in result.notes)
        assert is_told is (method == "qlora")
    rows = [json.loads(line) for line in (run.root / "exports.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["format"] for row in rows] == ["merged", "adapter"]
    with pytest.raises(InputError, match="--to merged"):
        onecard.export(run.root, "hf")
    with pytest.raises(InputError, match="not empty"):
        onecard.export(run.root, "merged", dtype="f32")
    assert len((run.root / "exports.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_new_tokens_go_along(tuner: Callable[..., "Runner"]) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    run = tuner("llama", method="lora", chat_template="chatml", **SLOW_LEARNERS).start("run")
    for to in ("merged", "adapter", "gguf"):
        assert onecard.export(run.root, to, dtype="f32").fidelity.share < 1e-5


def test_the_card_is_filled_in_from_the_record(tuner: Callable[..., "Runner"], tmp_path: Path) -> None:
    runner = tuner("gpt2", **SLOW_LEARNERS)
    run = runner.start("run")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    onecard.evaluate(run.root, checkpoints="last")
    result = onecard.export(run.root, "hf", dtype="f32", checkpoint="last", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert result.checkpoint == run.checkpoints[-1]
    assert "| `chats.jsonl` | " in text
    assert "cc-by-4.0" in text
    assert "| Its licence | unknown |" in text
    loss = run.events("evaluated")[-1]["loss"]
    assert f"measured in training: {loss:.4f}" in text
    assert "| perplexity | " in text
    assert "learning_rate: 0.02" in text
    assert str(tmp_path) not in text
    assert "| Base model | gpt2 |" in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["onecard", "full"]


def test_what_is_missing_is_named(tuner: Callable[..., "Runner"], bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = tuner("llama", method="lora", **SLOW_LEARNERS).start("run")
    base = bases("llama") / "model.safetensors"
    weights = load_file(base)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base, {"format": "pt"})
    try:
        with pytest.raises(CheckpointError, match="has changed since"):
            onecard.export(run.root, "merged")
    finally:
        save_file(weights, base, {"format": "pt"})
    for checkpoint in run.root.glob("checkpoints/*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        onecard.export(run.root, "merged")
    assert not (run.root / "exports").exists()
