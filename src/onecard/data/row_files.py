"""Files made of rows, and Hub data sets: a stream of rows, each with its place; what is no row is told in its place.

text documents (`readers`) and chats (`chats.rows`) read through here.
"""

import difflib
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from onecard.data.json_text import JSON_ERRORS, explain_json, parse_json
from onecard.data.text_files import binary_file, open_bytes, unreadable
from onecard.errors import DataError

_ROWS_AT_ONCE = 256
# 2 ms for a file of 244 MB (LOG.md): what decides is the whole of it, not its first rows.
_PLACES_SAMPLED, _ROWS_AT_A_PLACE = 32, 8
# What bytes that are no UTF-8 become under the error handler `surrogateescape`.
_COLUMNS_OF_CHATS = frozenset(("messages", "conversations", "instruction", "prompt"))
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Row:
    """One row as it was parsed, with its place for people: `rows.jsonl:17`, `rows.parquet[3]`."""

    origin: str
    value: Any


@dataclass(frozen=True)
class RowProblem:
    """A place where there is no row to use; `kind` groups such places, `reason` is for people."""

    origin: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def read_row_file(path: Path, kind: str, label: str, columns: tuple[str, ...] = ()) -> Iterator[Row | RowProblem]:
    """Streams the rows of a .jsonl, .json, .parquet or .tar file; `columns` are those that must be there, () for all.

    A .json file that holds one list is read at once; everything else in constant memory. A .txt member of a tar file
    becomes a row of the first column. Raises DataError for a file that cannot be read, or that is damaged as a whole.
    """
    reader: Callable[[Path, str, tuple[str, ...]], Iterator[Row | RowProblem]]
    reader = {"json": _json_rows, "parquet": _parquet_rows, "tar": _tar_rows}[kind]
    try:
        yield from reader(path, label, columns)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged archive ({error}). Fetch or pack it again.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_hub_rows(path: str, name: str | None, split: str, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """Streams a data set of the Hugging Face Hub, or of its local cache when offline, row by row.

    Downloads once into the cache of `datasets` and reads memory-mapped. Raises DataError that says what was tried.
    """
    rows = _load_hub(path, name, split)
    _require_columns(path, rows.column_names, columns)
    names = list(columns or rows.column_names)
    index = 0
    for batch in rows.select_columns(names).iter(batch_size=_ROWS_AT_ONCE):
        for cells in zip(*(batch[column] for column in names), strict=True):
            yield Row(f"{path}[{index}]", dict(zip(names, cells, strict=True)))
            index += 1


def hub_content(path: str, name: str | None, split: str) -> str:
    """Describes the content of a Hub data set: the revisions its cached files stand for, and the number of rows."""
    rows = _load_hub(path, name, split)
    return json.dumps([sorted(file["filename"] for file in rows.cache_files), rows.num_rows])


def missing_column(columns: list[str], wanted: str) -> str:
    """Says that a column is not among those there are, and which may be meant."""
    near = difflib.get_close_matches(wanted, columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; set text_column to one of them"
    if not _COLUMNS_OF_CHATS.isdisjoint(columns):
        hint += ", or for chats task to sft and model_name_or_path to the model to start from"
    return f"no column {wanted!r} among {', '.join(map(repr, columns)) or 'no columns at all'}{hint}"


def _require_columns(origin: object, columns: list[str], wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in columns:
            raise DataError(f"{origin}: {missing_column(columns, column)}")


def _load_hub(path: str, name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(
            f"dataset {path!r}: it is no file, no folder and no pattern that matches (looked in {Path.cwd()}), and as a"
            f" Hub data set (configuration {name!r}, split {split!r}) it cannot be loaded: {reason}. Check the name,"
            " be online once so that it gets into the cache, or give files of your own by --dataset."
        ) from error


def _json_rows(path: Path, label: str, columns: tuple[str, ...]) -> Iterator[Row | RowProblem]:
    with open_bytes(path) as stream:
        head = stream.read(64)
    if b"\0" in head:
        raise binary_file(path, head.index(0))
    is_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", head) is not None and not _has_a_list_per_line(path)
    yield from _listed_rows(path, label) if is_list else _line_rows(path, label, columns)


def _has_a_list_per_line(path: Path) -> bool:
    with open_bytes(path) as stream:
        first = stream.readline()
        return any(map(bytes.strip, stream)) and not isinstance(_parse_line("", first), RowProblem)


def _line_rows(path: Path, label: str, columns: tuple[str, ...]) -> Iterator[Row | RowProblem]:
    with open_bytes(path) as stream:
        first = stream.readline()
        second = stream.readline()
        found = _parse_line(f"{label}:1", first)
        goes_on = _breaks_off(first) and second and isinstance(_parse_line("", second), RowProblem)
        if isinstance(found, RowProblem) and goes_on:
            example = "{…}" if not columns else f"{{{columns[0]!r}: …}}"
            raise DataError(
                f"{path}: the object that begins in its first line goes on in the next. Write every row as one line,"
                f" {example}, or all rows as one list, [{{…}}, {{…}}]."
            )
        if found is not None:
            yield found
        if (found := _parse_line(f"{label}:2", second)) is not None:
            yield found
        for number, line in enumerate(stream, start=3):
            if (found := _parse_line(f"{label}:{number}", line)) is not None:
                yield found


def sample_lines(path: Path) -> list[Row | RowProblem]:
    """Reads a few rows at each of several places all over a file of JSON lines; nothing of a compressed one."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return []
    found = []
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            for place in range(_PLACES_SAMPLED):
                stream.seek(size * place // _PLACES_SAMPLED)
                if place:
                    stream.readline()  # the rest of a row
                found += [_parse_line("", line) for line in islice(stream, _ROWS_AT_A_PLACE)]
    except OSError:  # which the reader of the whole explains
        return []
    return [row for row in found if row is not None]


def _parse_line(origin: str, line: bytes) -> Row | RowProblem | None:
    try:
        text = line.decode("utf-8-sig").strip()
        return Row(origin, parse_json(text)) if text else None
    except UnicodeDecodeError as error:
        return RowProblem(origin, "not UTF-8", f"not UTF-8 at byte {error.start} of the line")
    except JSON_ERRORS as error:
        return RowProblem(origin, "broken JSON", explain_json(error))


def _breaks_off(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig").strip())
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        pass
    return False


def _line_number(error: ValueError | RecursionError) -> str:
    return f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""


def _listed_rows(path: Path, label: str) -> Iterator[Row | RowProblem]:
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        text, is_utf8 = content.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        text, is_utf8 = content.decode("utf-8-sig", errors="surrogateescape"), False
    del content
    try:
        rows = parse_json(text)
    except JSON_ERRORS as error:
        raise DataError(f"{path}{_line_number(error)}: {explain_json(error)}. Mend it.") from error
    for index, row in enumerate(rows):
        origin = f"{label}[{index}]"
        if is_utf8 or not _ESCAPED_BYTE.search(json.dumps(row, ensure_ascii=False)):
            yield Row(origin, row)
        else:
            yield RowProblem(origin, "not UTF-8", "it holds bytes that are not UTF-8: save the file again as UTF-8")


def _parquet_rows(path: Path, label: str, columns: tuple[str, ...]) -> Iterator[Row | RowProblem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or damaged ({error}). Fetch or write it again.") from error
    with file:
        _require_columns(path, file.schema_arrow.names, columns)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns) or None):
                names = batch.schema.names
                for cells in zip(*batch.columns, strict=True):
                    yield _cells_row(f"{label}[{number}]", names, cells)
                    number += 1
        except pa.ArrowException as error:
            raise DataError(f"{path}: damaged after row {number} ({error}). Fetch or write it again.") from error


def _cells_row(origin: str, names: list[str], cells: tuple[Any, ...]) -> Row | RowProblem:
    row = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            row[name] = cell.as_py()
        except UnicodeDecodeError as error:
            return RowProblem(origin, "not UTF-8", f"{name!r} is not UTF-8 at byte {error.start}")
    return Row(origin, row)


class _Member(tarfile.TarInfo):
    """A member whose header must be whole: `tarfile` takes a damaged one, or a cut archive, for the end of it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark at the end, a class that typeshed does not know
                raise
            raise tarfile.ReadError(f"it breaks off or is damaged at byte {archive.offset:,}: {error}") from error


def _tar_rows(path: Path, label: str, columns: tuple[str, ...]) -> Iterator[Row | RowProblem]:
    num_rows = 0
    with tarfile.open(path, mode="r|*", tarinfo=_Member) as archive:
        for members in _samples(archive):
            # Beside a text, JSON holds what is known about it.
            plain = {name: content for name, content in members.items() if name.endswith(".txt")}
            for name, content in (plain or members).items():
                num_rows += 1
                yield _member_row(f"{label}:{name}", content, columns[0] if columns else "text")
    if num_rows == 0:
        raise DataError(
            f"{path}: no member of this archive is a .txt or .json file. A text shard needs one per sample."
        )


def _member_row(origin: str, content: bytes, text_column: str) -> Row | RowProblem:
    try:
        text = content.decode("utf-8-sig")
        if origin.endswith(".txt"):
            return Row(origin, {text_column: text.replace("\r\n", "\n")})
        return Row(origin, parse_json(text))
    except UnicodeDecodeError as error:
        return RowProblem(origin, "not UTF-8", f"not UTF-8 at byte offset {error.start:,}")
    except JSON_ERRORS as error:
        return RowProblem(f"{origin}{_line_number(error)}", "broken JSON", explain_json(error))


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
