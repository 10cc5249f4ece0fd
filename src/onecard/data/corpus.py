"""All sources of a run, with their tokenizer, as token files: the one function the rest of onecard calls."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.data.batches import Batch, BlockSteps, heldout_batches, share_rows
from onecard.data.build import prepare_corpus
from onecard.data.cache import cache_folder, explained_disk_errors, locked, log, short_hash, slug
from onecard.data.fingerprint import Fingerprint, Progress, fingerprint_source
from onecard.data.sampler import BlockSampler
from onecard.data.sources import Source, open_documents
from onecard.data.split import Split, find_problems, split_document
from onecard.data.stream import BatchStream, StreamSettings
from onecard.data.token_file import TOKENIZER_FOLDER, PreparedCorpus, TokenFile
from onecard.data.tokenizer import (
    TRAINED_KINDS,
    limit_threads,
    train_tokenizer,
    vocabulary_size,
)
from onecard.data.tokenizer_files import load_tokenizer, open_copy, save_tokenizer
from onecard.errors import DataError
from onecard.spec import Recipe
from onecard.units import MIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More text than this hardly changes the merges and only costs memory.
TOKENIZER_TEXT_BYTES = 256 * MIB


@dataclass(frozen=True)
class CorpusRequest:
    """Which text to prepare and how.

    `tokenizer` is bpe, char, bytes, a folder or a Hub name; `vocab_size` is for bpe. With `eval_sources` nothing of
    `sources` is held out. `seed` draws another held-out set where whole documents are held out. `num_proc` None means
    all cores; `cache_dir` None means $ONECARD_CACHE, else ~/.cache/onecard.
    """

    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...] = ()
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    eval_fraction: float = 0.05
    eval_split: str = "auto"
    seed: int = 0
    num_proc: int | None = None
    cache_dir: Path | None = None

    @classmethod
    def of(cls, recipe: Recipe, base: Path | None = None) -> "CorpusRequest":
        """The text of a recipe. `base` is the folder of its model, whose tokenizer is used unless it names another."""
        own = recipe.model_name_or_path and str(base or recipe.model_name_or_path)
        return cls(
            sources=tuple(Source(**source.model_dump()) for source in recipe.dataset),
            eval_sources=tuple(Source(**source.model_dump()) for source in recipe.eval_dataset),
            tokenizer=own if own and recipe.tokenizer == "bpe" else recipe.tokenizer,
            vocab_size=recipe.vocab_size,
            eval_fraction=recipe.eval_fraction,
            eval_split=recipe.eval_split,
            num_proc=None if recipe.dataset_num_proc == "auto" else recipe.dataset_num_proc,
        )


@dataclass(frozen=True)
class Corpus:
    """Prepared text: one token file per source for training, and those held out.

    `train_bytes` and `heldout_bytes` are UTF-8 text without separators (for bits per byte); `fingerprint` changes when
    any text, the tokenizer, the split or a weight does; `names` are the sources of `train` as the user wrote them.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_folder: Path
    train: tuple[TokenFile, ...]
    weights: tuple[float, ...]
    heldout: tuple[TokenFile, ...]
    vocab_size: int
    separator_id: int
    fingerprint: str
    train_bytes: int
    heldout_bytes: int
    names: tuple[str, ...]
    num_train_documents: int
    audit: None = None  # what counts of chats; of text everything does

    @property
    def num_train_tokens(self) -> int:
        return sum(file.num_tokens for file in self.train)

    @property
    def tokens_of_sources(self) -> tuple[tuple[str, int], ...]:
        """Name and training tokens of each source."""
        return tuple((name, file.num_tokens) for name, file in zip(self.names, self.train, strict=True))

    @property
    def num_heldout_tokens(self) -> int:
        return sum(file.num_tokens for file in self.heldout)

    @property
    def has_heldout(self) -> bool:
        return bool(self.heldout)

    def open_stream(self, settings: StreamSettings, seed: int, max_seq_length: int, position: int = 0) -> BatchStream:
        """Opens the training blocks of so many tokens, in the order of `seed`, from a position on."""
        return BatchStream(self.steps(settings, seed, max_seq_length), settings, position)

    def steps(self, settings: StreamSettings, seed: int, max_seq_length: int) -> BlockSteps:
        """Gives what a stream of these settings draws from."""
        sampler = BlockSampler([file.num_tokens for file in self.train], self.weights, max_seq_length, seed)
        return BlockSteps(self.train, sampler, self.separator_id, settings.micro_batch_size)

    def heldout_batches(self, max_seq_length: int, batch_size: int, limit_rows: int | None = None) -> Iterator[Batch]:
        """Streams the held-out blocks, all of them or so many spread evenly."""
        shares = share_rows([file.num_tokens for file in self.heldout], limit_rows)
        for file, limit in zip(self.heldout, shares, strict=True):
            yield from heldout_batches(file, max_seq_length, batch_size, self.separator_id, limit)


