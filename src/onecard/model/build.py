"""Models from scratch, from any causal-LM config of transformers."""

import json
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from onecard.errors import InputError
from onecard.model.checks import check_architecture
from onecard.model.dropout import add_missing_dropout, set_config_dropout
from onecard.model.explain import explain_error
from onecard.model.families import find_backend, implementation_of, keep_weights, refuse_family
from onecard.model.kernels import fuse_kernels

# The last projection of attention and of the MLP, by the names the families use.
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "w2", "wo")

# Key of a config: the token before every document of the text that the model was trained on from scratch. Existing
# models leave this to their tokenizer.
DOCUMENT_START = "document_start_token_id"


def make_config(settings: dict[str, Any], dropout: float = 0.0) -> PreTrainedConfig:
    """Makes a transformers config from a mapping that holds `model_type`.

    Raises:
        InputError: unknown model type, a key the config does not know, or values it refuses.
    """
    settings = dict(settings)
    model_type, start = settings.pop("model_type", None), settings.pop(DOCUMENT_START, None)
    if not isinstance(model_type, str):
        raise InputError(
            "model_config has no model_type: add one that transformers knows, such as qwen3, llama or gpt2"
        )
    try:
        known = AutoConfig.for_model(model_type)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"model_config: model_type {model_type!r} is unknown to transformers: try qwen3, llama, gpt2"
        ) from error
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"model_config: model_type {model_type!r} is no causal language model: try qwen3, llama, gpt2")
    # Not every family of older code lists the ids that all of them take.
    allowed = {*known.to_dict(), *known.attribute_map, "bos_token_id", "eos_token_id", "pad_token_id"}
    if unknown := sorted(key for key in settings if key not in allowed and not _is_value(known, key)):
        near = get_close_matches(unknown[0], allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out, or look into a config.json of such a model"
        raise InputError(f"model_config: {model_type} has no setting named {', '.join(unknown)}; {hint}")
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"model_config: {model_type} refuses these settings: {explain_error(error)}. Change what is named"
        ) from error
    refuse_family(config)
    keep_weights(config)
    set_config_dropout(config, dropout)
    if start is not None:
        setattr(config, DOCUMENT_START, start)
    return config


def _is_value(config: PreTrainedConfig, key: str) -> bool:
    return hasattr(config, key) and not callable(getattr(config, key))


def build_model(
    settings: dict[str, Any], *, dropout: float, init: str, seed: int, backend: str | None = None
) -> PreTrainedModel:
    """Builds a causal language model in fp32 on the current default device, with weights that depend on `seed` alone.

    Args:
        settings: transformers config with `model_type`.
        init: `transformers` keeps the architecture's own start; `zero-output` zeroes the last projection of each
            attention and MLP, so that every block starts as the identity (arXiv 2203.03466, section on zero init).
        backend: attention backend; None is the one of the family (`families.py`).

    Raises:
        InputError: the config, the dropout or the initialisation cannot be honoured.
    """
    config = make_config(settings, dropout)
    torch.manual_seed(seed)
    model = _from_config(config, backend)
    _check(model)
    if init == "zero-output":
        _zero_output_projections(model)
    return _ready(model, dropout)


def build_hollow(config: PreTrainedConfig, backend: str | None) -> PreTrainedModel:
    """Builds a model whose parameters are on the meta device, where they take no memory; its buffers are there."""
    with init_empty_weights(include_buffers=False):
        model = _from_config(config, backend)
    model.tie_weights()  # each parameter was replaced by itself
    return model


def finish(model: PreTrainedModel, dropout: float) -> PreTrainedModel:
    """Readies a loaded or hollow model for training as `build_model` readies one from scratch.

    Raises:
        InputError: training would not do what it says with this architecture.
    """
    _check(model)
    return _ready(model, dropout)


def _ready(model: PreTrainedModel, dropout: float) -> PreTrainedModel:
    add_missing_dropout(model, dropout)
    fuse_kernels(model)
    model.config.use_cache = False
    setattr(model.config, DOCUMENT_START, model.config.eos_token_id)
    return model


def _check(model: PreTrainedModel) -> None:
    try:
        check_architecture(model)
    except (InputError, torch.OutOfMemoryError):
        raise
    # Whatever a family's own code stumbles over: settings that do not go together, or no decoder at all.
    except Exception as error:
        raise InputError(
            f"{model.config.model_type} cannot run as a decoder with these settings: {explain_error(error)}. Choose "
            "another model_type, or give all of its sizes in model_config"
        ) from error


def _from_config(config: PreTrainedConfig, backend: str | None) -> PreTrainedModel:
    name = implementation_of(config, backend or find_backend(config))
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32)
    except (ValueError, RuntimeError, ZeroDivisionError, KeyError) as error:
        raise InputError(
            f"no causal language model can be built from this config of {config.model_type}: {explain_error(error)}. "
            "Look at its sizes"
        ) from error


def _zero_output_projections(model: PreTrainedModel) -> None:
    projections = [
        module
        for name, module in model.base_model.named_modules()
        if name.rsplit(".", 1)[-1] in _OUTPUT_PROJECTIONS and isinstance(module, nn.Linear | Conv1D)
    ]
    if not projections:
        raise InputError(
            f"init zero-output: {model.config.model_type} has no known output projections; set init to transformers"
        )
    for projection in projections:
        nn.init.zeros_(projection.weight)


def build_shape(settings: dict[str, Any]) -> PreTrainedModel:
    """Builds a model as its config says on the current default device, unchecked: its shape on the meta device."""
    return _from_config(make_config(settings), None)


@lru_cache(maxsize=8)
def parameter_sizes(settings_json: str) -> tuple[tuple[int, bool], ...]:
    """Gives the number of values of each parameter, and whether it is a matrix inside the layers.

    `settings_json` are settings as JSON, so that the answer is remembered.
    """
    with torch.device("meta"):
        model = build_shape(json.loads(settings_json))
    matrices = {id(module.weight) for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)}
    return tuple((parameter.numel(), id(parameter) in matrices) for parameter in model.parameters())


def count_parameters(settings: dict[str, Any]) -> tuple[int, int]:
    """Counts parameters and, of them, those in matrix products per token (the head once, no input embedding).

    Costs no memory: the model is built on the meta device.
    """
    with torch.device("meta"):
        model = build_shape(settings)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    matrices = head.weight.numel() + sum(
        module.weight.numel() for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)
    )
    return total, matrices
