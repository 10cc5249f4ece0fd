"""Prepared conversations on disk: ids, which of them count, and where each conversation begins.

<part>.tokens.bin    ids of all conversations back to back, uint16 or uint32
<part>.targets.bin   uint8, 1 for a token that is to be predicted
<part>.rows.bin      int64, first token of each conversation, closed by the number of tokens
<part>.hashes.bin    uint64, a hash of each conversation's turns, ascending
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data.cache import read_sealed, write_sealed
from onecard.data.token_file import MANIFEST_FILE, TokenFile
from onecard.errors import DataError
from onecard.spec.mask_audit import SampleRow, SkippedRows

FORMAT_VERSION = 4
PARTS = ("train", "heldout")
_OFFSETS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Conversations:
    """The conversations of one part (training or held-out), memory-mapped."""

    ids: TokenFile
    is_target: TokenFile
    offsets: TokenFile
    hashes: TokenFile

    @property
    def path(self) -> Path:
        return self.ids.path

    @property
    def num_rows(self) -> int:
        return len(self.hashes)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids [n] int64 of a conversation and which of them count [n] bool."""
        start, end = self.offsets[index : index + 2].tolist()
        return self.ids[start:end].astype(np.int64), self.is_target[start:end].astype(bool)

    def lengths(self) -> Iterator[np.ndarray]:
        """Streams the number of tokens of each conversation, a million at a time."""
        for first in range(0, self.num_rows, _OFFSETS_AT_ONCE):
            yield np.diff(self.offsets[first : first + _OFFSETS_AT_ONCE + 1])


@dataclass
class ChatCounts:
    """What one part holds; `target_bytes` is the UTF-8 text of the targets, stop tokens left out."""

    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    target_bytes: int = 0


@dataclass
class Flaws:
    """What the mask audit counts over both parts of a source."""

    cut_rows: int = 0
    dropped_rounds: int = 0
    lost_tokens: int = 0
    double_bos_rows: int = 0
    rows_without_stop: int = 0
    partial_rows: int = 0
    empty_system_rows: int = 0


@dataclass(frozen=True)
class ChatManifest:
    """What prepared conversations were made from, and how much there is."""

    key: dict[str, Any]
    content_hash: str
    dtype: str
    vocab_size: int
    separator_id: int
    train: ChatCounts
    heldout: ChatCounts
    flaws: Flaws
    formats: tuple[str, ...]
    skipped: tuple[SkippedRows, ...]
    examples: tuple[SampleRow, ...]
    elapsed_s: float
    samples: dict[str, str]
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("train", "heldout", "flaws"):
            content[name] = asdict(content[name])
        for name in ("skipped", "examples"):
            content[name] = [entry.model_dump(mode="json") for entry in content[name]]
        write_sealed(folder / MANIFEST_FILE, content)

    @classmethod
    def read(cls, folder: Path) -> "ChatManifest":
        """Reads a manifest; raises DataError where it is damaged or of another format."""
        path = folder / MANIFEST_FILE
        try:
            content = read_sealed(path)
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {content['format_version']}, this version reads {FORMAT_VERSION}")
            content["train"] = ChatCounts(**content["train"])
            content["heldout"] = ChatCounts(**content["heldout"])
            content["flaws"] = Flaws(**content["flaws"])
            content["formats"] = tuple(content["formats"])
            content["skipped"] = tuple(SkippedRows(**entry) for entry in content["skipped"])
            content["examples"] = tuple(SampleRow(**entry) for entry in content["examples"])
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: damaged, or of another version of onecard ({error}). Delete the folder {folder}, it is then"
                " prepared again."
            ) from error


@dataclass(frozen=True)
class PreparedChats:
    """One source as conversations."""

    folder: Path
    manifest: ChatManifest
    train: Conversations | None
    heldout: Conversations | None


def file_names(part: str) -> dict[str, str]:
    """Names the files of a part by what they hold, in the order of `Conversations`."""
    return {kind: f"{part}.{kind}.bin" for kind in ("tokens", "targets", "rows", "hashes")}


def open_chats(folder: Path) -> PreparedChats:
    """Opens prepared conversations; raises DataError where the files do not match the manifest."""
    manifest = ChatManifest.read(folder)

    def open_part(part: str, counts: ChatCounts) -> Conversations | None:
        if not counts.rows:
            return None
        # Number of entries, their type, and how many different values there may be.
        shapes = {
            "tokens": (counts.tokens, manifest.dtype, manifest.vocab_size),
            "targets": (counts.tokens, "|u1", 2),
            "rows": (counts.rows + 1, "<i8", counts.tokens + 1),
            "hashes": (counts.rows, "<u8", None),
        }
        opened = [
            TokenFile(folder / name, dtype, size, highest, manifest.samples.get(name, ""))
            for name, (size, dtype, highest) in zip(file_names(part).values(), shapes.values(), strict=True)
        ]
        return Conversations(*opened)

    return PreparedChats(folder, manifest, open_part("train", manifest.train), open_part("heldout", manifest.heldout))
