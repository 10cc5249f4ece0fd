"""Files made of rows, and Hub data sets: each row's text column is a document."""

import difflib
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from onecard.data.sources import Document
from onecard.data.text_files import binary_file, cut_text, open_bytes, unreadable
from onecard.errors import DataError

_PROBLEMS_SHOWN = 5


class _RowProblem(Exception):
    """A row that cannot be used; collected so that one message tells several."""


def read_rows(path: Path, kind: str, label: str, text_column: str) -> Iterator[Document]:
    """Streams the rows of a .jsonl, .json, .parquet or .tar file as documents.

    A .json file that holds one list is read at once; everything else in constant memory. After a bad row no more
    documents come, but the file is read on so that one DataError names up to five bad rows.
    """
    reader: Callable[[Path, str, str], Iterator[Document | _RowProblem]]
    reader = {"json": _json_documents, "parquet": _parquet_documents, "tar": _tar_documents}[kind]
    try:
        yield from _collect_problems(path, reader(path, label, text_column))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged archive ({error}). Fetch or pack it again.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_hub(path: str, name: str | None, split: str, text_column: str) -> Iterator[Document]:
    """Streams a data set of the Hugging Face Hub, or of its local cache when offline, row by row.

    Downloads once into the cache of `datasets` and reads memory-mapped. Raises DataError that says what was tried.
    """
    rows = _load_hub(path, name, split)
    _require_column(path, rows.column_names, text_column)
    texts = ((f"{path}[{index}]", text) for index, text in _numbered_texts(rows, text_column))
    yield from _collect_problems(Path(path), (_document(origin, text, text_column) for origin, text in texts))


def hub_content(path: str, name: str | None, split: str) -> str:
    """Describes the content of a Hub data set: the revisions its cached files stand for, and the number of rows."""
    rows = _load_hub(path, name, split)
    return json.dumps([sorted(file["filename"] for file in rows.cache_files), rows.num_rows])


def _load_hub(path: str, name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(
            f"dataset {path!r}: it is no file, no folder and no pattern that matches (looked in {Path.cwd()}), and as a"
            f" Hub data set (configuration {name!r}, split {split!r}) it cannot be loaded: {reason}. Check the name,"
            " or be online once so that it gets into the cache."
        ) from error


def _numbered_texts(rows: Any, text_column: str) -> Iterator[tuple[int, object]]:
    index = 0
    for batch in rows.select_columns([text_column]).iter(batch_size=256):
        for text in batch[text_column]:
            yield index, text
            index += 1


def _collect_problems(path: Path, entries: Iterable[Document | _RowProblem]) -> Iterator[Document]:
    problems: list[str] = []
    for entry in entries:
        if isinstance(entry, _RowProblem):
            problems.append(str(entry))
            if len(problems) == _PROBLEMS_SHOWN:
                break
        elif not problems:
            yield entry
    if problems:
        more = " (and maybe more)" if len(problems) == _PROBLEMS_SHOWN else ""
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"{path}: rows that cannot be used{more}; mend or remove them:{lines}")


def _document(origin: str, text: object, text_column: str) -> Document | _RowProblem:
    if not isinstance(text, str):
        shown = "null" if text is None else f"{type(text).__name__} {_shown(text)}"
        return _RowProblem(f"{origin}: {text_column!r} is {shown}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return _RowProblem(f"{origin}: {text_column!r} has half a surrogate pair at character {error.start}")
    if "\0" in text:
        return _RowProblem(f"{origin}: {text_column!r} has a NUL at character {text.index(chr(0))}: it is no text")
    return Document(origin, partial(cut_text, text))


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:40])
    except (ValueError, RecursionError):  # more digits than Python writes, or nested too deeply
        return "that cannot be shown"


def _row_document(origin: str, row: object, text_column: str) -> Document | _RowProblem:
    if not isinstance(row, dict):
        return _RowProblem(f"{origin}: a row must be an object like {{{text_column!r}: …}}, this is {_shown(row)}")
    if text_column not in row:
        return _RowProblem(f"{origin}: {_missing_column(list(row), text_column)}")
    return _document(origin, row[text_column], text_column)


