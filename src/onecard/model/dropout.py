"""Dropout where a config does not offer it.

GPT-2's config knows residual, embedding and attention dropout; Llama's and Qwen's know attention dropout alone. What
is asked for is applied everywhere or refused, never in one place only.
"""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import InputError

# What the families call it, by place.
_EMBEDDING_KEYS = ("embd_pdrop", "embedding_dropout", "embed_dropout", "dropout")
_RESIDUAL_KEYS = (
    "resid_pdrop",
    "resid_dropout",
    "residual_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "dropout",
)
_ATTENTION_KEYS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
# Random as well, and never part of what is asked for.
_OTHER_KEYS = ("activation_dropout", "layerdrop")
_ATTENTION_MODULES = ("self_attn", "attn", "attention", "self_attention")
_MLP_MODULES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def set_config_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Sets every dropout the config knows, so that a saved model says what it was trained with."""
    for key in (*_EMBEDDING_KEYS, *_RESIDUAL_KEYS, *_ATTENTION_KEYS):
        if hasattr(config, key):
            setattr(config, key, dropout)
    for key in _OTHER_KEYS:
        if hasattr(config, key):
            setattr(config, key, 0.0)


def add_missing_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Adds embedding and residual dropout by hooks where the config has none; parameters and names stay as they are.

    Raises:
        InputError: the architecture's layers are not of a known form, so that dropout would be missing somewhere.
    """
    if dropout == 0.0:
        return
    config = model.config
    if not _knows(config, _ATTENTION_KEYS):
        raise InputError(
            f"dropout {dropout} cannot be applied to the attention of {config.model_type}: set dropout to 0"
        )
    if not _drops_embedding(model):
        _drop_output(model.get_input_embeddings(), dropout)
    if not _knows(config, _RESIDUAL_KEYS):
        for layer in _layers(model):
            _drop_output(_child(layer, _ATTENTION_MODULES, config, dropout), dropout)
            _drop_output(_child(layer, _MLP_MODULES, config, dropout), dropout)


def _knows(config: PreTrainedConfig, keys: Iterable[str]) -> bool:
    return any(hasattr(config, key) for key in keys)


def _drops_embedding(model: PreTrainedModel) -> bool:
    # By its modules: Phi-3 and OPT have a key that nothing reads, GPT-NeoX drops by one that is named otherwise.
    inside = {module for layer in _layers(model) for module in layer.modules()}
    outside = [module for module in model.base_model.modules() if module not in inside]
    return hasattr(model.base_model, "embedding_dropout") or any(isinstance(m, nn.Dropout) for m in outside)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _child(layer: nn.Module, names: Iterable[str], config: PreTrainedConfig, dropout: float) -> nn.Module:
    for name in names:
        if isinstance(child := getattr(layer, name, None), nn.Module):
            return child
    raise InputError(
        f"dropout {dropout} cannot be applied to {config.model_type}: its {type(layer).__name__} has none of the parts "
        f"{', '.join(names)}; set dropout to 0"
    )


def _drop_output(module: nn.Module, dropout: float) -> None:
    def drop(module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return F.dropout(output[0], dropout, module.training), *output[1:]
        return F.dropout(output, dropout, module.training)

    module.register_forward_hook(drop)
