"""Which text is held out for evaluation.

documents   a document goes to one side as a whole, by a hash of its content: exact duplicates never straddle
tail        the last part of every document is held out
auto        tail for a corpus of few documents, else documents
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from onecard.data.sources import Source
from onecard.data.text_files import Document
from onecard.errors import DataError

SPLIT_RULES = ("auto", "documents", "tail")
# The beginning decides, so that a document larger than memory is read once.
_HASHED_CHARACTERS = 64 * 1024


@dataclass(frozen=True)
class Split:
    """How much of a corpus is held out, and by which rule; `seed` draws another set under rule `documents`."""

    fraction: float
    rule: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise DataError(
                f"eval_fraction {self.fraction}: it is the share of the text held out for evaluation and must lie in"
                " [0, 1). Try 0.1, or 0 to hold nothing out."
            )
        if self.rule not in SPLIT_RULES:
            raise DataError(f"eval_split {self.rule!r}: the rules are {', '.join(SPLIT_RULES)}.")

    def resolve(self, documents: Iterable[Document]) -> "Split":
        """Replaces `auto` by a rule after a look at the first 2 / fraction documents."""
        if self.fraction == 0:
            return Split(0.0, "tail")
        rule = self.rule
        if rule == "auto":
            needed = round(2 / self.fraction)
            found = sum(1 for _ in islice(documents, needed))
            rule = "tail" if found < needed else "documents"
        return replace(self, rule=rule, seed=self.seed if rule == "documents" else 0)

    def holds_out(self, content: bytes) -> bool:
        """Says by a hash of its content whether a document is held out as a whole."""
        digest = hashlib.blake2b(content, digest_size=8, salt=self.seed.to_bytes(8, "little", signed=True)).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64


def find_problems(sources: Sequence[Source], fraction: float, rule: str) -> list[str]:
    """Lists what speaks against such sources and such a split, before anything is read."""
    problems = [] if sources else ["no source is given. Name a file, a folder or a data set."]
    problems += [
        f"source {source.path!r} has weight {source.weight}: a weight must be above 0. Leave the source out instead."
        for source in sources
        if not source.weight > 0
    ]
    try:
        Split(fraction, rule)
    except DataError as error:
        problems.append(str(error))
    return problems


@dataclass(frozen=True)
class Part:
    """A piece of a document that belongs to one side as a whole."""

    text: str
    is_heldout: bool


def split_document(document: Document, split: Split) -> Iterator[Part]:
    """Streams the pieces of a document with their side; `split` must be resolved."""
    if split.fraction == 0:
        yield from (Part(piece, False) for piece in document.pieces())
    elif split.rule == "documents":
        yield from _whole(document.pieces(), split)
    else:
        yield from _head_and_tail(document, split.fraction)


def _whole(pieces: Iterator[str], split: Split) -> Iterator[Part]:
    first = list[str]()
    while sum(map(len, first)) < _HASHED_CHARACTERS:
        piece = next(pieces, None)
        if piece is None:
            break
        first.append(piece)
    is_heldout = split.holds_out("".join(first)[:_HASHED_CHARACTERS].encode("utf-8"))
    yield from (Part(piece, is_heldout) for piece in chain(first, pieces))


def _head_and_tail(document: Document, fraction: float) -> Iterator[Part]:
    num_bytes = sum(len(piece.encode("utf-8")) for piece in document.pieces())
    cut = int(num_bytes * (1 - fraction))
    end = 0
    for piece in document.pieces():
        content = piece.encode("utf-8")
        start, end = end, end + len(content)
        if end <= cut or start >= cut:
            yield Part(piece, start >= cut)
            continue
        border = cut - start
        while content[border] & 0xC0 == 0x80:
            border -= 1
        for text, is_heldout in ((content[:border], False), (content[border:], True)):
            if text:
                yield Part(text.decode("utf-8"), is_heldout)
