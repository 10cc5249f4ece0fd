"""Rows of a source to conversations, in batches; what cannot be one is handed on with its place and reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from onecard.data.chats.conversation import BadRow, Example, PlainText
from onecard.data.chats.formats import recognise, to_example
from onecard.data.chats.rows import ChatFile, open_chat_files
from onecard.data.chats.words import quote
from onecard.data.row_files import Row, RowProblem
from onecard.data.sources import Source

# About 100 bytes of memory per character while a batch is rendered, and three batches are under way at a time.
BATCH_CHARACTERS = 400_000
BATCH_ROWS = 2_000
_ROWS_ASKED = 64


@dataclass
class ExampleBatch:
    """Examples [n] with their places and content [n]; `bad` are the rows among them that are none, with their places.

    `content` is what a hash of the row is taken of: who says what, however the file writes it.
    """

    origins: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    num_characters: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.origins) + len(self.bad)

    @property
    def is_full(self) -> bool:
        return self.num_characters >= BATCH_CHARACTERS or self.num_rows >= BATCH_ROWS


class ExampleReader:
    """Reads a source as batches of examples; `formats` are those recognised so far."""

    def __init__(self, source: Source) -> None:
        self.formats = list[str]()
        self._source = source

    def batches(self) -> Iterator[ExampleBatch]:
        """Streams the source. A file has one format, that of most of the rows looked at: its first, and a sample."""
        batch = ExampleBatch()
        for file in open_chat_files(self._source):
            for origin, found in self._examples(file):
                if isinstance(found, BadRow):
                    batch.bad.append((origin, found))
                else:
                    self._add(batch, origin, found)
                if batch.is_full:
                    yield batch
                    batch = ExampleBatch()
        if batch.origins or batch.bad:
            yield batch

    def _examples(self, file: ChatFile) -> Iterator[tuple[str, Example | BadRow]]:
        rows: Iterator[Row | RowProblem] = iter(file.rows)
        expected: str | None = None
        while block := list(islice(rows, _ROWS_ASKED)):
            if expected is None:
                expected = _most_frequent([*block, *file.sample])
                if expected is not None and expected not in self.formats:
                    self.formats.append(expected)
            for row in block:
                yield row.origin, _read(row, expected)

    def _add(self, batch: ExampleBatch, origin: str, example: Example) -> None:
        try:
            content = _content(example).encode("utf-8")
        except UnicodeEncodeError:
            batch.bad.append((origin, BadRow("not UTF-8", "its text has half a surrogate pair")))
            return
        batch.origins.append(origin)
        batch.examples.append(example)
        batch.contents.append(content)
        batch.num_characters += len(content)


def content_hash(content: bytes) -> int:
    """Gives 64 bits by which rows of the same content are found."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _content(example: Example) -> str:
    if isinstance(example, PlainText):
        return example.text
    turns = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in example.turns)
    if extras := {number: turn.extras for number, turn in enumerate(example.turns) if turn.extras}:
        turns = f"{turns}\x1d{json.dumps(extras, sort_keys=True, ensure_ascii=False)}"
    return f"{turns}\x1d{json.dumps(example.tools, sort_keys=True)}" if example.tools else turns


def _read(row: Row | RowProblem, expected: str | None) -> Example | BadRow:
    if isinstance(row, RowProblem):
        return BadRow(row.kind, row.reason)
    form = recognise(row.value)
    if form is None:
        return BadRow("unknown format", _unknown(row))
    if form != expected:
        return BadRow("mixed formats", f"this row is {form}, the file {expected}")
    return to_example(row.value, form)


def _most_frequent(rows: Iterable[Row | RowProblem]) -> str | None:
    """Names the format of most of the rows, of the earliest where several are equal; None where none has any."""
    forms = Counter(form for row in rows if isinstance(row, Row) and (form := recognise(row.value)) is not None)
    return next((form for form, _ in forms.most_common(1)), None)


def _unknown(row: Row) -> str:
    if not isinstance(row.value, dict):
        found = "null" if row.value is None else f"a bare {type(row.value).__name__}"
        return f"it is {found}, not an object or a list of turns"
    keys = ", ".join(map(quote, list(row.value)[:8])) or "no keys at all"
    return (
        f"its keys are {keys}: it has no messages, no conversations, no instruction and output, no prompt and response"
        " (or completion), no text"
    )
