"""LoRA (arXiv 2106.09685) through PEFT: injection into a model, merging, and PEFT's folder format.

Adapters are injected into the model, which stays a `PreTrainedModel`; plain PEFT wraps one instead and puts a prefix
before every name in its files.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onecard.model.new_tokens import GrownEmbedding, GrownHead, place_tokens, settle
from onecard.model.nf4 import NF4Linear, find_linears
from onecard.spec import AdaptPlan

WEIGHTS, NOTE = "adapter_model.safetensors", "frozen_weights.json"
_NAME = "default"
_PREFIX = "base_model.model."
_ROWS_IN_FILE = ".token_adapter.trainable_tokens_delta"


class Adapter(LoraLinear):
    """An adapter beside a linear layer of any kind: PEFT's module, whose last product adds to the layer's output.

    PEFT scales that product and adds it in steps of their own, forward and backward.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, **settings)
        self.fan_in_fan_out = is_stored_in_out(base_layer)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if isinstance(module, NF4Linear):
            return module.in_features, module.out_features
        features: tuple[int, int] = super()._get_in_out_features(module)
        return features

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or keywords or self.active_adapters != [_NAME]:
            out: Tensor = super().forward(x, *args, **keywords)
            return out
        base = self.base_layer(x)
        low = self.lora_A[_NAME](self.lora_dropout[_NAME](x))
        up = self.lora_B[_NAME]
        out = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.weight.T, alpha=self.scaling[_NAME])
        return out.view(base.shape)


def inject(model: PreTrainedModel, plan: AdaptPlan, targets: Mapping[str, nn.Module], seed: int) -> None:
    """Puts an adapter beside each target and leaves nothing else trainable, except biases where the plan says so.

    Adapters start in fp32 on the current default device, as zero; their other half depends on `seed` alone.
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
    config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D, NF4Linear), Adapter))
    # Adapters come into being below, not in PEFT, which converts them by swapping tensors: fake ones refuse that.
    with unset_fake_temporarily(), without_bitsandbytes():
        inject_adapter_in_model(config, model, _NAME, low_cpu_mem_usage=True)
    model.peft_config = {_NAME: config}
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for half in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
                half.weight = nn.Parameter(torch.empty(half.weight.shape))
            layer.reset_lora_parameters(_NAME, init_lora_weights=True)


def without_bitsandbytes() -> AbstractContextManager[Any]:
    """Lets PEFT take bitsandbytes for absent: no layer here is one of its own, and a broken one would end LoRA."""
    return mock.patch.multiple(
        "peft.tuners.lora.model", is_bnb_available=lambda: False, is_bnb_4bit_available=lambda: False
    )


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
    """Adds each adapter to its weight, so that the model is a plain one again; 4-bit weights become whole, in fp32."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            if isinstance(layer.base_layer, NF4Linear):
                layer.base_layer = layer.base_layer.to_linear()
            cast(Any, layer).merge()
            model.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, NF4Linear) and not name.endswith(".base_layer"):
            model.set_submodule(name, layer.to_linear())
    settle(model)
    del model.peft_config


def save(
    model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path, base_fingerprint: str | None = None
) -> None:
    """Saves what was trained, in fp32 from `masters` (by parameter name), as plain PEFT reads it.

    A note beside it says what PEFT's files do not tell: whose weights the adapter belongs to, and whether they were
    rounded to 4 bits.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = {_name_in_file(name): masters.get(name, tensor).detach().float() for name, tensor in trained.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config: Any = copy.copy(cast(Any, model).peft_config[_NAME])
    config.inference_mode = True  # what PEFT's own files say
    config._custom_modules = None
    config.target_modules = sorted(config.target_modules)
    config.trainable_token_indices = _moving_tokens(model)
    config.save_pretrained(folder)
    nf4 = next((module for module in model.modules() if isinstance(module, NF4Linear)), None)
    note: dict[str, Any] = {"frozen_weights": "nf4" if nf4 else "as stored", "base_fingerprint": base_fingerprint}
    if nf4 is not None:
        note["double_quant"] = nf4.double_quant
    (folder / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def _moving_tokens(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """The tokens that learn by the name of each matrix that has rows of its own for them, as PEFT's config has it."""
    grown = {name: m for name, m in model.named_modules() if isinstance(m, GrownEmbedding | GrownHead)}
    own = {id(module.rows): (name, module) for name, module in reversed(grown.items())}
    return {name.rsplit(".", 1)[-1]: list(module.tokens) for name, module in reversed(own.values())} or None


def read_note(folder: Path) -> dict[str, Any]:
    """What is known of the frozen weights that the adapter in a folder belongs to; empty for another tool's adapter."""
    path = folder / NOTE
    note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(note, dict):
        raise ValueError(f"{NOTE} is no JSON object")
    return note


def load(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Loads what `save` saved, on the CPU, by the parameter names of an adapted model; others keep their own."""
    names = {_name_in_file(name): name for name, p in model.named_parameters() if p.requires_grad}
    return {names.get(name, name): tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}


def find_base(folder: Path) -> str | None:
    """The model that the adapter in a folder belongs to: a folder or a name on the Hub."""
    base = LoraConfig.from_pretrained(folder).base_model_name_or_path
    if not isinstance(base, str | None):
        raise ValueError(f"its base_model_name_or_path is {base!r}")
    return base


def round_base(model: PreTrainedModel, folder: Path) -> None:
    """Rounds the linear layers of a plain model as those were that the adapter in a folder was trained beside."""
    note = read_note(folder)
    if note.get("frozen_weights") == "nf4":
        for name, module in find_linears(model).items():
            rounded = NF4Linear.from_linear(module, double_quant=note["double_quant"])
            model.set_submodule(name, rounded.to_linear(module.weight.dtype))


def attach(model: PreTrainedModel, folder: Path) -> list[str]:
    """Puts the adapter of a folder beside the layers of its model; returns the names that found no place."""
    config = LoraConfig.from_pretrained(folder)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    if config.trainable_token_indices:
        of_rows = [name for name in tensors if name.endswith(_ROWS_IN_FILE)]
        rows = {name.removesuffix(_ROWS_IN_FILE): tensors.pop(name) for name in of_rows}
        place_tokens(model, config.trainable_token_indices, rows)
        config.trainable_token_indices = None
    with without_bitsandbytes():
        inject_adapter_in_model(config, model, _NAME)
    model.peft_config = {_NAME: config}
    outcome = set_peft_model_state_dict(model, tensors, _NAME)
    return [*outcome.unexpected_keys, *(name for name in outcome.missing_keys if ".lora_" in name)]


def _name_in_file(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".").replace(".rows", _ROWS_IN_FILE)
