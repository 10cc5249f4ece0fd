"""Tokenizers on disk: load one from wherever it is, save one so that it is whole or not there."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.data.cache import locked, log
from onecard.data.tokenizer import END_OF_TEXT, TRAINED_KINDS, as_transformers, separator_id, tokenizer_hash
from onecard.errors import DataError
from onecard.spec.paths import locate
from onecard.spec.tokenizer_files import find_missing_vocabulary, find_tokenizer_damage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Loads any `transformers` tokenizer: a folder, a tokenizer.json file, or a name on the Hub or in its cache.

    Padding and truncation stored with it are switched off. Raises DataError where nothing is found, or where no
    token can end a text.
    """
    path = locate(name_or_path)
    file = path / "tokenizer.json" if path is not None and path.is_dir() and not _has_config(path) else path
    if file is not None and file.is_file():
        tokenizer = _load_file(file)
    else:
        tokenizer = _load_pretrained(str(path or name_or_path))
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    separator_id(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer folder beside its place and renames it there, in place of one that is there."""
    beside = folder.with_name(f"{folder.name}.partial")
    try:
        tokenizer.save_pretrained(beside)
    except OSError:
        raise
    # The Rust side raises Exception itself for a full disk.
    except Exception as error:
        raise DataError(
            f"{folder}: the tokenizer cannot be saved ({error}). Is the disk full? Free some, or set ONECARD_CACHE to a"
            " folder on another disk."
        ) from error
    if folder.exists():
        shutil.rmtree(folder)
    beside.replace(folder)


def open_copy(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> "PreTrainedTokenizerBase":
    """Opens the copy of a tokenizer that lies beside its token files, and mends one that is damaged."""
    try:
        found = load_tokenizer(folder)
        if tokenizer_hash(found) == tokenizer_hash(tokenizer):
            return found
    except DataError:
        pass
    log.warning("%s is damaged: writing it again", folder)
    with locked(folder.parent) as refusal:
        if refusal is not None:
            raise refusal
        save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))


def _load_file(file: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    # The Rust side raises Exception itself for a file it cannot read.
    except Exception as error:
        raise DataError(f"tokenizer file {file}: cannot be read ({error}). Fetch or save it again.") from error
    vocabulary = backend.get_vocab()
    return as_transformers(backend, next((token for token in _KNOWN_ENDS if token in vocabulary), None))


def _load_pretrained(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer, and the Rust side, has errors of its own
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        if Path(name).is_dir():
            reason = find_tokenizer_damage(Path(name)) or reason
            raise DataError(
                f"tokenizer folder {name}: `transformers` cannot load it: {reason}. Copy or download its tokenizer.json"
                " and tokenizer_config.json again."
            ) from error
        raise DataError(
            f"tokenizer {name!r}: it is none of the kinds to train ({', '.join(TRAINED_KINDS)}), no folder and no"
            f" tokenizer.json file here, and `transformers` cannot load it: {reason}. Check the name, or be online once"
            " so that it gets into the cache."
        ) from error
    files = tokenizer.vocab_files_names.values()
    if Path(name).is_dir() and (missing := find_missing_vocabulary(Path(name), files)):
        kind = type(tokenizer).__name__
        raise DataError(f"tokenizer folder {name} names a {kind}, but {missing}. Copy or download them again.")
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        # What transformers makes of a model's config.json alone.
        raise DataError(f"tokenizer {name!r}: there are no tokens in it. Give a folder with its tokenizer.json.")
    return tokenizer