def prepare(request: CorpusRequest, progress: Progress | None = None) -> Corpus:
    """Turns sources into token files, or opens those that an earlier call made from the same text.

    `progress(stage, done_bytes, total_bytes)` is called from time to time. Raises DataError for everything about the
    input, InputError for a num_proc that comes too late.
    """
    _check(request)
    cache_root = cache_folder(request.cache_dir)
    fraction = 0.0 if request.eval_sources else request.eval_fraction
    split = Split(fraction, request.eval_split, request.seed)
    with limit_threads(request.num_proc), explained_disk_errors(cache_root):
        fingerprints = [fingerprint_source(source, cache_root, progress) for source in request.sources]
        eval_fingerprints = [fingerprint_source(source, cache_root, progress) for source in request.eval_sources]
        splits = [split.resolve(open_documents(source)) for source in request.sources]
        whole = Split(0.0).resolve(())
        texts = [*zip(fingerprints, splits, strict=True), *((entry, whole) for entry in eval_fingerprints)]
        tokenizer = _tokenizer(request, texts, cache_root, progress)
        prepared = [prepare_corpus(entry, rule, tokenizer, cache_root, progress) for entry, rule in texts]
        return _corpus(request, prepared, open_copy(tokenizer, prepared[0].folder / TOKENIZER_FOLDER))


def training_pieces(sources: Iterable[tuple[Source, Split]], limit_bytes: int = TOKENIZER_TEXT_BYTES) -> Iterator[str]:
    """Streams text of the training part only, up to `limit_bytes` shared among the sources by weight."""
    sources = list(sources)
    total_weight = sum(source.weight for source, _ in sources)
    for source, split in sources:
        rest = limit_bytes * source.weight / total_weight
        texts = (
            part.text
            for document in open_documents(source)
            for part in split_document(document, split)
            if not part.is_heldout
        )
        for text in texts:
            yield text
            rest -= len(text.encode("utf-8"))
            if rest <= 0:
                break


def _check(request: CorpusRequest) -> None:
    problems = find_problems(request.sources, request.eval_fraction, request.eval_split)
    if request.tokenizer == "bpe" and request.vocab_size is None:
        problems.append("tokenizer 'bpe' needs a vocab_size. Set it, for example to 8192.")
    if problems:
        raise DataError("\n".join(problems))


