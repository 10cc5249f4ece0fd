"""A trained model in use, and answers of one that chats: prompts in its template, ended by its stop tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecard.checkpoint import reading
from onecard.data import ChatTemplate, Turn
from onecard.errors import CheckpointError
from onecard.model.folder import load_model_folder
from onecard.model.generate import Sampling, complete_ids
from onecard.planner import kind_of
from onecard.run.find import find_model_folder


def dtype_of(device: str) -> torch.dtype:
    """The precision in which a model is used on a device: 16 bits on a GPU, as far as it can."""
    if kind_of(device) == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_for_use(path: Path, checkpoint: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the checkpoint (best, last, a step) of a run, or the model of a folder, onto a device.

    Raises:
        InputError: neither a model nor a run, no such checkpoint, or a damaged one.
    """
    try:
        model, tokenizer = _load(find_model_folder(path, checkpoint), device)
    except CheckpointError:
        # A run in training may have removed the checkpoint before it was marked as being read.
        model, tokenizer = _load(find_model_folder(path, checkpoint), device)
    return model.to(device), tokenizer


def _load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with reading(folder):
        return load_model_folder(folder, dtype_of(device))


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Answers each prompt as the only turn of a user, as one padded batch.

    Raises:
        DataError: the tokenizer has no chat template that can render a question.
    """
    template = ChatTemplate.of(tokenizer)
    encoded = [template.prompt([Turn("user", prompt)]) for prompt in prompts]
    completions = complete_ids(model, encoded, template.stop_ids, sampling)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
