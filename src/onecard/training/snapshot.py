"""A training state to a checkpoint and back, bit for bit."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onecard.checkpoint import FORMAT_VERSION, Checkpoint, Parts
from onecard.errors import CheckpointError
from onecard.model.folder import load_adapter, load_masters, save_adapter_folder, save_model_folder
from onecard.training.host_copy import HostCopy
from onecard.training.sharded import Shards
from onecard.training.state import Progress, TrainState


def snapshot(
    state: TrainState,
    tokenizer: "PreTrainedTokenizerBase | TokenizerFiles",
    documents: dict[str, Any],
    copy: HostCopy | None = None,
    whole: dict[str, dict[str, Tensor]] | None = None,
) -> Parts:
    """Names the parts of a checkpoint: a Hugging Face folder (of the adapter alone where there is one) and the rest.

    `documents` are plain data of the caller that are kept beside the state. With `copy` all that training changes is
    copied to it, so that the parts may be written while training goes on; without, they are the state itself. `whole`
    are masters and moments that this process has in parts.
    """
    scale = {"value": state.loss_scale.value, "num_good_steps": state.loss_scale.num_good_steps}
    own = whole or {"masters": state.optimizer.masters, "optimizer": state.optimizer.state_tensors()}
    tensors = own | {"loss_scale": scale}
    if copy is not None:
        tensors = copy.take(tensors)
    masters, plan = tensors.pop("masters"), state.plan

    def write_files(folder: Path) -> None:
        if copy is not None:
            copy.wait()
        if plan.adapt is None:
            save_model_folder(state.model, masters, folder)
        else:
            save_adapter_folder(state.model, masters, folder, plan.model.base)
        tokenizer.save_pretrained(folder)

    return Parts(
        tensors=tensors,
        documents={"progress": asdict(state.progress), "plan": plan.model_dump(mode="json")} | documents,
        write_files=write_files,
    )


class TokenizerFiles:
    """The files of a tokenizer, made once: it does not change, and may be in use while a checkpoint is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with tempfile.TemporaryDirectory(prefix="onecard-") as folder:
            tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            self._files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def save_pretrained(self, folder: Path) -> None:
        """Writes the files into a folder."""
        for name, content in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def state_bytes(state: TrainState) -> int:
    """Bytes of all that training changes: what a copy of it takes on the host."""
    tensors = [*state.optimizer.masters.values(), *state.optimizer.state_tensors().values()]
    return sum(tensor.nbytes for tensor in tensors)


def _progress(checkpoint: Checkpoint) -> Progress:
    document = checkpoint.document("progress")
    try:
        if isinstance(document, dict) and checkpoint.format_version < FORMAT_VERSION:
            document = asdict(Progress()) | document  # which had fewer of them
        if not isinstance(document, dict) or document.keys() != asdict(Progress()).keys():
            raise ValueError("its keys are others")
        return TypeAdapter(Progress).validate_json(json.dumps(document), strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder}/progress.json does not say where the run stood ({str(error).splitlines()[0]}): "
            "delete this folder and resume from the checkpoint before it"
        ) from error


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Puts a freshly assembled state where the checkpoint stood; of one in parts, each rank its own.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    if isinstance(state.spread, Shards):
        state.spread.read(checkpoint.folder)
    else:
        _restore_whole(state, checkpoint)
    with torch.no_grad():
        scale = checkpoint.tensors("loss_scale")
        state.loss_scale.value.copy_(scale["value"])
        state.loss_scale.num_good_steps.copy_(scale["num_good_steps"])
    state.progress = _progress(checkpoint)


def _restore_whole(state: TrainState, checkpoint: Checkpoint) -> None:
    is_adapted = state.plan.adapt is not None
    masters = load_adapter(state.model, checkpoint.folder) if is_adapted else load_masters(checkpoint.folder)
    moments = checkpoint.tensors("optimizer")
    expected = {
        name: tensor.shape for name, tensor in {**state.optimizer.masters, **state.optimizer.state_tensors()}.items()
    }
    found = {name: tensor.shape for name, tensor in {**masters, **moments}.items()}
    if expected != found:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{checkpoint.folder} belongs to another model or optimizer: {len(names)} tensors differ, the first is "
            f"{names[0]}. Resume with the recipe and plan of its own run"
        )
    with torch.no_grad():
        state.optimizer.load_masters(masters)
        state.optimizer.load_state_tensors(moments)