def _tokenizer(
    request: CorpusRequest, texts: list[tuple[Fingerprint, Split]], cache_root: Path, progress: Progress | None
) -> "PreTrainedTokenizerBase":
    if request.tokenizer not in TRAINED_KINDS:
        tokenizer = load_tokenizer(request.tokenizer)
        size = vocabulary_size(tokenizer)
        if request.vocab_size not in (None, size):
            raise DataError(
                f"vocab_size {request.vocab_size}: the tokenizer {request.tokenizer!r} has {size:,} tokens. Leave"
                " vocab_size out, or train a tokenizer ('bpe')."
            )
        return tokenizer
    learns = request.tokenizer != "bytes"
    key = {
        "kind": request.tokenizer,
        "vocab_size": request.vocab_size,
        "texts": [_text_key(entry, split, request.tokenizer) for entry, split in texts] if learns else [],
    }
    name = f"{slug(request.sources[0].path)}-{request.tokenizer}" if learns else request.tokenizer
    folder = cache_root / "tokenizers" / f"{name}-{short_hash(key)}"
    with locked(folder) as refusal:
        if folder.is_dir():
            try:
                return load_tokenizer(folder)
            except DataError:
                log.warning("%s is damaged: making the tokenizer again", folder)
        if refusal is not None:
            raise refusal
        trained = train_tokenizer(
            request.tokenizer, _reported(_tokenizer_pieces(request, texts), texts, progress), request.vocab_size
        )
        for entry, _ in texts:
            entry.check_unchanged()
        save_tokenizer(trained, folder)
        return load_tokenizer(folder)


def _text_key(entry: Fingerprint, split: Split, kind: str) -> list[object]:
    # Characters come from all text, so the split does not shape them.
    rule = asdict(split) if kind == "bpe" else None
    return [entry.content_hash, entry.source.text_column, entry.source.weight, rule]


def _tokenizer_pieces(request: CorpusRequest, texts: list[tuple[Fingerprint, Split]]) -> Iterator[str]:
    if request.tokenizer == "bpe":
        count = len(request.sources)
        return training_pieces([(entry.source, split) for entry, split in texts[:count]])
    return (piece for entry, _ in texts for document in open_documents(entry.source) for piece in document.pieces())


def _reported(
    pieces: Iterator[str], texts: list[tuple[Fingerprint, Split]], progress: Progress | None
) -> Iterator[str]:
    sizes = [entry.text_bytes for entry, _ in texts]
    total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    done_bytes = 0
    for piece in pieces:
        yield piece
        done_bytes += len(piece.encode("utf-8"))
        if progress is not None:
            progress("training the tokenizer", done_bytes, total_bytes)
    if done_bytes == 0:
        names = ", ".join(repr(entry.source.path) for entry, _ in texts)
        raise DataError(f"dataset {names}: there is no text in it to make a tokenizer from. Give text to train on.")


def _corpus(request: CorpusRequest, prepared: list[PreparedCorpus], tokenizer: "PreTrainedTokenizerBase") -> Corpus:
    count = len(request.sources)
    train, evaluated = prepared[:count], prepared[count:]
    if evaluated:
        heldout = [entry.train for entry in evaluated]
        heldout_bytes = sum(entry.manifest.train.text_bytes for entry in evaluated)
    else:
        heldout = [entry.heldout for entry in train if entry.heldout is not None]
        heldout_bytes = sum(entry.manifest.heldout.text_bytes for entry in train)
    weights = tuple(source.weight for source in request.sources)
    # Content only: a corpus that moved to another folder is still the same.
    parts = [
        [
            entry.manifest.content_hash,
            entry.manifest.tokenizer_hash,
            entry.manifest.split,
            entry.manifest.source["text_column"],
        ]
        for entry in prepared
    ]
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_folder=prepared[0].folder / TOKENIZER_FOLDER,
        train=tuple(entry.train for entry in train),
        weights=weights,
        heldout=tuple(heldout),
        vocab_size=prepared[0].manifest.vocab_size,
        separator_id=prepared[0].manifest.separator_id,
        fingerprint=hashlib.sha256(json.dumps([parts, weights], sort_keys=True).encode("utf-8")).hexdigest(),
        train_bytes=sum(entry.manifest.train.text_bytes for entry in train),
        heldout_bytes=heldout_bytes,
        names=tuple(source.path for source in request.sources),
        num_train_documents=sum(entry.manifest.train.documents for entry in train),
    )
