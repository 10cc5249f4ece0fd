"""One source of chats to files in the cache: read, render, split, append; reused while nothing changed.

rows ─ examples ─► batch ─┐ two batches ahead
                          └─ thread: rounds, template, tokens ─► blocks ─► files, manifest last
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onecard.data.cache import short_hash, slug
from onecard.data.chats.chat_file import (
    PARTS,
    ChatCounts,
    ChatManifest,
    Flaws,
    PreparedChats,
    file_names,
    open_chats,
)
from onecard.data.chats.conversation import BadRow
from onecard.data.chats.examples import ExampleBatch, ExampleReader
from onecard.data.chats.rendering import Block, RenderedBatch, Renderer
from onecard.data.chats.rows import estimate_rows, list_chat_files
from onecard.data.chats.template import ChatTemplate
from onecard.data.fingerprint import Fingerprint, Progress
from onecard.data.reuse import open_or_build
from onecard.data.split import Split
from onecard.data.token_file import MANIFEST_FILE, TOKENIZER_FOLDER, dtype_for, hash_samples
from onecard.data.tokenizer import separator_id, tokenizer_hash
from onecard.data.tokenizer_files import save_tokenizer
from onecard.spec.mask_audit import BadPlace, SampleRow, SkippedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES_SHOWN = 5
_SAMPLES_SHOWN = 3
_BATCHES_AHEAD = 2
_FEWEST_TO_SPARE_ONE = 4


@dataclass(frozen=True)
class ChatRules:
    """What becomes of a conversation, whatever the file: its tokens, its template, how much of it is kept."""

    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate
    max_tokens: int
    max_rounds: int | None

    def key(self) -> dict[str, Any]:
        """Everything that decides which tokens come out, as JSON."""
        return {
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": short_hash([self.template.name, self.tokenizer.chat_template]),
            "max_seq_length": self.max_tokens,
            "max_rounds": self.max_rounds,
        }


def build_chats(
    fingerprint: Fingerprint, rules: ChatRules, split: Split, cache_root: Path, progress: Progress | None = None
) -> PreparedChats:
    """Writes the conversations of one source, or opens those there are when nothing that decides them has changed.

    Rows that cannot be used are left out, counted and kept in the manifest with their places: what is to be said of
    them is the caller's. Nothing is seen half written, two processes wait for one another, and memory does not depend
    on the number of rows. Raises DataError for files that cannot be read, a tokenizer that does not fit, a full disk.
    """
    key = {"source": fingerprint.identity, "split": asdict(split), **rules.key()}
    folder = cache_root / "chats" / f"{slug(fingerprint.source.path)}-{short_hash(key)}"

    def build() -> None:
        if progress is not None:
            progress("preparing chats", 0, None)
        _Build(folder, fingerprint, rules, split, key).run(progress)

    return open_or_build(folder, key, fingerprint, read=ChatManifest.read, open_prepared=open_chats, build=build)


def smallest_split(prepared: PreparedChats) -> Split | None:
    """Gives a split that holds out the row of the lowest hash; None where some are, or they are too few to spare one.

    The hashes on disk are those by which a split of seed 0 draws.
    """
    train = prepared.train
    if prepared.heldout is not None or train is None or train.num_rows < _FEWEST_TO_SPARE_ONE:
        return None
    lowest = int(train.hashes[:1][0])
    return Split(math.nextafter(lowest / 2**64, 1.0), "documents", 0)


class _Build:
    """One build of one folder; `run` leaves it complete, with a manifest."""

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, rules: ChatRules, split: Split, key: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.rules = rules
        self.key = key
        self.reader = ExampleReader(fingerprint.source)
        self.renderer = Renderer(rules.tokenizer, rules.template, split, rules.max_tokens, rules.max_rounds)
        self.dtype = np.dtype(dtype_for(self.renderer.vocab_size))
        self.counts = {part: ChatCounts() for part in PARTS}
        self.flaws = Flaws()
        self.skipped = dict[str, list[BadPlace]]()
        self.num_skipped = dict[str, int]()
        self.samples = list[SampleRow]()

    def run(self, progress: Progress | None) -> None:
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                writers = {part: _PartWriter(self.folder, part, self.dtype, stack) for part in PARTS}
                num_rows = 0
                total_rows = estimate_rows(list_chat_files(self.fingerprint.source).files) if progress else None
                for batch, rendered in self._rendered():
                    for part, block in zip(PARTS, (rendered.train, rendered.heldout), strict=True):
                        writers[part].append(block)
                        _add(self.counts[part], block.counts)
                    _add(self.flaws, rendered.flaws)
                    self._note(rendered)
                    num_rows += batch.num_rows
                    if progress is not None:
                        progress("preparing chats", num_rows, total_rows and max(total_rows, num_rows))
                for writer in writers.values():
                    writer.put_on_disk()
            self.fingerprint.check_unchanged()
            self._finish(round(time.perf_counter() - started, 3))
        finally:
            for part in PARTS:
                for name in file_names(part).values():
                    _partial(self.folder / name).unlink(missing_ok=True)

    def _rendered(self) -> Iterator[tuple[ExampleBatch, RenderedBatch]]:
        """Renders in a thread, so that reading and writing overlap with the Rust encoder."""
        ahead = deque[tuple[ExampleBatch, Future[RenderedBatch]]]()
        with ThreadPoolExecutor(max_workers=1) as executor:
            for batch in self.reader.batches():
                num_samples = _SAMPLES_SHOWN - len(self.samples)
                ahead.append((batch, executor.submit(self.renderer.render, batch, num_samples)))
                if len(ahead) > _BATCHES_AHEAD:
                    done, rendering = ahead.popleft()
                    yield done, rendering.result()
            for done, rendering in ahead:
                yield done, rendering.result()

    def _note(self, rendered: RenderedBatch) -> None:
        self.samples = (self.samples + rendered.samples)[:_SAMPLES_SHOWN]
        for origin, bad in rendered.bad:
            self._skip(origin, bad)

    def _skip(self, origin: str, bad: BadRow) -> None:
        self.num_skipped[bad.kind] = self.num_skipped.get(bad.kind, 0) + 1
        places = self.skipped.setdefault(bad.kind, [])
        if len(places) < _PLACES_SHOWN:
            places.append(BadPlace(origin=origin, reason=bad.reason))

    def _finish(self, elapsed_s: float) -> None:
        """Puts everything in place; files that another run has mapped are replaced, never written to."""
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
        save_tokenizer(self.rules.tokenizer, self.folder / TOKENIZER_FOLDER)
        samples = {}
        for part in PARTS:
            names = file_names(part)
            _sort_file(_partial(self.folder / names["hashes"]))
            for name in names.values():
                _partial(self.folder / name).replace(self.folder / name)
                samples[name] = hash_samples(self.folder / name)
        ChatManifest(
            key=self.key,
            content_hash=self.fingerprint.content_hash,
            dtype=self.dtype.str,
            vocab_size=self.renderer.vocab_size,
            separator_id=separator_id(self.rules.tokenizer),
            train=self.counts["train"],
            heldout=self.counts["heldout"],
            flaws=self.flaws,
            formats=tuple(self.reader.formats),
            skipped=tuple(
                SkippedRows(kind=kind, num_rows=self.num_skipped[kind], places=tuple(places))
                for kind, places in self.skipped.items()
            ),
            examples=tuple(self.samples),
            elapsed_s=elapsed_s,
            samples=samples,
        ).write(self.folder)


class _PartWriter:
    """Appends blocks to the four files of a part."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype[Any], stack: ExitStack) -> None:
        self._dtype = dtype
        self._num_tokens = 0
        self._streams: dict[str, BufferedRandom] = {
            kind: stack.enter_context(_partial(folder / name).open("w+b")) for kind, name in file_names(part).items()
        }
        self._streams["rows"].write(np.zeros(1, "<i8").data)

    def append(self, block: Block) -> None:
        if not len(block.lengths):
            return
        ends = self._num_tokens + np.cumsum(block.lengths)
        self._num_tokens = int(ends[-1])
        for kind, content in (
            ("tokens", block.ids.astype(self._dtype)),
            ("targets", block.is_target.astype("|u1")),
            ("rows", ends.astype("<i8")),
            ("hashes", block.hashes.astype("<u8")),
        ):
            self._streams[kind].write(content.data)

    def put_on_disk(self) -> None:
        # The manifest must not outlive a power cut that its files do not.
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _sort_file(path: Path) -> None:
    """Sorts 64-bit hashes where they lie, so that equal ones are neighbours; the memory is the file's own."""
    if path.stat().st_size:
        hashes = np.memmap(path, dtype="<u8", mode="r+")
        hashes.sort()
        hashes.flush()
        del hashes


def _add(total: ChatCounts | Flaws, part: ChatCounts | Flaws) -> None:
    for name, value in asdict(part).items():
        setattr(total, name, getattr(total, name) + value)
