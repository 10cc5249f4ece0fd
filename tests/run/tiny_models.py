"""Folders of tiny models with random weights."""

from pathlib import Path
from typing import Any

from eight_chats import TEXT

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | SIZES | GATED,
    "qwen3": {"model_type": "qwen3", "head_dim": 16} | SIZES | GATED,
    "gpt2": {"model_type": "gpt2"} | SIZES,
}


def make_base(family: str, root: Path) -> Path:
    """The folder of a tiny model with random weights, made where it is not there yet; its head answers surely."""
    from onecard.data.tokenizer import train_tokenizer
    from onecard.model.build import build_model
    from onecard.model.folder import save_model_folder

    if not (root / family).exists():
        tokenizer = train_tokenizer("bpe", [TEXT * 4], 320)
        settings = FAMILIES[family] | {"vocab_size": len(tokenizer), "initializer_range": 0.2}
        settings |= {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
        save_model_folder(build_model(settings, dropout=0.0, init="transformers", seed=3), {}, root / family)
        tokenizer.save_pretrained(root / family)
    return root / family
