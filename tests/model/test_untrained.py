"""Tokens that a base never trained are told by its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.model.build import build_model
from onecard.model.folder import save_model_folder
from onecard.model.untrained import find_untrained

SIZE, WIDTH, TOKEN, STD = 97, 32, 41, 0.02


def twin(rows: Tensor) -> None:
    rows[TOKEN] = rows[90] * 1.01


def zeros(rows: Tensor) -> None:
    rows[TOKEN] = 0


def mean(rows: Tensor) -> None:
    rows[TOKEN] = rows.mean(0)


def random(rows: Tensor) -> None:
    rows[TOKEN] = STD * torch.randn(WIDTH)


def short(rows: Tensor) -> None:
    rows[TOKEN] *= 0.05


SIGNS = {twin: "hardly different", zeros: "one value", mean: "mean of all", random: "random numbers", short: "shorter"}


@pytest.fixture
def save(settings_of: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    def make(spoil: Callable[[Tensor], None] | None, matrix: str, is_pickled: bool = False) -> Path:
        settings = settings_of("llama", tie_word_embeddings=matrix == "tied")
        model = build_model(settings, dropout=0.0, init="transformers", seed=0)
        torch.manual_seed(1)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        with torch.no_grad():
            for weight in (head, embedding):
                weight.copy_(0.15 * torch.randn(SIZE, WIDTH) + 0.05)
            if spoil is not None:
                spoil(head if matrix == "head" else embedding)
        save_model_folder(model, {}, tmp_path)
        if is_pickled:
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return tmp_path

    return make


@pytest.mark.parametrize("matrix", ["tied", "embedding", "head"])
@pytest.mark.parametrize("spoil", SIGNS)
def test_a_token_that_was_never_trained_is_found(
    spoil: Callable[[Tensor], None], matrix: str, save: Callable[..., Path]
) -> None:
    found = find_untrained(save(spoil, matrix), [3, TOKEN, SIZE + 1], vocab_size=SIZE, init_std=STD)
    assert list(found) == [TOKEN]
    assert SIGNS[spoil] in found[TOKEN]


def test_tokens_that_were_trained_are_not(save: Callable[..., Path]) -> None:
    assert find_untrained(save(None, "tied"), range(SIZE), vocab_size=SIZE, init_std=STD) == {}
    # A base that was never trained at all has no token that stands out.
    assert find_untrained(save(None, "tied"), range(SIZE), vocab_size=SIZE, init_std=0.15) == {}


def test_weights_of_pytorch_are_read_too(save: Callable[..., Path]) -> None:
    assert list(find_untrained(save(twin, "head", True), [3, TOKEN], vocab_size=SIZE, init_std=STD)) == [TOKEN]
