"""Hugging Face model folders: what every other tool opens."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from onecard.errors import CheckpointError, InputError
from onecard.model.explain import explained
from onecard.model.families import CHOOSE_CAUSAL, find_foreign_kind
from onecard.model.hub import find_base, find_cached
from onecard.model.weight_files import COMPUTED, find_weight_files, fingerprint, read_headers, refuse_integers
from onecard.spec import BasePlan

# Of wrong weights, how many are named.
_NUM_NAMES = 3


def save_model_folder(
    model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Saves a model with `masters` (fp32, by parameter name) in place of its 16-bit parameters, or all in `dtype`."""
    weights = {name: masters.get(name, tensor) for name, tensor in model.state_dict().items()}
    if dtype is not None:
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    own_names = dict(model.named_parameters())
    for name in model.all_tied_weights_keys:
        # A tied weight is saved once, under the name of the parameter it shares.
        if name not in own_names:
            weights.pop(name, None)
    with _without_progress_bars():
        model.save_pretrained(folder, state_dict={name: tensor.detach() for name, tensor in weights.items()})
    config = copy.deepcopy(model.config)
    config.dtype = dtype or torch.float32
    config.use_cache = True
    config.save_pretrained(folder)


def load_masters(folder: Path) -> dict[str, Tensor]:
    """Loads the weights of a model folder in fp32, by parameter name."""
    model = load_plain(folder, torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_adapter_folder(
    model: PreTrainedModel, masters: Mapping[str, Tensor], folder: Path, base: BasePlan | None = None
) -> None:
    """Saves the adapter of a model in PEFT's format, with `masters` (fp32, by parameter name) for its parameters.

    `base` is the model it belongs to, which a note beside the adapter tells from others of its shape. What ends its
    answers stands in a generation_config.json, which PEFT does not read by itself.
    """
    from onecard.model import lora  # PEFT takes a second to import, which runs without adapters need not wait for

    lora.save(model, masters, folder, base.fingerprint if base else None)
    own = model.generation_config
    if own is not None and own.eos_token_id is not None:
        # The ids alone: settings of the base for sampling stay with the base.
        ends = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Loads the adapter of a folder in fp32, by the parameter names of an adapted model.

    Raises:
        CheckpointError: the folder holds no adapter, or a damaged one.
    """
    from onecard.model import lora

    with explained(folder, "adapter"):
        return lora.load(model, folder)


def load_model_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for use, in `dtype`, with its tokenizer; an adapter is merged into the model it belongs to.

    Raises:
        CheckpointError: the folder holds no model that transformers can read, or one whose weights are not numbers.
    """
    model = _load_adapted(folder, dtype) if is_adapter(folder) else load_plain(folder, dtype)
    refuse_broken(model, folder, "use an earlier checkpoint")
    return model.eval(), load_tokenizer(folder)


def load_as_trained(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model as it was trained, in fp32, with its tokenizer: an adapter stands beside its layers, not in them.

    Raises:
        CheckpointError: as `load_model_folder`.
    """
    if not is_adapter(folder):
        return load_model_folder(folder, torch.float32)
    model = _attach(folder)
    refuse_broken(model, folder, "use an earlier checkpoint")
    return model.eval(), load_tokenizer(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, which needs a model beside it."""
    return (folder / "adapter_config.json").is_file()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    with explained(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
            raise ValueError("there are no tokens in it, its tokenizer.json is missing")
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_base(folder: Path) -> PreTrainedModel:
    """Loads the model that the adapter in a folder belongs to, in fp32, rounded to 4 bits where that was trained so.

    Raises:
        CheckpointError: it is not named, not there, or has changed since.
    """
    from onecard.model import lora

    with explained(folder, "adapter"):
        base = lora.find_base(folder)
    if base is None:
        raise CheckpointError(
            f"{folder} holds an adapter that does not say which model it belongs to: write the model's folder or name "
            "into base_model_name_or_path of its adapter_config.json"
        )
    model = load_plain(_find_same_base(folder, base), torch.float32)
    with explained(folder, "adapter"):
        lora.round_base(model, folder)
    return model


def _load_adapted(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from onecard.model import lora

    model = _attach(folder)
    with explained(folder, "adapter"):
        lora.merge(model)
    for parameter in model.parameters():  # and no buffer: rotary frequencies would lose their precision
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _attach(folder: Path) -> PreTrainedModel:
    from onecard.model import lora

    model = load_base(folder)
    with explained(folder, "adapter"):
        unplaced = lora.attach(model, folder)
    if unplaced:
        raise CheckpointError(
            f"{folder}: its adapter is not one of {lora.find_base(folder)}: {len(unplaced)} parts differ, the first is "
            f"{unplaced[0]}. Use the model it was trained on"
        )
    return model


def _find_same_base(folder: Path, base: str) -> Path:
    """Finds the model that an adapter belongs to, and refuses another one of its name."""
    from onecard.model import lora

    with explained(folder, "adapter"):
        expected = lora.read_note(folder).get("base_fingerprint")
    found = find_cached(base)
    try:
        if found is None or expected not in (None, fingerprint(found)):
            found = find_base(base)
    except InputError as error:
        raise CheckpointError(
            f"{folder} holds an adapter of {base}, which cannot be used: {error}. Put that model back, or write its "
            "folder into base_model_name_or_path of adapter_config.json"
        ) from error
    if expected not in (None, fingerprint(found)):
        raise CheckpointError(
            f"{folder} holds an adapter for other weights than those in {found}: {base} has changed since it was "
            "trained. Use the weights it was trained on, or write their folder into base_model_name_or_path of its "
            "adapter_config.json"
        )
    return found


def load_plain(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Loads a causal language model as transformers does, with its further options, and refuses what it would bear.

    Stored in `dtype`, weights stay in their file until they are read.

    Raises:
        CheckpointError: no model, or weights that are missing, too many or of other shapes than the config says.
    """
    refuse_integers(read_headers([file for file in find_weight_files(folder) if file.suffix == ".safetensors"]))
    with explained(folder, "model"):
        settings = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    # A file of something else is explained where transformers stumbles over it.
    if isinstance(settings, dict) and (problem := find_foreign_kind(settings)):
        raise CheckpointError(f"{folder}: {problem}. {CHOOSE_CAUSAL}")
    with explained(folder, "model"), _without_progress_bars(), _without_load_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            weights_only=True,
            # Not left out: transformers would then ask, and a line of standard input would answer.
            trust_remote_code=False,
            **options,
        )
    # transformers would go on with random numbers in their place.
    problems = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(entry[0] for entry in info["mismatched_keys"]),
        "not of this model": sorted(name for name in info["unexpected_keys"] if not name.endswith(COMPUTED)),
    }
    found = [f"{len(names)} are {what} ({_first(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{folder}: its weights are not those of the {model.config.model_type} that config.json describes: "
            f"{'; '.join(found)}. Use files that belong together"
        )
    return cast(PreTrainedModel, model)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMES]) + (", ..." if len(names) > _NUM_NAMES else "")


def refuse_broken(model: PreTrainedModel, folder: Path, remedy: str) -> None:
    """Refuses weights that are not numbers.

    Raises:
        CheckpointError: some are not finite.
    """
    if broken := next((name for name, p in model.named_parameters() if not is_finite(p)), None):
        raise CheckpointError(
            f"{folder}: the weights {broken} are not finite, so the model can write nothing: {remedy}"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are numbers, found without memory of its size."""
    # Extremes are NaN where anything is, and found 20 times as fast as a verdict on each value.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from printing a table, in colour, of what `load_plain` says in a sentence."""
    logger = logging.get_logger("transformers.modeling_utils")
    logger.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_load_report)


def _is_no_load_report(record: LogRecord) -> bool:
    # transformers has no switch for it, and other warnings of that logger are to be heard.
    return " LOAD REPORT" not in record.getMessage()


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
