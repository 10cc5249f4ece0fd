"""Folders of tiny models with a tokenizer that GGUF can hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.data.tokenizer import train_tokenizer
from onecard.model.build import build_model
from onecard.model.folder import save_model_folder

_TEXT = "the quick brown fox jumps over a lazy dog; 山路很长，他们走了三天。\n" * 40
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_GATED = {"num_key_value_heads": 2, "intermediate_size": 80}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | _SIZES | _GATED,
    "qwen2": {"model_type": "qwen2"} | _SIZES | _GATED,
    "qwen3": {"model_type": "qwen3", "head_dim": 32} | _SIZES | _GATED,
    "gpt2": {"model_type": "gpt2"} | _SIZES,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a random model: `model_folder("llama", tie_word_embeddings=True)`."""
    tokenizer = train_tokenizer("bpe", [_TEXT], 300)
    root = tmp_path_factory.mktemp("models")

    def make(family: str, chat_template: str | None = None, **changes: Any) -> Path:
        folder = root / f"{family}-{len(list(root.iterdir()))}"
        # Eight rows more than tokens, as padded vocabularies have them.
        settings = FAMILIES[family] | {"vocab_size": 308, "initializer_range": 0.2, "bos_token_id": 0}
        settings |= {"eos_token_id": tokenizer.eos_token_id} | changes
        model = build_model(settings, dropout=0.0, init="transformers", seed=3)
        for name, parameter in model.named_parameters():  # biases that are not zero, norms that are not one
            if parameter.ndim == 1:
                torch.manual_seed(len(name))
                parameter.data += 0.1 * torch.randn(parameter.shape)
        save_model_folder(model, {}, folder)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return make
