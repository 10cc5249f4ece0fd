"""What follows from the kind of training: which task and method are meant, and defaults that differ between them."""

from collections.abc import Mapping
from typing import Any

ADAPTER_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias")
# PEFT's names inside a section `lora: {…}`, and what they are called as flat keys.
_LORA_NAMES = {
    "r": "lora_r",
    "rank": "lora_r",
    "lora_alpha": "lora_alpha",
    "alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "bias": "lora_bias",
}
# What PEFT's own files hold beside them, and means what happens anyway.
_LORA_FORMALITIES = {
    "task_type": ("CAUSAL_LM",),
    "peft_type": ("LORA",),
    "inference_mode": (False,),
    "enabled": (True,),
}

# Fine-tuning moves a trained model a little: small rates, all of the data a few times.
_OF_EXISTING_MODELS: dict[str, Any] = {
    "optim": "adamw",
    "learning_rate": 2e-5,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "num_train_epochs": 3,
}
# Adapters start from zero and bear ten times the rate (arXiv 2106.09685, table 11: 2e-4 for GPT-2).
_ADAPTER_RATE = 2e-4


def derive(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Adds `task` and `method` where other settings say which are meant, and takes out the switches that do so."""
    derived = dict(values)
    four_bit, adapters = derived.pop("load_in_4bit", None), derived.pop("use_peft", None)
    given = derived.get("method")
    if four_bit and given == "full":
        problems.append("load_in_4bit is true, but method is full: weights in 4 bits cannot be trained; use qlora")
    elif four_bit:
        derived["method"] = "qlora"
    elif given is None and (adapters or (adapters is None and any(key in derived for key in ADAPTER_KEYS))):
        derived["method"] = "lora"
    if derived.get("model_name_or_path") is not None:
        derived.setdefault("task", "sft")
    return derived


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults below every layer of a recipe for the task and method of `values`."""
    if values.get("model_name_or_path") is None:
        return {}
    rate = _ADAPTER_RATE if values.get("method", "full") != "full" else _OF_EXISTING_MODELS["learning_rate"]
    return _OF_EXISTING_MODELS | {"learning_rate": rate}


def expand_lora(section: Any) -> dict[str, Any]:
    """Turns a section `lora: {r: 16, …}` into flat keys; `true` and an empty section ask for the defaults.

    Raises:
        ValueError: it is no section, or holds what onecard does not know.
    """
    if section is None or section is False:
        return {}
    if section is True or section == {}:
        return {"method": "lora"}
    if not isinstance(section, Mapping):
        raise ValueError("takes a mapping such as {r: 16, lora_alpha: 32}")
    unknown = [
        name
        for name, value in section.items()
        if name not in _LORA_NAMES and value not in _LORA_FORMALITIES.get(name, ())
    ]
    if unknown:
        raise ValueError(f"{', '.join(map(str, unknown))} cannot be set there: it takes {', '.join(_LORA_NAMES)}")
    return {_LORA_NAMES[name]: value for name, value in section.items() if name in _LORA_NAMES}
