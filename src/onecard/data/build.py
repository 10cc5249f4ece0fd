"""One source to token files: read, split, encode, append; restartable, and reused while nothing changed."""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onecard.data.cache import read_sealed, short_hash, slug, write_sealed
from onecard.data.fingerprint import Fingerprint, Progress
from onecard.data.reuse import open_or_build
from onecard.data.sources import open_documents
from onecard.data.split import Split, split_document
from onecard.data.token_file import (
    HELDOUT_FILE,
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    TRAIN_FILE,
    Manifest,
    PartCounts,
    PreparedCorpus,
    dtype_for,
    hash_samples,
    open_prepared,
)
from onecard.data.tokenizer import encode_pieces, separator_id, tokenizer_hash, vocabulary_size
from onecard.data.tokenizer_files import save_tokenizer
from onecard.errors import DataError
from onecard.units import MIB, format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The encoder needs about 100 bytes per token, and two batches are under way at a time.
BATCH_CHARACTERS = 2_000_000
SAVE_EVERY_BYTES = 64 * MIB
PROGRESS_FILE = "progress.json"


def prepare_corpus(
    fingerprint: Fingerprint,
    split: Split,
    tokenizer: "PreTrainedTokenizerBase",
    cache_root: Path,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Writes the token files of one source, or opens those there are when source, tokenizer and split are the same.

    A killed build goes on where it last saved (every 64 MiB of tokens); two processes wait for one another. Memory is
    two batches of 2M characters. `split` must be resolved. What is damaged is built again. Raises DataError for bad
    text, an empty part or a full disk.
    """
    key = {
        "source": fingerprint.identity,
        "tokenizer": tokenizer_hash(tokenizer),
        "split": asdict(split),
    }
    folder = cache_root / "corpora" / f"{slug(fingerprint.source.path)}-{short_hash(key)}"

    def build() -> None:
        _Build(folder, fingerprint, split, tokenizer).run(progress)

    return open_or_build(folder, key, fingerprint, read=Manifest.read, open_prepared=open_prepared, build=build)


@dataclass(frozen=True)
class _Piece:
    text: str
    is_heldout: bool
    starts_document: bool


class _Build:
    """One build of one folder; `run` leaves it complete, with a manifest."""

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, split: Split, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.split = split
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.separator_id = separator_id(tokenizer)
        self.dtype = np.dtype(dtype_for(self.vocab_size))
        self.counts = [PartCounts(), PartCounts()]
        self.num_pieces_done = 0
        self.num_empty_documents = 0
        self.elapsed_s = 0.0
        self.partials = [folder / f"{name}.partial" for name in (TRAIN_FILE, HELDOUT_FILE)]

    def run(self, progress: Progress | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        resumes = self._restore()
        started = time.perf_counter() - self.elapsed_s
        with ExitStack() as stack:
            streams = [stack.enter_context(path.open("r+b" if resumes else "w+b")) for path in self.partials]
            for stream, counts in zip(streams, self.counts, strict=True):
                stream.truncate(counts.tokens * self.dtype.itemsize)
                stream.seek(0, os.SEEK_END)
            saved_bytes = self._token_bytes()
            for pieces, encoded in self._encoded_batches():
                for stream, block in zip(streams, self._to_blocks(pieces, encoded), strict=True):
                    stream.write(block.data)
                self.elapsed_s = time.perf_counter() - started
                if saved_bytes == 0:
                    self._check_space()
                if self._token_bytes() - saved_bytes >= SAVE_EVERY_BYTES or saved_bytes == 0:
                    self._save(streams)
                    saved_bytes = self._token_bytes()
                if progress is not None:
                    progress("tokenizing", self._text_bytes(), self.fingerprint.text_bytes)
            self.fingerprint.check_unchanged()
            self._close_parts(streams)
        self.elapsed_s = time.perf_counter() - started
        self._finish()

    def _pieces(self) -> Iterator[_Piece]:
        for document in open_documents(self.fingerprint.source):
            begun = set[bool]()
            for part in split_document(document, self.split):
                yield _Piece(part.text, part.is_heldout, part.is_heldout not in begun)
                begun.add(part.is_heldout)
            self.num_empty_documents += not begun

    def _batches(self) -> Iterator[list[_Piece]]:
        batch, num_characters = list[_Piece](), 0
        for piece in islice(self._pieces(), self.num_pieces_done, None):
            batch.append(piece)
            num_characters += len(piece.text)
            if num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
        if batch:
            yield batch

    def _encoded_batches(self) -> Iterator[tuple[list[_Piece], list[np.ndarray]]]:
        """Encodes one batch ahead in a thread, so that reading and writing overlap with the Rust encoder."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            ahead: tuple[list[_Piece], Future[list[np.ndarray]]] | None = None
            for batch in self._batches():
                encoding = executor.submit(encode_pieces, self.tokenizer, [piece.text for piece in batch])
                if ahead is not None:
                    yield ahead[0], ahead[1].result()
                ahead = batch, encoding
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def _to_blocks(self, pieces: list[_Piece], encoded: list[np.ndarray]) -> list[np.ndarray]:
        sides: list[list[np.ndarray]] = [[], []]
        separator = np.array([self.separator_id])
        for piece, ids in zip(pieces, encoded, strict=True):
            if ids.size and int(ids.max()) >= self.vocab_size:
                raise DataError(
                    f"{self.fingerprint.source.path}: the tokenizer gave id {ids.max()}, its vocabulary has"
                    f" {self.vocab_size:,} tokens. Use a tokenizer whose files belong together."
                )
            counts = self.counts[piece.is_heldout]
            if piece.starts_document:
                sides[piece.is_heldout].append(separator)
                counts.documents += 1
            sides[piece.is_heldout].append(ids)
            counts.tokens += len(ids) + piece.starts_document
            counts.text_bytes += len(piece.text.encode("utf-8"))
        self.num_pieces_done += len(pieces)
        return [np.concatenate([np.empty(0, np.int64), *side]).astype(self.dtype) for side in sides]

    def _token_bytes(self) -> int:
        return sum(counts.tokens for counts in self.counts) * self.dtype.itemsize

    def _text_bytes(self) -> int:
        return sum(counts.text_bytes for counts in self.counts)

    def _check_space(self) -> None:
        """Foresees a full disk from the first batch; sources of unknown text size are not foreseen."""
        rest_bytes = max(0, (self.fingerprint.text_bytes or 0) - self._text_bytes())
        needed = int(rest_bytes * self._token_bytes() / self._text_bytes())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(
                f"{self.folder}: the token files need about {format_bytes(needed)} more, the disk has"
                f" {format_bytes(free)} free. Free some, or set ONECARD_CACHE to a folder on another disk."
            )

    def _save(self, streams: list[BufferedRandom]) -> None:
        _put_on_disk(streams)
        content = {
            "content_hash": self.fingerprint.content_hash,
            "num_pieces_done": self.num_pieces_done,
            "elapsed_s": self.elapsed_s,
            "counts": [asdict(counts) for counts in self.counts],
        }
        write_sealed(self.folder / PROGRESS_FILE, content)

    def _restore(self) -> bool:
        """Takes up what an interrupted build of the same content saved; False to start from nothing."""
        try:
            saved = read_sealed(self.folder / PROGRESS_FILE)
            counts = [PartCounts(**entry) for entry in saved["counts"]]
            sizes = [path.stat().st_size for path in self.partials]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        is_whole = all(size >= part.tokens * self.dtype.itemsize for size, part in zip(sizes, counts, strict=True))
        if saved["content_hash"] != self.fingerprint.content_hash or not is_whole:
            return False
        self.counts = counts
        self.num_pieces_done, self.elapsed_s = saved["num_pieces_done"], saved["elapsed_s"]
        return True

    def _close_parts(self, streams: list[BufferedRandom]) -> None:
        path, fraction = self.fingerprint.source.path, self.split.fraction
        train, heldout = self.counts
        if not train.tokens and not heldout.tokens:
            raise DataError(f"dataset {path!r}: there is no text in it. Give text to train on.")
        if not train.tokens or (fraction > 0 and not heldout.tokens):
            empty = "held-out" if train.tokens else "training"
            remedy = "Give more text" if self.split.rule == "tail" else "Set eval_split to 'tail'"
            raise DataError(
                f"dataset {path!r}: with eval_fraction {fraction} and eval_split {self.split.rule!r} the {empty} part"
                f" of its {train.documents + heldout.documents} documents is empty. {remedy}, change"
                " eval_fraction, or give an eval_dataset."
            )
        for stream, counts in zip(streams, self.counts, strict=True):
            if counts.tokens:
                stream.write(np.array([self.separator_id], dtype=self.dtype).data)
                counts.tokens += 1
        # The manifest must not outlive a power cut that its files do not.
        _put_on_disk(streams)

    def _finish(self) -> None:
        """Puts everything in place; files that another run has mapped are replaced, never written to."""
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
        save_tokenizer(self.tokenizer, self.folder / TOKENIZER_FOLDER)
        samples = {}
        for partial, name in zip(self.partials, (TRAIN_FILE, HELDOUT_FILE), strict=True):
            partial.replace(self.folder / name)
            samples[name] = hash_samples(self.folder / name)
        manifest = Manifest(
            dtype=self.dtype.str,
            vocab_size=self.vocab_size,
            separator_id=self.separator_id,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            content_hash=self.fingerprint.content_hash,
            source=self.fingerprint.identity,
            split=asdict(self.split),
            files=self.fingerprint.records,
            num_empty_files=self.fingerprint.num_empty_files,
            num_empty_documents=self.num_empty_documents,
            train=self.counts[False],
            heldout=self.counts[True],
            elapsed_s=round(self.elapsed_s, 3),
            samples=samples,
        )
        manifest.write(self.folder)
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)


def _put_on_disk(streams: list[BufferedRandom]) -> None:
    for stream in streams:
        stream.flush()
        os.fsync(stream.fileno())
