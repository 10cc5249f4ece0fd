"""What a source is (identity) and what is in it (content), so that a prepared corpus is reused or rebuilt rightly."""

import glob
import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from onecard.data.cache import is_read_only, read_sealed, short_hash, write_sealed
from onecard.data.sources import FileList, Source, SourceFile, list_files
from onecard.data.text_files import read_text_pieces, unreadable
from onecard.errors import DataError
from onecard.spec.paths import STDLIB, expand, locate

Progress = Callable[[str, int, int | None], None]
_PROBLEMS_SHOWN = 10
_HUB = "hub:"


@dataclass(frozen=True)
class FileRecord:
    """One file of a source as it was when it was hashed."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Fingerprint:
    """A source with the hash of its content; `text_bytes` is known where every file is plain text."""

    source: Source
    identity: dict[str, str | None]
    records: tuple[FileRecord, ...]
    content_hash: str
    num_empty_files: int = 0
    text_bytes: int | None = None

    def check_unchanged(self) -> None:
        """Raises DataError where a file is no longer what was hashed, so that no text is stored under a wrong hash."""
        for record in self.records:
            if record.path.startswith(_HUB):
                continue
            found = locate(record.path)
            status = found.stat() if found else None
            if status is None or (status.st_size, status.st_mtime_ns) != (record.size_bytes, record.mtime_ns):
                raise DataError(
                    f"{record.path}: it has changed while it was prepared. Let nothing write to it, and start again."
                )


def fingerprint_source(
    source: Source, cache_root: Path, progress: Progress | None = None, listing: FileList | None = None
) -> Fingerprint:
    """Hashes the files of a source and checks that text files are UTF-8; raises one DataError for all bad files.

    `listing`: the files of the source where not all of them are read. Hashes are remembered: a file is read again only
    when its size or time of change differs. A Hub data set is taken as it was when first prepared, so that a second
    start needs no network.
    """
    identity = _identity(source)
    listing = listing or list_files(source)
    memory = cache_root / "sources" / f"{short_hash(identity)}.json"
    known = _recall(memory)
    if listing.is_hub:
        records = tuple(known.values()) or (_record_hub(source),)
    else:
        records = _record_files(listing, known, progress)
    if records != tuple(known.values()):
        _remember(memory, records)
    is_plain = all(file.kind == "text" and file.path.suffix.lower() != ".gz" for file in listing.files)
    return Fingerprint(
        source=source,
        identity=identity,
        records=records,
        content_hash=hashlib.sha256("".join(record.sha256 for record in records).encode("ascii")).hexdigest(),
        num_empty_files=listing.num_empty,
        text_bytes=sum(record.size_bytes for record in records) if listing.files and is_plain else None,
    )


def _identity(source: Source) -> dict[str, str | None]:
    if source.path == STDLIB:
        place = f"{STDLIB}:{sysconfig.get_paths()['stdlib']}"
    else:
        path = locate(source.path) or expand(source.path)
        # A Hub name keeps its spelling; a pattern has no existing path, but depends on the working folder all the same.
        is_local = locate(source.path) is not None or glob.has_magic(source.path)
        place = str(path.absolute()) if is_local else source.path
    return {"path": place, "text_column": source.text_column, "split": source.split, "name": source.name}


def _recall(memory: Path) -> dict[str, FileRecord]:
    try:
        return {entry["path"]: FileRecord(**entry) for entry in read_sealed(memory)}
    except (OSError, ValueError, TypeError, KeyError):
        # Only a memory of hashes: without it the files are hashed again.
        return {}


def _remember(memory: Path, records: tuple[FileRecord, ...]) -> None:
    try:
        write_sealed(memory, [asdict(record) for record in records])
    except OSError as error:
        # A cache that may only be read: the files are then hashed again at every start.
        if not is_read_only(error):
            raise


def _record_hub(source: Source) -> FileRecord:
    from onecard.data.row_files import hub_content

    digest = hashlib.sha256(hub_content(source.path, source.name, source.split).encode("utf-8"))
    return FileRecord(f"{_HUB}{source.path}", 0, 0, digest.hexdigest())


def _record_files(listing: FileList, known: dict[str, FileRecord], progress: Progress | None) -> tuple[FileRecord, ...]:
    records, problems = list[FileRecord](), list[str]()
    done_bytes = 0
    total_bytes: int | None = None
    for file in listing.files:
        try:
            status = file.path.stat()
            record = known.get(str(file.path))
            if record is None or (record.size_bytes, record.mtime_ns) != (status.st_size, status.st_mtime_ns):
                if progress is not None:
                    total_bytes = total_bytes or sum(other.path.stat().st_size for other in listing.files)
                    progress("checking files", done_bytes, total_bytes)
                record = FileRecord(str(file.path), status.st_size, status.st_mtime_ns, _hash_file(file))
            done_bytes += status.st_size
            records.append(record)
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(str(unreadable(file.path, error)))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        more = f"\n  … and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
        lines = "".join(f"\n  - {problem}" for problem in problems[:_PROBLEMS_SHOWN])
        total = len(listing.files) + listing.num_empty
        empty = f" (and {listing.num_empty} empty)" if listing.num_empty else ""
        raise DataError(f"{len(problems)} of {total} files cannot be used{empty}:{lines}{more}")
    return tuple(records)


def _hash_file(file: SourceFile) -> str:
    digest = hashlib.sha256()
    if file.kind == "text":
        for _ in read_text_pieces(file.path, on_bytes=digest.update):
            pass
        return digest.hexdigest()
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