def _missing_column(columns: list[str], text_column: str) -> str:
    near = difflib.get_close_matches(text_column, columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; set text_column to one of them"
    return f"no column {text_column!r} among {', '.join(map(repr, columns)) or 'no columns at all'}{hint}"


def _require_column(origin: object, columns: list[str], text_column: str) -> None:
    if text_column not in columns:
        raise DataError(f"{origin}: {_missing_column(columns, text_column)}")


def _json_documents(path: Path, label: str, text_column: str) -> Iterator[Document | _RowProblem]:
    with open_bytes(path) as stream:
        head = stream.read(64)
    if b"\0" in head:
        raise binary_file(path, head.index(0))
    if re.match(rb"(\xef\xbb\xbf)?\s*\[", head) is not None:
        yield from _json_list_documents(path, label, text_column)
        return
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            origin = f"{label}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield _row_document(origin, json.loads(text), text_column)
            except UnicodeDecodeError as error:
                yield _RowProblem(f"{origin}: not UTF-8 at byte {error.start} of the line")
            except (ValueError, RecursionError) as error:
                if number == 1 and _ends_too_early(error) and next(stream, b""):
                    raise DataError(
                        f"{path}: the object that begins in its first line goes on in the next. Write every row as one"
                        f" line, {{{text_column!r}: …}}, or all rows as one list, [{{…}}, {{…}}]."
                    ) from error
                yield _RowProblem(f"{origin}: {_json_problem(error)}")


def _ends_too_early(error: ValueError | RecursionError) -> bool:
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc)


def _line(error: ValueError | RecursionError) -> str:
    return f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at character {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return "JSON with a number of too many digits"


def _json_list_documents(path: Path, label: str, text_column: str) -> Iterator[Document | _RowProblem]:
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte offset {error.start:,}. Save it again as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}{_line(error)}: {_json_problem(error)}. Mend it.") from error
    for index, row in enumerate(rows):
        yield _row_document(f"{label}[{index}]", row, text_column)


def _parquet_documents(path: Path, label: str, text_column: str) -> Iterator[Document | _RowProblem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or damaged ({error}). Fetch or write it again.") from error
    with file:
        _require_column(path, file.schema_arrow.names, text_column)
        row = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                for cell in batch.column(0):
                    yield _cell_document(f"{label}[{row}]", cell, text_column)
                    row += 1
        except pa.ArrowException as error:
            raise DataError(f"{path}: damaged after row {row} ({error}). Fetch or write it again.") from error


def _cell_document(origin: str, cell: Any, text_column: str) -> Document | _RowProblem:
    try:
        return _document(origin, cell.as_py(), text_column)
    except UnicodeDecodeError as error:
        return _RowProblem(f"{origin}: {text_column!r} is not UTF-8 at byte {error.start}")


def _tar_documents(path: Path, label: str, text_column: str) -> Iterator[Document | _RowProblem]:
    num_documents = 0
    with tarfile.open(path, mode="r|*") as archive:
        for members in _samples(archive):
            # Beside a text, JSON holds what is known about it.
            plain = {name: content for name, content in members.items() if name.endswith(".txt")}
            for name, content in (plain or members).items():
                num_documents += 1
                yield _member_document(f"{label}:{name}", content, text_column)
    if num_documents == 0:
        raise DataError(
            f"{path}: no member of this archive is a .txt or .json file. A text shard needs one per sample."
        )


def _member_document(origin: str, content: bytes, text_column: str) -> Document | _RowProblem:
    try:
        text = content.decode("utf-8-sig")
        if origin.endswith(".txt"):
            return _document(origin, text.replace("\r\n", "\n"), "text")
        return _row_document(origin, json.loads(text), text_column)
    except UnicodeDecodeError as error:
        return _RowProblem(f"{origin}: not UTF-8 at byte offset {error.start:,}")
    except (ValueError, RecursionError) as error:
        return _RowProblem(f"{origin}{_line(error)}: {_json_problem(error)}")


def _samples(archive: tarfile.TarFile) -> Iterator[dict[str, bytes]]:
    """Groups neighbouring .txt and .json members by key (path up to the first dot of the name), as in WebDataset."""
    current, members = "", dict[str, bytes]()
    for info in archive:
        path = PurePosixPath(info.name)
        if not info.isfile() or path.name.startswith(".") or path.suffix not in (".txt", ".json"):
            continue
        key = (path.parent / path.name.partition(".")[0]).as_posix()
        if key != current and members:
            yield members
            members = {}
        stream = archive.extractfile(info)
        current, members[path.as_posix()] = key, stream.read() if stream else b""
    if members:
        yield members
