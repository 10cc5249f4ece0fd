"""Token files: a corpus as ids on disk, memory-mapped, with a manifest that says what they were made from.

<slug>-<12 hex>/
  tokens.bin      training part, uint16 or uint32, little-endian: SEP text SEP text … SEP
  heldout.bin     held-out part, the same way (absent when nothing is held out)
  tokenizer/      a Hugging Face tokenizer folder
  manifest.json   written last: a folder without it is unfinished
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data.cache import read_sealed, write_sealed
from onecard.data.fingerprint import FileRecord
from onecard.errors import DataError
from onecard.units import KIB

FORMAT_VERSION = 2
TRAIN_FILE, HELDOUT_FILE = "tokens.bin", "heldout.bin"
TOKENIZER_FOLDER, MANIFEST_FILE = "tokenizer", "manifest.json"
# 512 KiB of a large file, read in under a second from a slow disk.
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 8 * KIB


def dtype_for(vocab_size: int) -> str:
    """Names the narrowest id type: '<u2' up to 65,536 tokens, else '<u4'."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def hash_samples(path: Path) -> str:
    """Hashes 64 parts of a file spread evenly from its first byte to its last, a small one as a whole.

    A file that lost power while it was written, or was cut and filled up, is told without reading all of it.
    """
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode("ascii"))
    with path.open("rb") as stream:
        if num_bytes <= _NUM_SAMPLES * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(_NUM_SAMPLES):
                stream.seek(index * (num_bytes - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class TokenFile:
    """A read-only view of the ids in one file; slicing gives numpy arrays without reading the rest.

    With `vocab_size`, a slice that holds an id beyond it raises DataError; with `samples`, the `hash_samples` of the
    file as it was written, so does opening one that has changed.
    """

    def __init__(
        self, path: Path, dtype: str, num_tokens: int, vocab_size: int | None = None, samples: str | None = None
    ) -> None:
        self.path = path
        self.num_tokens = num_tokens
        self._highest_id = np.iinfo(dtype).max if vocab_size is None else vocab_size - 1
        expected_bytes = num_tokens * np.dtype(dtype).itemsize
        actual_bytes = path.stat().st_size if path.is_file() else -1
        if actual_bytes != expected_bytes:
            found = "is missing" if actual_bytes < 0 else f"has {actual_bytes:,} bytes"
            raise self._damaged(f"it {found} where its manifest says {expected_bytes:,} bytes")
        # Before it is mapped: Windows does not replace a mapped file.
        if samples is not None and hash_samples(path) != samples:
            raise self._damaged("it is not what was written")
        self._ids = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, tokens: slice) -> np.ndarray:
        ids = self._ids[tokens]
        if ids.size and int(ids.max()) > self._highest_id:
            raise self._damaged(f"it holds the id {ids.max()}, the vocabulary ends at {self._highest_id}")
        return ids

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self.path}: {reason}. The prepared corpus is damaged: delete the folder {self.path.parent}, it is then"
            " prepared again."
        )


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
    samples: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> dict[str, Any]:
        """What decides, beside the content, what is in it."""
        return {"source": self.source, "tokenizer": self.tokenizer_hash, "split": self.split}

    def write(self, folder: Path) -> None:
        write_sealed(folder / MANIFEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads a manifest; raises DataError where it is damaged or of another format."""
        path = folder / MANIFEST_FILE
        remedy = f"Delete the folder {folder}, it is then prepared again."
        try:
            content = read_sealed(path)
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {content['format_version']}, this version reads {FORMAT_VERSION}")
            content["files"] = tuple(FileRecord(**record) for record in content["files"])
            content["train"] = PartCounts(**content["train"])
            content["heldout"] = PartCounts(**content["heldout"])
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: damaged, or of another version of onecard ({error}). {remedy}") from error


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

    def open_part(name: str, counts: PartCounts) -> TokenFile:
        return TokenFile(
            folder / name, manifest.dtype, counts.tokens, manifest.vocab_size, manifest.samples.get(name, "")
        )

    heldout = open_part(HELDOUT_FILE, manifest.heldout) if manifest.heldout.tokens else None
    return PreparedCorpus(folder, manifest, open_part(TRAIN_FILE, manifest.train), heldout)
