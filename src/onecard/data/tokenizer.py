"""Text to ids: train a tokenizer, encode with all cores.

Whatever the kind, it is an ordinary `transformers` tokenizer whose folder any other tool opens.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from onecard.errors import DataError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TRAINED_KINDS = ("bpe", "char", "bytes")
END_OF_TEXT = "<|endoftext|>"
_BYTE_VOCAB = 257


def train_tokenizer(kind: str, pieces: Iterable[str], vocab_size: int | None = None) -> "PreTrainedTokenizerFast":
    """Trains a `bpe`, `char` or `bytes` tokenizer on pieces of text; the end-of-text token has id 0.

    `vocab_size` counts every token and is reached exactly. `bytes` reads nothing. Training BPE is deterministic, takes
    about 0.2 s per MB on two cores and memory in proportion to the number of different words.
    """
    if kind == "bpe":
        backend = _train_bpe(pieces, vocab_size)
    elif kind == "char":
        backend = _plain_vocabulary(sorted(_characters(pieces)))
    elif kind == "bytes":
        backend = _byte_vocabulary()
    else:
        raise DataError(f"tokenizer {kind!r} cannot be trained; the kinds are {', '.join(TRAINED_KINDS)}.")
    size = backend.get_vocab_size()
    if vocab_size is not None and size != vocab_size:
        raise DataError(_vocabulary_mismatch(kind, vocab_size, size))
    return as_transformers(backend, END_OF_TEXT)


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Gives the id that stands before every document: end-of-text, else begin, separator or padding token."""
    for token_id in (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    ):
        if token_id is not None:
            return int(token_id)
    raise DataError(
        f"tokenizer {tokenizer.name_or_path!r}: it has no end-of-text, begin, separator or padding token, so documents"
        " cannot be kept apart. Add one (tokenizer.add_special_tokens) and save it again."
    )


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Counts the rows an embedding needs: the highest id plus one, also where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hashes everything that decides how text becomes ids."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["padding"] = content["truncation"] = None
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    content["separator_id"] = separator_id(tokenizer)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def encode_pieces(tokenizer: "PreTrainedTokenizerBase", pieces: list[str]) -> list[np.ndarray]:
    """Encodes each piece of text to int64 ids, on all cores, without adding special tokens.

    Text that spells a special token is encoded as ordinary text. Raises DataError for a character that a character
    tokenizer does not know.
    """
    if not tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [np.asarray(tokenizer.encode(piece, **options), dtype=np.int64) for piece in pieces]
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    encoded = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
    if drops_unknown(backend):
        _refuse_unknown(backend, pieces, encoded)
    return encoded


@contextmanager
def limit_threads(num_proc: int | None) -> Iterator[None]:
    """Makes the Rust tokenizers use `num_proc` threads inside the block; None leaves them all cores.

    Their thread pool gets its size once per process, so a number that comes too late is refused (InputError).
    """
    if num_proc is None:
        global _pool_size
        _pool_size = _pool_size or _default_pool_size()
        yield
        return
    _claim_pool(num_proc)
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false" if num_proc == 1 else "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_pool_size: int | None = None


def _default_pool_size() -> int:
    given = os.environ.get("RAYON_NUM_THREADS") or "0"
    if not (given.isascii() and given.isdecimal()):
        raise InputError(
            f"RAYON_NUM_THREADS={given!r}: it is the number of threads of the tokenizer and must be a whole number."
            " Set it to one, or unset it to use all cores."
        )
    return int(given) or os.cpu_count() or 1


def _claim_pool(num_proc: int) -> None:
    global _pool_size
    if num_proc < 1:
        raise InputError(f"num_proc {num_proc}: at least one process is needed. Leave it out to use all cores.")
    if num_proc == 1 or num_proc == _pool_size:
        return
    if _pool_size is not None:
        raise InputError(
            f"num_proc {num_proc}: this process already runs its tokenizer with {_pool_size} threads, and their number"
            " cannot change. Set num_proc to 1, leave it out, or start a new process."
        )
    os.environ["RAYON_NUM_THREADS"] = str(num_proc)
    _pool_size = num_proc


def _train_bpe(pieces: Iterable[str], vocab_size: int | None) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size is None or vocab_size < _BYTE_VOCAB:
        raise DataError(
            f"vocab_size {vocab_size}: a byte-level BPE tokenizer needs at least {_BYTE_VOCAB} (256 bytes and the"
            f" end-of-text token). Set vocab_size, for example to 8192, or use tokenizer 'bytes'."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(pieces, trainer)
    return backend


def _characters(pieces: Iterable[str]) -> set[str]:
    found = set[str]()
    for piece in pieces:
        found.update(piece)
    return found


def _plain_vocabulary(symbols: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, *symbols])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return backend


def _byte_vocabulary() -> "Tokenizer":
    from tokenizers import decoders, pre_tokenizers

    backend = _plain_vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def as_transformers(backend: "Tokenizer", end: str | None) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, clean_up_tokenization_spaces=False
    )


def _vocabulary_mismatch(kind: str, vocab_size: int, size: int) -> str:
    if kind == "bpe":
        return (
            f"vocab_size {vocab_size:,}: this corpus supports at most {size:,} tokens (no other pair of symbols occurs"
            f" twice). Set vocab_size to {size} or less, or give more text."
        )
    return (
        f"vocab_size {vocab_size:,}: a {kind!r} tokenizer has exactly {size:,} tokens here. Leave vocab_size out, or"
        " use tokenizer 'bpe'."
    )


def drops_unknown(backend: "Tokenizer") -> bool:
    """True for a BPE model that skips characters without a token: no byte fallback, no bytes before it."""
    from tokenizers import models

    model = backend.model
    return (
        isinstance(model, models.BPE)
        and backend.pre_tokenizer is None
        and backend.normalizer is None
        and (not model.byte_fallback and model.unk_token is None)
    )


def _refuse_unknown(backend: "Tokenizer", pieces: list[str], encoded: list[np.ndarray]) -> None:
    for piece, ids in zip(pieces, encoded, strict=True):
        if len(ids) == len(piece):
            continue
        unknown = sorted({character for character in piece if backend.token_to_id(character) is None})
        shown = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in unknown[:5])
        raise DataError(
            f"the character tokenizer does not know {shown}{' …' if len(unknown) > 5 else ''}: its vocabulary is the"
            " characters of the text it was made from. Use only those, or tokenizer 'bytes' or 'bpe'."
        )
