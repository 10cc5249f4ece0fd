"""How large a corpus is, without preparing it: exactly where that was done before, else estimated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from onecard.data.chats.corpus import ChatCorpus, ChatRequest, prepare_chats
from onecard.data.corpus import Corpus, CorpusRequest, prepare
from onecard.data.fingerprint import Progress
from onecard.data.sources import Source, list_files
from onecard.data.tokenizer import TRAINED_KINDS, vocabulary_size
from onecard.data.tokenizer_files import load_tokenizer
from onecard.errors import DataError

# UTF-8 bytes per token, to judge how long a run takes. BPE of 8,192 to 50,257 words gave 2.9 to 4.3 on English, Chinese
# and Python source.
_BYTES_PER_TOKEN = {"bytes": 1.0, "char": 1.0, "bpe": 3.5}
_BYTES_PER_TOKEN_OF_OTHERS = 4.0
# Characters of a text in one script; only its embedding depends on it.
_CHARACTERS = 128


@dataclass(frozen=True)
class Survey:
    """Sizes of a corpus that may not have been prepared; zero tokens where nothing can be told."""

    vocab_size: int
    num_train_tokens: int
    num_heldout_tokens: int
    train_bytes: int
    heldout_bytes: int


_Request = TypeVar("_Request")
_Prepared = TypeVar("_Prepared")


class _NotPreparedError(Exception):
    pass


def find_prepared(request: CorpusRequest) -> Corpus | None:
    """Opens a corpus that an earlier call prepared from the same text; None where work would have to be done.

    Raises:
        DataError: the text cannot be used.
    """

    return _without_work(prepare, request)


def find_prepared_chats(request: ChatRequest) -> ChatCorpus | None:
    """Opens chats that an earlier call prepared from the same rows; None where work would have to be done.

    Raises:
        DataError: the chats cannot be used.
    """
    return _without_work(prepare_chats, request)


def _without_work(prepare: Callable[[_Request, Progress], _Prepared], request: _Request) -> _Prepared | None:
    def refuse(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        raise _NotPreparedError

    try:
        return prepare(request, refuse)
    except _NotPreparedError:
        return None


def survey(request: CorpusRequest) -> Survey:
    """Estimates a corpus from the sizes of its files. Reads none of them."""
    train_bytes = sum(map(_num_bytes, request.sources))
    heldout_bytes = sum(map(_num_bytes, request.eval_sources))
    if not request.eval_sources:
        heldout_bytes = int(train_bytes * request.eval_fraction)
        train_bytes -= heldout_bytes
    per_token = _BYTES_PER_TOKEN.get(request.tokenizer, _BYTES_PER_TOKEN_OF_OTHERS)
    return Survey(
        vocab_size=_vocabulary(request),
        num_train_tokens=int(train_bytes / per_token),
        num_heldout_tokens=int(heldout_bytes / per_token),
        train_bytes=train_bytes,
        heldout_bytes=heldout_bytes,
    )


def _num_bytes(source: Source) -> int:
    try:
        return sum(file.path.stat().st_size for file in list_files(source).files)
    except (DataError, OSError):
        return 0  # not on this machine: a plan for a card needs no text


def _vocabulary(request: CorpusRequest) -> int:
    if request.tokenizer == "bpe":
        return request.vocab_size or 257
    if request.tokenizer in TRAINED_KINDS:
        return 257 if request.tokenizer == "bytes" else _CHARACTERS
    return vocabulary_size(load_tokenizer(request.tokenizer))
