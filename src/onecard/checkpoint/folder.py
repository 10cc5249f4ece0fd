"""Named parts to a folder and back: whole or absent, hashed, versioned. Knows nothing of training.

checkpoints/
  step-000500/            complete: renamed into place after everything in it reached the disk
    manifest.json         format version; size and SHA-256 of every other file
    <name>.safetensors    tensors
    <name>.json           plain data
    ...                   whatever the caller writes itself (a Hugging Face model folder)
  .step-001000.partial/   being written, or left by a process that died: never read, removed at the next start
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    describe_files,
    find_damage,
    read_manifest,
    write_manifest,
)
from onecard.checkpoint.moving import discard, force_names_to_disk, force_to_disk
from onecard.errors import CheckpointError
from onecard.spec.moving import move
from onecard.units import MIB, format_bytes

_PARTIAL = ".partial"
_OLD = f".old{_PARTIAL}"
_STEP = "step-"
# No space, a quota, a limit on the size of files.
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
# Settings, tokenizer and manifest of a checkpoint: up to 20 MB where the vocabulary is large.
SMALL_FILES_BYTES = 32 * MIB


@dataclass(frozen=True)
class Parts:
    """What goes into a checkpoint. `write_files` gets the empty folder first and puts its own files there."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    documents: Mapping[str, Any]
    write_files: Callable[[Path], None]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors; what `write_files` puts there comes on top."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    num_tensor_bytes: int
    format_version: int = FORMAT_VERSION

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of a part, on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")

    def document(self, name: str) -> Any:
        """Plain data of a part."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


def folder_of_step(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"{_STEP}{step:06d}"


def step_of_folder(folder: Path) -> int:
    """The step a checkpoint folder is named after."""
    return int(folder.name.removeprefix(_STEP))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a checkpoint; says nothing about damage."""
    return (folder / MANIFEST).is_file()


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest step first; says nothing about damage."""
    found = [
        path
        for path in root.glob(f"{_STEP}*")
        if _is_number(path.name.removeprefix(_STEP)) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of_folder)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def remove_leftovers(root: Path) -> None:
    """Removes what a process that died while writing has left; what it had moved out of the way is moved back."""
    for path in root.glob(f".{_STEP}*{_OLD}"):
        place = root / path.name.removeprefix(".").removesuffix(_OLD)
        if not place.exists() and (path / MANIFEST).is_file():
            move(path, place)
    for path in root.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(folder: Path, parts: Parts, num_own_bytes: int = 0) -> int:
    """Writes a checkpoint beside its place, forces it to the disk and renames it; returns the bytes of its tensors.

    An existing folder of that name is replaced. `num_own_bytes` is what `write_files` will need, for a look at the disk
    before anything is written.

    Raises:
        CheckpointError: the disk is full or refuses; nothing but the existing checkpoints is left.
    """
    partial = folder.parent / f".{folder.name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _check_space(partial, parts.num_bytes + num_own_bytes + SMALL_FILES_BYTES)
        parts.write_files(partial)
        for name, tensors in parts.tensors.items():
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors"
            )
        for name, document in parts.documents.items():
            _write_json(partial / f"{name}.json", document)
        manifest = describe_files(partial)
        write_manifest(partial, manifest)
        force_to_disk(partial)
        _replace_folder(partial, folder)
        force_names_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _write_failure(folder, error) from error
    except Exception:  # memory that runs out: the space is wanted until the next start, too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest.num_tensor_bytes


def _check_space(folder: Path, num_bytes: int) -> None:
    # So that a disk is not filled to the brim, at which other programs fail, too.
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, f"{format_bytes(num_bytes)} are needed")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint, of this or an earlier format, after checking every file of it against the manifest.

    Raises:
        CheckpointError: no checkpoint, a later format version, or damaged files (each is named).
    """
    manifest = read_manifest(folder)
    if problems := find_damage(folder, manifest):
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(problems)}. Use another checkpoint of the run; `onecard resume` of the "
            "run sets this one aside and goes on from the one before it"
        )
    return Checkpoint(folder, manifest.num_tensor_bytes, manifest.format_version)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def _replace_folder(partial: Path, folder: Path) -> None:
    # A folder cannot be replaced in one motion; the old one waits under a name that the next start removes.
    old = folder.parent / f".{folder.name}{_OLD}"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        move(folder, old)
    move(partial, folder)
    discard(old)


def _write_failure(folder: Path, error: Exception) -> CheckpointError:
    try:
        free = shutil.disk_usage(folder.parent).free
    except OSError:  # a share that is gone
        free = 0
    is_full = (isinstance(error, OSError) and error.errno in _FULL) or "No space left" in str(error)
    if is_full:
        return CheckpointError(
            f"no space left for checkpoint {folder} ({format_bytes(free)} free): free some space, lower "
            "save_total_limit or move the run folder, then resume; earlier checkpoints are untouched"
        )
    return CheckpointError(f"checkpoint {folder} cannot be written: {error}. Earlier checkpoints are untouched")
