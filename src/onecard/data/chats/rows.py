"""Where chats come from: a source becomes files of rows, each row with its place."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onecard.data.row_files import Row, RowProblem, read_hub_rows, read_row_file, sample_lines
from onecard.data.sources import FileList, Source, SourceFile, list_files
from onecard.errors import DataError

_HEAD_BYTES = 1 << 20
_SUFFIXES = ".jsonl, .ndjson, .json, .parquet, .tar, each also with .gz but Parquet"


@dataclass(frozen=True)
class ChatFile:
    """A file of chats, or a Hub data set, as a stream of its rows, whatever JSON values they are.

    `sample` are a few rows from all over the file, none where they would be costly to get.
    """

    label: str
    rows: Iterator[Row] | Iterator[Row | RowProblem]
    sample: Sequence[Row | RowProblem] = ()


def list_chat_files(source: Source) -> FileList:
    """Finds the files with rows that a source stands for, none for a Hub data set; a folder's other files are left out.

    Raises DataError where there are none.
    """
    listing = list_files(source)
    if listing.is_hub:
        return listing
    files = tuple(file for file in listing.files if file.kind != "text")
    if not files:
        found = ", ".join(file.path.name for file in listing.files[:3])
        raise DataError(
            f"dataset {source.path!r}: chats are read from files of rows ({_SUFFIXES}) or a Hub data set, and there is"
            f" none here, only {found}. Write each conversation as one line of JSON, or set task: pretrain for text."
        )
    return replace(listing, files=files)


def list_all_files(sources: Iterable[Source]) -> list[tuple[Source, FileList]]:
    """Finds the files of several sources; raises DataError for all of those that have none together."""
    found, problems = [], []
    for source in sources:
        try:
            found.append((source, list_chat_files(source)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def estimate_rows(files: Sequence[SourceFile]) -> int | None:
    """Estimates the rows of files from their first megabyte, of Parquet from what it says; None where that cannot be.

    A compressed file and one that is a single list tell too little in their beginning.
    """
    counts = [_estimate_of(file) for file in files]
    return None if not counts or None in counts else sum(count for count in counts if count is not None)


def _estimate_of(file: SourceFile) -> int | None:
    try:
        if file.kind == "parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(file.path).num_rows)
        if file.path.suffix.lower() not in (".jsonl", ".ndjson"):
            return None
        size = file.path.stat().st_size
        with file.path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except (OSError, ValueError):  # which the reader is going to explain; pyarrow's errors are ValueErrors
        return None
    return max(1, round(head.count(b"\n") * size / max(1, len(head))))


def open_chat_files(source: Source) -> Iterator[ChatFile]:
    """Streams the files of a source in a fixed order; their rows are read while they are asked for.

    Broken JSON and bytes that are not UTF-8 come as a RowProblem in their place. A .json file that is one list is read
    at once, everything else in constant memory. Raises DataError for a file that is damaged as a whole or cannot be
    read.
    """
    listing = list_chat_files(source)
    if listing.is_hub:
        yield ChatFile(source.path, read_hub_rows(source.path, source.name, source.split))
    for file in listing.files:
        yield ChatFile(file.label, read_row_file(file.path, file.kind, file.label), sample_lines(file.path))
