"""Other weights for a model that is there already: what evaluating a hundred checkpoints would wait for otherwise."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from onecard.model.folder import refuse_broken
from onecard.model.weight_files import find_weight_files, read_headers


@torch.no_grad()
def load_in_place(model: PreTrainedModel, folder: Path) -> bool:
    """Copies the weights of a model folder into `model`, in its own precision, and says whether they are its own.

    Where a name or a shape differs nothing is changed and the answer is no: load the folder as a model then, which
    also tells what is wrong with it.

    Raises:
        CheckpointError: damaged files, or weights that are not numbers.
    """
    if (folder / "adapter_config.json").is_file():
        return False
    files = find_weight_files(folder)
    if any(file.suffix != ".safetensors" for file in files):
        return False
    stored = read_headers(files)
    own = dict(model.named_parameters(remove_duplicate=False))
    places = {tensor.name: own[tensor.name] for tensor in stored if tensor.name in own}
    # A tied weight is stored under one of its names.
    is_whole = {id(parameter) for parameter in own.values()} == {id(parameter) for parameter in places.values()}
    if len(places) != len(stored) or not is_whole:
        return False
    if any(tuple(places[tensor.name].shape) != tensor.shape for tensor in stored):
        return False
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                places[name].copy_(weights.get_tensor(name))
    refuse_broken(model, folder, "use an earlier checkpoint")
    return True
