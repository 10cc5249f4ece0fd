"""Token files: a corpus as ids on disk, memory-mapped, with a manifest that says what they were made from.

<slug>-<12 hex>/
  tokens.bin      training part, uint16 or uint32, little-endian: SEP text SEP text … SEP
  heldout.bin     held-out part, the same way (absent when nothing is held out)
  tokenizer/      a Hugging Face tokenizer folder
  manifest.json   written last: a folder without it is unfinished
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data.cache import write_json
from onecard.data.fingerprint import FileRecord
from onecard.errors import DataError

FORMAT_VERSION = 1
TRAIN_FILE, HELDOUT_FILE = "tokens.bin", "heldout.bin"
TOKENIZER_FOLDER, MANIFEST_FILE = "tokenizer", "manifest.json"


def dtype_for(vocab_size: int) -> str:
    """Names the narrowest id type: '<u2' up to 65,536 tokens, else '<u4'."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class TokenFile:
    """A read-only view of the ids in one file; slicing gives numpy arrays without reading the rest."""

    def __init__(self, path: Path, dtype: str, num_tokens: int) -> None:
        self.path = path
        self.num_tokens = num_tokens
        expected_bytes = num_tokens * np.dtype(dtype).itemsize
        actual_bytes = path.stat().st_size if path.is_file() else -1
        if actual_bytes != expected_bytes:
            found = "is missing" if actual_bytes < 0 else f"has {actual_bytes:,} bytes"
            raise DataError(
                f"{path}: it {found} where its manifest says {expected_bytes:,} bytes. The prepared corpus is damaged:"
                f" delete the folder {path.parent} and run `onecard prepare` again."
            )
        self._ids = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, tokens: slice) -> np.ndarray:
        return self._ids[tokens]


@dataclass
class PartCounts:
    """What one part (training or held-out) of a corpus holds; `text_bytes` is UTF-8, without separators."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus was made from, and how much it holds."""

    dtype: str
    vocab_size: int
    separator_id: int
    tokenizer_hash: str
    content_hash: str
    source: dict[str, str | None]
    split: dict[str, Any]
    files: tuple[FileRecord, ...]
    num_empty_files: int
    num_empty_documents: int
    train: PartCounts
    heldout: PartCounts
    elapsed_s: float
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads a manifest; raises DataError where it is damaged or of another format."""
        path = folder / MANIFEST_FILE
        remedy = f"Delete the folder {folder} and run `onecard prepare` again."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{path}: format {content['format_version']}, this version of onecard reads {FORMAT_VERSION}."
                    f" {remedy}"
                )
            content["files"] = tuple(FileRecord(**record) for record in content["files"])
            content["train"] = PartCounts(**content["train"])
            content["heldout"] = PartCounts(**content["heldout"])
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: damaged or not readable ({error}). {remedy}") from error


@dataclass(frozen=True)
class PreparedCorpus:
    """One source as token files."""

    folder: Path
    manifest: Manifest
    train: TokenFile
    heldout: TokenFile | None


def open_prepared(folder: Path) -> PreparedCorpus:
    """Opens a prepared corpus; raises DataError where its files do not match the manifest."""
    manifest = Manifest.read(folder)
    heldout = None
    if manifest.heldout.tokens:
        heldout = TokenFile(folder / HELDOUT_FILE, manifest.dtype, manifest.heldout.tokens)
    return PreparedCorpus(
        folder, manifest, TokenFile(folder / TRAIN_FILE, manifest.dtype, manifest.train.tokens), heldout
    )
