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


def load_model_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for use, in `dtype`, with its tokenizer.

    Raises:
        CheckpointError: the folder holds no model that transformers can read, or one whose weights are not numbers.
    """
    model = _load(folder, dtype)
    if broken := next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None):
        raise CheckpointError(
            f"{folder}: the weights {broken} are not finite, so the model can write nothing: use an earlier checkpoint"
        )
    with _explained(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
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
def _explained(folder: Path, what: str) -> Iterator[None]:
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
