"""What a checkpoint folder says of itself: format version; size and SHA-256 of every file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import CheckpointError

# 1: the first. 2: tells in circumstances.json where it was written; progress.json may have more keys.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, by their path inside it."""

    format_version: int
    files: Mapping[str, Mapping[str, Any]]

    @property
    def num_tensor_bytes(self) -> int:
        return sum(entry["num_bytes"] for name, entry in self.files.items() if name.endswith(".safetensors"))


def describe_files(folder: Path) -> Manifest:
    """Measures and hashes every file of a folder."""
    files = {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Manifest(FORMAT_VERSION, files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    document = {"format_version": manifest.format_version, "files": manifest.files}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads what a folder says of itself, by this or an earlier version of onecard.

    Raises:
        CheckpointError: there is no manifest, it cannot be read, or it is of a later format.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = int(document["format_version"])
        files = _entries(document) if version <= FORMAT_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: its {MANIFEST} cannot be read ({error}). Use another one of the run"
        ) from error
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this onecard reads 1 to {FORMAT_VERSION}: install the version "
            "that wrote it"
        )
    if not files:
        raise CheckpointError(f"{folder} is damaged: its {MANIFEST} lists no files. Use another one of the run")
    return Manifest(version, files)


def find_damage(folder: Path, manifest: Manifest) -> tuple[list[str], OSError | None]:
    """Says of every file that is not what was written how it differs; gives the error of one that cannot be read."""
    problems, unread = [], None
    for name, entry in manifest.files.items():
        try:
            problem = _damage(folder / name, entry)
        except OSError as error:  # a bad sector, a share that is gone
            problem, unread = f"{Path(name).name} cannot be read ({error.strerror or error})", error
        if problem:
            problems.append(problem)
    return problems, unread


def _entries(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"num_bytes": int(entry["num_bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in document["files"].items()
    }


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["num_bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['num_bytes']}"
    return f"{path.name} has other content than was written" if _sha256(path) != entry["sha256"] else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
