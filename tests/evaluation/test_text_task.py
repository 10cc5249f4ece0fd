"""The loss of a text is that of transformers, whatever the batch size."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onecard.data.tokenizer import train_tokenizer
from onecard.errors import DataError
from onecard.evaluation.task import Subject
from onecard.evaluation.text_task import TextLossTask, text_batches

TEXT = "A river. 红楼梦, and so on until the night; " * 9


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest, settings_of: Callable[..., dict[str, Any]]) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = settings_of(request.param, vocab_size=300, max_position_embeddings=64, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()


def measure(path: Path, model: PreTrainedModel, batch_size: int, limit: int | None = None) -> dict[str, float]:
    task = TextLossTask(path, batch_size=batch_size, limit=limit)
    found = task.measure(Subject(model, train_tokenizer("bytes", ()), {}))
    return {score.name: score.value for score in found.scores} | {"n": found.scores[0].n}


def test_it_is_the_loss_of_transformers(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="\n")
    ids = train_tokenizer("bytes", ()).encode(TEXT, add_special_tokens=False)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 64):
        block = torch.tensor([ids[start : start + 65]])
        with torch.no_grad():
            logits = model(input_ids=block[:, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0].double(), block[0, 1:], reduction="sum"))
        count += block.shape[1] - 1
    found = measure(path, model, 1)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["n"] == count == len(ids) - 1
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode("utf-8")), rel=1e-5)
    for batch_size in (2, 3, 100):
        assert measure(path, model, batch_size)["loss"] == pytest.approx(found["loss"], rel=1e-6)
    path.write_text(TEXT[:20], encoding="utf-8", newline="\n")
    short = torch.tensor([train_tokenizer("bytes", ()).encode(TEXT[:20], add_special_tokens=False)])
    with torch.no_grad():
        assert measure(path, model, 4)["loss"] == pytest.approx(float(model(short, labels=short).loss), rel=1e-5)


def test_every_token_is_a_target_once() -> None:
    ids = list(range(100, 123))
    for batch_size in (1, 2, 10):
        batches = list(text_batches(ids, 5, batch_size))
        targets = [int(token) for batch in batches for token in batch.targets.flatten() if token >= 0]
        assert targets == ids[1:]
        assert sum(batch.num_targets for batch in batches) == 22
    assert [batch.ids[0, 0].item() for batch in text_batches(ids, 5, 1, limit=2)] == [100, 110]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xc3\xa9\0\1")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in [
        ("none", "cannot be read"),
        ("empty", "is empty"),
        ("binary", "NUL byte at offset 2"),
        ("latin", r"no UTF-8 text \(byte 3\)"),
    ]:
        with pytest.raises(DataError, match=message):
            TextLossTask(tmp_path / name, batch_size=1, limit=None)
