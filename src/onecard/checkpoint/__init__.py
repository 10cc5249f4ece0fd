"""Named parts (tensors, JSON) to a folder and back: atomic, hashed, versioned."""

from onecard.checkpoint.folder import (
    Checkpoint,
    Parts,
    folder_of_step,
    is_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_leftovers,
    step_of_folder,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "Parts",
    "folder_of_step",
    "is_checkpoint",
    "list_checkpoints",
    "read_checkpoint",
    "remove_leftovers",
    "step_of_folder",
    "write_checkpoint",
]
