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
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.errors import CheckpointError
from onecard.units import format_bytes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_STEP = "step-"


@dataclass(frozen=True)
class Parts:
    """What goes into a checkpoint. `write_files` gets the empty folder first and puts its own files there."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    documents: Mapping[str, Any]
    write_files: Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    num_tensor_bytes: int

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
    """Removes what a process that died while writing has left."""
    for path in root.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(folder: Path, parts: Parts) -> int:
    """Writes a checkpoint beside its place, forces it to the disk and renames it; returns the bytes of its tensors.

    An existing folder of that name is replaced.

    Raises:
        CheckpointError: the disk is full or refuses; nothing but the existing checkpoints is left.
    """
    partial = folder.parent / f".{folder.name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        parts.write_files(partial)
        for name, tensors in parts.tensors.items():
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors"
            )
        for name, document in parts.documents.items():
            _write_json(partial / f"{name}.json", document)
        files = {
            path.relative_to(partial).as_posix(): _describe(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        _write_json(partial / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        _force_to_disk(partial)
        _replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _write_failure(folder, error) from error
    return _tensor_bytes(files)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint after checking every file of it against the manifest.

    Raises:
        CheckpointError: no checkpoint, another format version, or damaged files (each is named).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files = _entries(manifest) if version == FORMAT_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: its {MANIFEST} cannot be read ({error}). Use another one of the run"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this onecard reads {FORMAT_VERSION}: install the version that "
            "wrote it"
        )
    if not files:
        raise CheckpointError(f"{folder} is damaged: its {MANIFEST} lists no files. Use another one of the run")
    if problems := [problem for name, entry in files.items() if (problem := _damage(folder / name, entry))]:
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(problems)}. Delete this folder and resume from the checkpoint before it"
        )
    return Checkpoint(folder, _tensor_bytes(files))


def _entries(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"num_bytes": int(entry["num_bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in manifest["files"].items()
    }


def _tensor_bytes(files: Mapping[str, Any]) -> int:
    return sum(entry["num_bytes"] for name, entry in files.items() if name.endswith(".safetensors"))


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["num_bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['num_bytes']}"
    if _sha256(path) != entry["sha256"]:
        return f"{path.name} has other content than was written"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"num_bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def _force_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _replace_folder(partial: Path, folder: Path) -> None:
    # A folder cannot be replaced in one motion; the old one waits under a name that the next start removes.
    old = folder.parent / f".{folder.name}.old{_PARTIAL}"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_failure(folder: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
    is_full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
    if is_full:
        return CheckpointError(
            f"no space left for checkpoint {folder} ({format_bytes(free)} free): free some space, lower "
            "save_total_limit or move the run folder, then resume; earlier checkpoints are untouched"
        )
    return CheckpointError(f"checkpoint {folder} cannot be written: {error}. Earlier checkpoints are untouched")
