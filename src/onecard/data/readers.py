"""Files made of rows, and Hub data sets: each row's text column is a document."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from onecard.data.row_files import Row, RowProblem, missing_column, read_hub_rows, read_row_file
from onecard.data.text_files import Document, cut_text
from onecard.errors import DataError

_PROBLEMS_SHOWN = 5


def read_rows(path: Path, kind: str, label: str, text_column: str) -> Iterator[Document]:
    """Streams the rows of a .jsonl, .json, .parquet or .tar file as documents.

    After a bad row no more documents come, but the file is read on so that one DataError names up to five bad rows.
    """
    return _collect_problems(path, read_row_file(path, kind, label, (text_column,)), text_column)


def read_hub(path: str, name: str | None, split: str, text_column: str) -> Iterator[Document]:
    """Streams a data set of the Hugging Face Hub as documents, as `read_hub_rows` reads it."""
    return _collect_problems(Path(path), read_hub_rows(path, name, split, (text_column,)), text_column)


def _collect_problems(path: Path, rows: Iterable[Row | RowProblem], text_column: str) -> Iterator[Document]:
    problems: list[str] = []
    for row in rows:
        entry = row if isinstance(row, RowProblem) else _document(row, text_column)
        if isinstance(entry, RowProblem):
            problems.append(str(entry))
            if len(problems) == _PROBLEMS_SHOWN:
                break
        elif not problems:
            yield entry
    if problems:
        more = " (and maybe more)" if len(problems) == _PROBLEMS_SHOWN else ""
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"{path}: rows that cannot be used{more}; mend or remove them:{lines}")


def _document(row: Row, text_column: str) -> Document | RowProblem:
    if not isinstance(row.value, dict):
        reason = f"a row must be an object like {{{text_column!r}: …}}, this is {_shown(row.value)}"
        return RowProblem(row.origin, "no object", reason)
    if text_column not in row.value:
        return RowProblem(row.origin, "no such column", missing_column(list(row.value), text_column))
    text = row.value[text_column]
    if not isinstance(text, str):
        shown = "null" if text is None else f"{type(text).__name__} {_shown(text)}"
        return RowProblem(row.origin, "no string", f"{text_column!r} is {shown}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"{text_column!r} has half a surrogate pair at character {error.start}"
        return RowProblem(row.origin, "not UTF-8", reason)
    if "\0" in text:
        reason = f"{text_column!r} has a NUL at character {text.index(chr(0))}: it is no text"
        return RowProblem(row.origin, "no text", reason)
    return Document(row.origin, partial(cut_text, text))


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:40])
    except (ValueError, RecursionError):  # more digits than Python writes, or nested too deeply
        return "that cannot be shown"
