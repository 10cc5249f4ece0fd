"""LoRA (arXiv 2106.09685) through PEFT: injection into a model, merging, and PEFT's folder format.

Adapters are injected into the model, which stays a `PreTrainedModel`; plain PEFT wraps one instead and puts a prefix
before every name in its files.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.errors import CheckpointError
from onecard.model.nf4 import NF4Linear
from onecard.spec import AdaptPlan

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
_PREFIX = "base_model.model."


class NF4LoraLinear(LoraLinear):
    """An adapter beside a weight in 4 bits."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer = cast(NF4Linear, module)
        return layer.in_features, layer.out_features


def inject(model: PreTrainedModel, plan: AdaptPlan, targets: Mapping[str, nn.Module], seed: int) -> None:
    """Puts an adapter beside each target and leaves nothing else trainable, except biases where the plan says so.

    An adapter starts as zero, in the type of its layer or fp32; its other half depends on `seed` alone.
    """
    config = LoraConfig(
        r=plan.r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=_short_names(model, targets),
        bias=plan.bias,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model.config.name_or_path or None,
        fan_in_fan_out=any(is_stored_in_out(module) for module in targets.values()),
    )
    config._register_custom_module({NF4Linear: NF4LoraLinear})
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, _NAME)
    model.peft_config = {_NAME: config}


def is_stored_in_out(module: nn.Module) -> bool:
    """Whether a layer's weight is stored [in, out], as GPT-2's are."""
    return isinstance(module, Conv1D) or (isinstance(module, NF4Linear) and module.is_transposed)


def _short_names(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> list[str]:
    """Last parts of the targets' names where they mean the targets and nothing else, else whole names."""
    short = {name.rsplit(".", 1)[-1] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short}
    return sorted(short if meant == set(targets) else targets)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Adds each adapter to its weight, so that the model is a plain one again; 4-bit weights become whole."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            plain = base.to_linear() if isinstance(base, NF4Linear) else base
            if _NAME in layer.lora_A:
                plain.weight += layer.get_delta_weight(_NAME).to(plain.weight.dtype)
            model.set_submodule(name, plain)
        elif isinstance(layer, NF4Linear) and not name.endswith(".base_layer"):
            model.set_submodule(name, layer.to_linear())
    del model.peft_config


def save_adapter_folder(model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path) -> None:
    """Saves what was trained, in fp32 from `masters` (by parameter name), as plain PEFT reads it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = {_name_in_file(name): masters.get(name, tensor).detach().float() for name, tensor in trained.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config: Any = copy.copy(cast(Any, model).peft_config[_NAME])
    config.inference_mode = True  # what PEFT's own files say
    config._custom_modules = None
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)


def load_adapter_masters(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Loads what `save_adapter_folder` saved, by the parameter names of an adapted model.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no adapter that can be read: {error}") from error
    names = {_name_in_file(name): name for name, p in model.named_parameters() if p.requires_grad}
    return {names.get(name, name): tensor.float() for name, tensor in tensors.items()}


def _name_in_file(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".")
