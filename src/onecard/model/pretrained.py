"""Existing models as the start of training: their config, their weights, rows for new tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from onecard.errors import CheckpointError, InputError
from onecard.model.build import build_hollow, build_model, finish
from onecard.model.dropout import set_config_dropout
from onecard.model.explain import explain_error
from onecard.model.families import CHOOSE_CAUSAL, find_foreign_kind, implementation_of, keep_weights, refuse_family
from onecard.model.folder import load_plain, refuse_broken
from onecard.model.new_tokens import add_tokens
from onecard.model.weight_files import find_weight_files, fingerprint, is_16_bit
from onecard.spec import BasePlan, ModelPlan

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, None: torch.float32}
_TYPES_BY_CLASS = {name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the config of a model folder as it stands there, with `model_type` where an old one leaves it out.

    Raises:
        CheckpointError: no config, or a damaged one.
        InputError: it describes no causal language model of transformers whose weights can be trained.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is no model folder: its config.json cannot be read ({error}). Copy or download it again"
        ) from error
    classes = settings.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{folder}: architectures in its config.json is {classes!r}, no list of names: mend it")
    if "model_type" not in settings and (known := [name for name in classes if name in _TYPES_BY_CLASS]):
        settings["model_type"] = _TYPES_BY_CLASS[known[0]]
    if problem := _find_problem(settings, classes):
        raise InputError(f"{folder}: {problem}. {CHOOSE_CAUSAL}")
    return settings


def _find_problem(settings: dict[str, Any], classes: list[str]) -> str | None:
    if settings.get("model_type") is None:
        return "its config.json names neither a model_type nor a known architecture"
    if problem := find_foreign_kind(settings):
        return problem
    if classes and not any(name in _TYPES_BY_CLASS for name in classes):
        return f"it holds a {', '.join(classes)}, which is no causal language model"
    if "quantization_config" in settings:
        return "its weights are quantized already, so they cannot be trained; method qlora quantizes whole ones itself"
    return None


def check_weights(folder: Path) -> None:
    """Refuses a model folder whose weights are not those of its config, before time is spent on text for it.

    Opens the files without reading the weights: 0.3 s for 135 million parameters in safetensors.

    Raises:
        CheckpointError: weights that are missing, damaged, too many, integers, or of other shapes than the config says.
        InputError: it describes no causal language model of transformers whose weights can be trained.
    """
    config = make_pretrained_config(read_settings(folder), 0.0, str(folder))
    load_plain(folder, _DTYPES[is_16_bit(find_weight_files(folder))], config=config)


def make_pretrained_config(settings: dict[str, Any], dropout: float, name: str) -> PreTrainedConfig:
    """Makes the config that the settings of the model `name` describe, with one dropout everywhere.

    Raises:
        InputError: the settings contradict each other.
    """
    try:
        config = type(AutoConfig.for_model(settings["model_type"])).from_dict(dict(settings))
    except Exception as error:  # each family's config class has errors of its own
        raise InputError(
            f"{name}: its config.json of a {settings['model_type']} cannot be used: {explain_error(error)}. Copy or "
            "download it again"
        ) from error
    refuse_family(config)
    keep_weights(config)
    set_config_dropout(config, dropout)
    return config


def load_pretrained(plan: ModelPlan, *, seed: int, backend: str = "sdpa", with_weights: bool = True) -> PreTrainedModel:
    """Loads a plan's base in the type of its files, ready to train, with rows for new tokens.

    Weights stored in 16 bits stay in their file until they are read, so that whoever takes them over one by one never
    holds two copies. Without weights a model of the same shape is built with others, which a trace does not tell.

    Raises:
        CheckpointError: weights that are missing, damaged, broken or other ones than the plan was made for.
        InputError: the plan was made without weights, or the architecture cannot be trained.
    """
    assert plan.base is not None
    if not with_weights:
        model = build_model(plan.settings, dropout=plan.dropout, init="transformers", seed=seed, backend=backend)
        model.config.name_or_path = _name_for_others(plan.base)
        return model
    folder = _find_planned_weights(plan.base)
    config = make_pretrained_config(read_settings(folder), plan.dropout, str(folder))
    model = _load(folder, config, implementation_of(config, backend))
    refuse_broken(model, folder, "it cannot be trained on; use another copy of it")
    torch.manual_seed(seed)
    _check_vocabulary(model, plan)
    add_tokens(model, plan.base.num_new_tokens)
    model.config.name_or_path = _name_for_others(plan.base)
    return finish(model, plan.dropout)


def make_hollow(plan: ModelPlan, *, backend: str) -> PreTrainedModel:
    """Makes the model that `load_pretrained` gives without its weights: parameters are on the meta device.

    Raises:
        CheckpointError, InputError: as `load_pretrained`.
    """
    assert plan.base is not None
    folder = _find_planned_weights(plan.base)
    model = build_hollow(make_pretrained_config(read_settings(folder), plan.dropout, str(folder)), backend)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _check_vocabulary(model, plan)
    add_tokens(model, plan.base.num_new_tokens)
    model.config.name_or_path = _name_for_others(plan.base)
    return finish(model, plan.dropout)


def _find_planned_weights(base: BasePlan) -> Path:
    if base.folder is None or base.fingerprint is None:
        raise InputError(
            f"{base.name}: this plan was made without its weights: download them first, then plan and train again"
        )
    folder = Path(base.folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{base.name}: {folder}, where it lay when the run was planned, is gone: put it back, or start a new run"
        )
    if fingerprint(folder) != base.fingerprint:
        raise CheckpointError(
            f"{base.name}: the weights in {folder} are not those that this run was planned with: restore them, or "
            "start a new run"
        )
    return folder


def _load(folder: Path, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    dtype = _DTYPES[is_16_bit(find_weight_files(folder))]
    model = load_plain(folder, dtype, config=config, attn_implementation=attention)
    if any(buffer.dtype in (torch.bfloat16, torch.float16) for buffer in model.buffers()):
        # Made beside weights in 16 bits, a buffer has lost digits that training in fp32 would have had.
        model = load_plain(folder, torch.float32, config=config, attn_implementation=attention)
    return model


def _check_vocabulary(model: PreTrainedModel, plan: ModelPlan) -> None:
    assert plan.base is not None
    own, planned = model.get_input_embeddings().weight.shape[0], plan.settings["vocab_size"]
    if own + plan.base.num_new_tokens != planned:
        raise CheckpointError(
            f"{plan.base.name}: it has {own} tokens, and had {planned - plan.base.num_new_tokens} when the run was "
            "planned: plan it again"
        )


def _name_for_others(base: BasePlan) -> str:
    """What other tools can open: PEFT knows folders and names of the Hugging Face Hub."""
    return base.folder if base.folder is not None and ":" in base.name else base.name
