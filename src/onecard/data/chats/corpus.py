"""All chat sources of a run as batches of conversations: what the rest of onecard calls."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onecard.data.batches import Batch, share_rows
from onecard.data.cache import cache_folder, explained_disk_errors
from onecard.data.chats.audit import audit_chats, merge_skipped
from onecard.data.chats.batches import BatchShape, ChatSteps, heldout_chats
from onecard.data.chats.build import ChatRules, build_chats, smallest_split
from onecard.data.chats.chat_file import Conversations, PreparedChats
from onecard.data.chats.rows import list_all_files
from onecard.data.chats.template import ChatTemplate
from onecard.data.fingerprint import Progress, fingerprint_source
from onecard.data.sampler import IndexSampler
from onecard.data.sources import Source
from onecard.data.split import Split, find_problems
from onecard.data.stream import BatchStream, StreamSettings
from onecard.data.token_file import TOKENIZER_FOLDER
from onecard.data.tokenizer import limit_threads
from onecard.data.tokenizer_files import load_tokenizer, open_copy
from onecard.errors import DataError, InputError
from onecard.spec import Recipe
from onecard.spec.mask_audit import MaskAudit, SkippedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["error", "skip"]
_DEFAULT_FRACTION: float = Recipe.model_fields["eval_fraction"].default


@dataclass(frozen=True)
class ChatRequest:
    """Which chats to prepare and how.

    `tokenizer` is that of the base model: a folder or a Hub name. `chat_template` is what
    `ChatTemplate.of` takes; `max_rounds` None keeps all rounds that fit in `max_seq_length`. With
    `eval_sources` nothing of `sources` is held out, else whole rows by a hash of their turns, drawn by `seed`; with the
    default `eval_fraction` at least one of four rows or more.
    `num_proc` None means all cores; `cache_dir` None means $ONECARD_CACHE, else ~/.cache/onecard.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    eval_sources: tuple[Source, ...] = ()
    chat_template: str = "auto"
    max_seq_length: int = 1024
    max_rounds: int | None = None
    on_bad_row: OnBadRow = "error"
    eval_fraction: float = _DEFAULT_FRACTION
    eval_split: str = "auto"
    seed: int = 0
    num_proc: int | None = None
    cache_dir: Path | None = None

    @classmethod
    def of(cls, recipe: Recipe, base: Path | None = None) -> "ChatRequest":
        """The chats of a recipe. `base` is the folder of its model, whose tokenizer is used unless it names another."""
        own = str(base or recipe.model_name_or_path)
        return cls(
            sources=tuple(Source(**source.model_dump()) for source in recipe.dataset),
            tokenizer=own if recipe.tokenizer == "bpe" else recipe.tokenizer,
            eval_sources=tuple(Source(**source.model_dump()) for source in recipe.eval_dataset),
            chat_template=recipe.chat_template,
            max_seq_length=recipe.max_seq_length,
            max_rounds=recipe.max_rounds,
            on_bad_row=recipe.on_bad_row,
            eval_fraction=recipe.eval_fraction,
            eval_split=recipe.eval_split,
            num_proc=None if recipe.dataset_num_proc == "auto" else recipe.dataset_num_proc,
        )


