"""Named parts (tensors, JSON) to a folder and back: atomic, hashed, versioned."""

from onecard.checkpoint.folder import (
    SMALL_FILES_BYTES,
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
from onecard.checkpoint.manifest import FORMAT_VERSION
from onecard.checkpoint.moving import discard
from onecard.checkpoint.reading import is_being_read, reading
from onecard.spec.moving import move

__all__ = [
    "FORMAT_VERSION",
    "SMALL_FILES_BYTES",
    "Checkpoint",
    "Parts",
    "discard",
    "folder_of_step",
    "is_being_read",
    "is_checkpoint",
    "list_checkpoints",
    "move",
    "read_checkpoint",
    "reading",
    "remove_leftovers",
    "step_of_folder",
    "write_checkpoint",
]
