"""A training state to a checkpoint and back, bit for bit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from onecard.checkpoint import Checkpoint, Parts
from onecard.errors import CheckpointError
from onecard.model.folder import load_adapter, load_masters, save_adapter_folder, save_model_folder
from onecard.training.state import Progress, TrainState

# Fields that checkpoints of earlier versions lack; what they are by default is how things stood then.
_ADDED = {"rate_factor", "num_retreats", "retreat_step", "failed_step"}


def snapshot(state: TrainState, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> Parts:
    """Names the parts of a checkpoint: a Hugging Face folder (of the adapter alone where there is one) and the rest.

    `record` is plain data of the caller that is kept beside the state.
    """

    def write_files(folder: Path) -> None:
        if state.plan.adapt is None:
            save_model_folder(state.model, state.optimizer.masters, folder)
        else:
            save_adapter_folder(state.model, state.optimizer.masters, folder, state.plan.model.base)
        tokenizer.save_pretrained(folder)

    scale = {"value": state.loss_scale.value, "num_good_steps": state.loss_scale.num_good_steps}
    return Parts(
        tensors={"optimizer": state.optimizer.state_tensors(), "loss_scale": scale},
        documents={"progress": asdict(state.progress), "plan": state.plan.model_dump(mode="json"), "record": record},
        write_files=write_files,
    )


def _progress(checkpoint: Checkpoint) -> Progress:
    document = checkpoint.document("progress")
    try:
        known = asdict(Progress()).keys()
        if not isinstance(document, dict) or not known - _ADDED <= document.keys() <= known:
            raise ValueError("its keys are others")
        return TypeAdapter(Progress).validate_json(json.dumps(document), strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder}/progress.json does not say where the run stood ({str(error).splitlines()[0]}): "
            "delete this folder and resume from the checkpoint before it"
        ) from error


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Puts a freshly assembled state where the checkpoint stood.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
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
        scale = checkpoint.tensors("loss_scale")
        state.loss_scale.value.copy_(scale["value"])
        state.loss_scale.num_good_steps.copy_(scale["num_good_steps"])
    state.progress = _progress(checkpoint)