@dataclass(frozen=True)
class ChatCorpus:
    """Prepared chats: the conversations of each source to train on, and those held out.

    `train_bytes` and `heldout_bytes` are UTF-8 text of the targets; `fingerprint` changes when any row, the tokenizer,
    the template, a length, the split or a weight does; `names` are the sources of `train` as the user wrote them;
    `stop_ids` end an answer; `control_tokens` are the special tokens that the template writes, with their ids, and
    `new_tokens` those that the vocabulary lacked.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_folder: Path
    train: tuple[Conversations, ...]
    weights: tuple[float, ...]
    heldout: tuple[Conversations, ...]
    vocab_size: int
    separator_id: int
    fingerprint: str
    train_bytes: int
    heldout_bytes: int
    names: tuple[str, ...]
    max_seq_length: int
    stop_ids: tuple[int, ...]
    control_tokens: tuple[tuple[str, int], ...]
    new_tokens: tuple[str, ...]
    audit: MaskAudit

    @property
    def num_train_tokens(self) -> int:
        return self.audit.num_tokens

    @property
    def num_target_tokens(self) -> int:
        return self.audit.num_target_tokens

    @property
    def num_heldout_tokens(self) -> int:
        return sum(len(part.ids) for part in self.heldout)

    @property
    def num_heldout_target_tokens(self) -> int:
        return self.audit.num_heldout_target_tokens

    @property
    def num_train_rows(self) -> int:
        return self.audit.num_rows

    @property
    def num_train_documents(self) -> int:
        return self.audit.num_rows

    @property
    def tokens_of_sources(self) -> tuple[tuple[str, int], ...]:
        """Name and training tokens of each source."""
        return tuple((name, len(part.ids)) for name, part in zip(self.names, self.train, strict=True))

    @property
    def has_heldout(self) -> bool:
        return bool(self.heldout)

    def open_stream(self, settings: StreamSettings, seed: int, max_seq_length: int, position: int = 0) -> BatchStream:
        """Opens steps of conversations in rows of so many tokens, in the order of `seed`, from a position on."""
        return BatchStream(self.steps(settings, seed, max_seq_length), settings, position)

    def steps(self, settings: StreamSettings, seed: int, max_seq_length: int) -> ChatSteps:
        """Gives what a stream of these settings draws from."""
        sampler = IndexSampler([part.num_rows for part in self.train], self.weights, seed)
        shape = BatchShape(max_seq_length, settings.micro_batch_size, settings.packing, settings.static_shapes)
        self._check_length(max_seq_length)
        return ChatSteps(self.train, sampler, shape, self.separator_id)

    def heldout_batches(self, max_seq_length: int, batch_size: int, limit_rows: int | None = None) -> Iterator[Batch]:
        """Streams the held-out conversations, one per row, all of them or so many spread evenly."""
        self._check_length(max_seq_length)
        shares = share_rows([part.num_rows for part in self.heldout], limit_rows)
        for part, limit in zip(self.heldout, shares, strict=True):
            yield from heldout_chats(part, BatchShape(max_seq_length, batch_size), self.separator_id, limit)

    def _check_length(self, max_seq_length: int) -> None:
        if max_seq_length < self.max_seq_length:
            raise InputError(
                f"max_seq_length {max_seq_length}: these chats were prepared for {self.max_seq_length} tokens, so that"
                " some may not fit. Prepare them again with the smaller length."
            )


def prepare_chats(request: ChatRequest, progress: Progress | None = None) -> ChatCorpus:
    """Turns chats into conversations of tokens with their targets, or opens those of an earlier call.

    `progress(stage, done, total)` is called from time to time, with bytes, while preparing with rows. Raises DataError
    for everything about the input, all of it together: with `on_bad_row` error for rows that cannot be used, always
    where nothing counts.
    """
    _check(request)
    cache_root = cache_folder(request.cache_dir)
    fraction = 0.0 if request.eval_sources else request.eval_fraction
    split = Split(fraction, "documents", request.seed) if fraction else Split(0.0).resolve(())
    whole = Split(0.0).resolve(())
    with limit_threads(request.num_proc), explained_disk_errors(cache_root):
        tokenizer = load_tokenizer(request.tokenizer)
        template = ChatTemplate.of(tokenizer, request.chat_template)
        rules = ChatRules(tokenizer, template, request.max_seq_length, request.max_rounds)
        prepared = []
        split_of = [split] * len(request.sources) + [whole] * len(request.eval_sources)
        listed = list_all_files((*request.sources, *request.eval_sources))
        for (source, files), rule in zip(listed, split_of, strict=True):
            fingerprint = fingerprint_source(source, cache_root, progress, files)
            built = build_chats(fingerprint, rules, rule, cache_root, progress)
            if rule.fraction == _DEFAULT_FRACTION and (least := smallest_split(built)) is not None:
                built = build_chats(fingerprint, rules, least, cache_root, progress)
            prepared.append(built)
        _refuse_bad_rows(request, prepared)
        _refuse_empty(request, prepared)
        return _corpus(request, prepared, open_copy(tokenizer, prepared[0].folder / TOKENIZER_FOLDER), template)


def _check(request: ChatRequest) -> None:
    problems = find_problems(request.sources, request.eval_fraction, request.eval_split)
    if request.eval_split == "tail":
        problems.append(
            "eval_split 'tail' holds out the end of each document, but chats are held out as whole rows. Set it to"
            " 'documents', or leave it out."
        )
    if request.on_bad_row not in ("error", "skip"):
        problems.append(f"on_bad_row {request.on_bad_row!r}: it is error or skip.")
    if problems:
        raise DataError("\n".join(problems))


def _refuse_bad_rows(request: ChatRequest, prepared: list[PreparedChats]) -> None:
    skipped = merge_skipped(prepared)
    if request.on_bad_row == "skip" or not skipped:
        return
    num_bad = sum(kind.num_rows for kind in skipped)
    num_rows = num_bad + _count_rows(prepared)
    raise DataError(
        f"{_names(request)}: {num_bad:,} of {num_rows:,} rows cannot be used:{_list_skipped(skipped)}\n"
        "Mend or remove them, or leave them out with --on-bad-row skip."
    )


def _refuse_empty(request: ChatRequest, prepared: list[PreparedChats]) -> None:
    parts = list(zip((*request.sources, *request.eval_sources), prepared, strict=True))
    for source, entry in parts:
        manifest, fraction = entry.manifest, request.eval_fraction
        num_rows = manifest.train.rows + manifest.heldout.rows
        if not num_rows:
            raise DataError(
                f"dataset {source.path!r}: nothing in it counts, there would be nothing to learn:"
                f"{_list_skipped(manifest.skipped) or ' it has no rows.'}\nGive chats with answers of an assistant."
            )
        is_split = not request.eval_sources and fraction > 0
        if not manifest.train.rows or (is_split and not manifest.heldout.rows):
            empty = "held-out" if manifest.train.rows else "training"
            raise DataError(
                f"dataset {source.path!r}: with eval_fraction {fraction} the {empty} part of its {num_rows:,} rows is"
                " empty. Change eval_fraction (0 holds nothing out), give more rows, or give an eval_dataset."
            )


def _list_skipped(skipped: tuple[SkippedRows, ...]) -> str:
    lines = []
    for kind in skipped:
        lines.append(f"\n  - {kind.kind}: {kind.num_rows:,} {'row' if kind.num_rows == 1 else 'rows'}")
        lines += [f"\n      {place.origin}: {place.reason}" for place in kind.places]
        if kind.num_rows > len(kind.places):
            lines.append(f"\n      … and {kind.num_rows - len(kind.places):,} more")
    return "".join(lines)


def _names(request: ChatRequest) -> str:
    return "dataset " + ", ".join(repr(source.path) for source in (*request.sources, *request.eval_sources))


def _count_rows(prepared: list[PreparedChats]) -> int:
    return sum(entry.manifest.train.rows + entry.manifest.heldout.rows for entry in prepared)


def _corpus(
    request: ChatRequest,
    prepared: list[PreparedChats],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
) -> ChatCorpus:
    count = len(request.sources)
    train, evaluated = prepared[:count], prepared[count:]
    names = [source.path for source in (*request.sources, *request.eval_sources)]
    heldout = [entry.train for entry in evaluated] if evaluated else [entry.heldout for entry in train]
    counts = [entry.manifest.train for entry in evaluated] or [entry.manifest.heldout for entry in train]
    weights = tuple(source.weight for source in request.sources)
    # Content only: chats that moved to another folder are still the same.
    parts = [
        [
            entry.manifest.content_hash,
            {name: entry.manifest.key[name] for name in entry.manifest.key if name != "source"},
        ]
        for entry in prepared
    ]
    return ChatCorpus(
        tokenizer=tokenizer,
        tokenizer_folder=prepared[0].folder / TOKENIZER_FOLDER,
        train=tuple(entry.train for entry in train if entry.train is not None),
        weights=weights,
        heldout=tuple(part for part in heldout if part is not None),
        vocab_size=prepared[0].manifest.vocab_size,
        separator_id=prepared[0].manifest.separator_id,
        fingerprint=hashlib.sha256(json.dumps([parts, weights], sort_keys=True).encode("utf-8")).hexdigest(),
        train_bytes=sum(entry.manifest.train.target_bytes for entry in train),
        heldout_bytes=sum(part.target_bytes for part in counts),
        names=tuple(names[:count]),
        max_seq_length=request.max_seq_length,
        stop_ids=template.stop_ids,
        control_tokens=template.control_tokens,
        new_tokens=template.new_tokens,
        audit=audit_chats(names, train, evaluated, template, request.eval_fraction),
    )
