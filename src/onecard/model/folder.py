"""Hugging Face model folders: what every other tool opens."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from onecard.errors import CheckpointError


def save_model_folder(model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path) -> None:
    """Saves a model with `masters` (fp32, by parameter name) in place of its 16-bit parameters."""
    weights = {name: masters.get(name, tensor) for name, tensor in model.state_dict().items()}
    own_names = dict(model.named_parameters())
    for name in model.all_tied_weights_keys:
        # A tied weight is saved once, under the name of the parameter it shares.
        if name not in own_names:
            weights.pop(name, None)
    with _without_progress_bars():
        model.save_pretrained(folder, state_dict={name: tensor.detach() for name, tensor in weights.items()})
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    config.use_cache = True
    config.save_pretrained(folder)


def load_masters(folder: Path) -> dict[str, Tensor]:
    """Loads the weights of a model folder in fp32, by parameter name."""
    model = _load(folder, torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_adapter_folder(model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path) -> None:
    """Saves the adapter of a model in PEFT's format, with `masters` (fp32, by parameter name) for its parameters."""
    from onecard.model import lora  # PEFT takes a second to import, which runs without adapters need not wait for

    lora.save(model, masters, folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Loads the adapter of a folder in fp32, by the parameter names of an adapted model.

    Raises:
        CheckpointError: the folder holds no adapter, or a damaged one.
    """
    from onecard.model import lora

    with _explained(folder, "adapter"):
        return lora.load(model, folder)


def load_model_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for use, in `dtype`, with its tokenizer; an adapter is merged into the model it belongs to.

    Raises:
        CheckpointError: the folder holds no model that transformers can read, or one whose weights are not numbers.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    model = _load_adapted(folder, dtype) if is_adapter else _load(folder, dtype)
    if broken := next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None):
        raise CheckpointError(
            f"{folder}: the weights {broken} are not finite, so the model can write nothing: use an earlier checkpoint"
        )
    with _explained(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def _load_adapted(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from onecard.model import lora

    with _explained(folder, "adapter"):
        base = lora.find_base(folder)
    if base is None:
        raise CheckpointError(
            f"{folder} holds an adapter that does not say which model it belongs to: write the model's folder or name "
            "into base_model_name_or_path of its adapter_config.json"
        )
    model = _load(Path(base) if Path(base).is_dir() else base, torch.float32)
    with _explained(folder, "adapter"):
        unplaced = lora.apply(model, folder)
    if unplaced:
        raise CheckpointError(
            f"{folder}: its adapter is not one of {base}: {len(unplaced)} parts differ, the first is {unplaced[0]}. "
            "Use the model it was trained on"
        )
    for parameter in model.parameters():  # and no buffer: rotary frequencies would lose their precision
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _load(folder: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    with _explained(folder, "model"), _without_progress_bars():
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    # transformers would go on with random numbers in their place.
    if missing := sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]):
        raise CheckpointError(
            f"{folder}: its weights are not those of the {model.config.model_type} that config.json describes; "
            f"{len(missing)} are missing or of another shape, the first is {missing[0]}. Use files that belong together"
        )
    return cast(PreTrainedModel, model)


@contextmanager
def _explained(folder: Path | str, what: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    # A damaged file makes transformers raise whatever its reading code stumbles over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} holds no {what} that transformers can read: {reason}") from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars out of ours."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
