"""Where text comes from: a name in a recipe becomes a stream of documents.

Nothing here holds a corpus: a document hands out its text in pieces, and a file is read while it is used.
"""

import errno
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from onecard.data.readers import read_hub, read_rows
from onecard.data.text_files import Document, read_text_pieces, unreadable
from onecard.errors import DataError
from onecard.spec.paths import STDLIB, expand, is_hub_name, locate

_TEXT_SUFFIXES = (
    ".txt .text .md .markdown .rst .tex .org .csv .tsv .html .htm .xml .yaml .yml .toml .ini .cfg .srt .log"
    " .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .java .js .mjs .ts .tsx .jsx .go .rs .rb .php .pl .lua .r .jl .m"
    " .swift .kt .scala .cs .fs .hs .ml .ex .erl .clj .lisp .el .vim .sh .bash .ps1 .bat .sql .css .scss .cmake .proto"
    " .tcl .vb .pas .asm .s .dart .zig .nim"
)
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
ROW_SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
}
# Not the library's own source: other packages, tests, and 0.7 MB of documentation generated into one string table.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)

# At the root of a disk, readable by nobody and without text.
_FOLDERS_OF_SYSTEMS = frozenset({"lost+found", "System Volume Information", "$RECYCLE.BIN"})


@dataclass(frozen=True)
class Source:
    """Text to train on: a file, a glob, a folder, `python-stdlib` or the name of a Hub data set.

    `weight` is the share of the batches this source gets among several; `split` and `name` (the configuration) are
    for Hub data sets, `text_column` for everything made of rows. `url` is where people can fetch a missing file.
    """

    path: str
    weight: float = 1.0
    text_column: str = "text"
    split: str = "train"
    name: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `kind` is text, json, parquet or tar, `label` its name for people."""

    path: Path
    kind: str
    label: str


@dataclass(frozen=True)
class FileList:
    """The files behind a source in a fixed order; none for a Hub data set."""

    files: tuple[SourceFile, ...]
    num_empty: int = 0

    @property
    def is_hub(self) -> bool:
        return not self.files


def list_files(source: Source) -> FileList:
    """Finds the files a source stands for; an empty list means a Hub data set.

    Raises DataError where nothing can be meant: no such file, a folder without text, only empty files.
    """
    if source.path == STDLIB:
        return _list_stdlib()
    path = locate(source.path)
    if path is not None and path.is_dir():
        return _list_folder(path)
    if path is not None and path.is_file():
        return _without_empty([SourceFile(path.absolute(), file_kind(path), path.name)], source.path)
    if glob.has_magic(source.path):
        return _list_glob(expand(source.path), source.path)
    if source.url is not None:
        raise DataError(
            f"dataset {source.path!r}: there is no such file (looked in {Path.cwd()}). Fetch it from {source.url} and"
            " save it there, or give a text of your own with --dataset."
        )
    if not is_hub_name(source.path) or _kind_by_suffix(Path(source.path)) is not None:
        raise DataError(
            f"dataset {source.path!r}: there is no such file or folder (looked in {Path.cwd()}), and it is no name that"
            " a Hub data set can have. Check the spelling, or give the full path."
        )
    return FileList(())


def open_documents(source: Source) -> Iterator[Document]:
    """Streams the documents of a source in a fixed order, without loading them.

    Raises DataError on the first file or rows that cannot be read; the problems of one row file are told together.
    """
    listing = list_files(source)
    if listing.is_hub:
        yield from read_hub(source.path, source.name, source.split, source.text_column)
        return
    for file in listing.files:
        yield from _open_file(file, source.text_column)


def file_kind(path: Path) -> str:
    """Tells by the suffix how a file is read; any unknown suffix is text."""
    return _kind_by_suffix(path) or "text"


def _open_file(file: SourceFile, text_column: str) -> Iterator[Document]:
    if file.kind == "text":
        try:
            size_bytes = file.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{file.path}: it was there when the files were listed and cannot be read now ({error.strerror})."
                " Keep the corpus in place while it is prepared, then start again."
            ) from error
        yield Document(file.label, partial(read_text_pieces, file.path), size_bytes)
        return
    yield from read_rows(file.path, file.kind, file.label, text_column)


def _kind_by_suffix(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes:
        return None
    if suffixes[-1] in ROW_SUFFIXES:
        return ROW_SUFFIXES[suffixes[-1]]
    return "text" if suffixes[-1] in TEXT_SUFFIXES else None


def _list_stdlib() -> FileList:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        SourceFile(path, "text", path.relative_to(root).as_posix())
        for path in _walk(root, _STDLIB_SKIPPED)
        if path.suffix == ".py"
    ]
    if not files:
        raise DataError(
            f"dataset {STDLIB!r}: {root} holds no .py files (an embedded Python keeps its library in a zip file)."
            " Use a full Python installation, or give a folder of your own text."
        )
    return _without_empty(files, STDLIB)


def _list_folder(folder: Path) -> FileList:
    folder = folder.absolute()
    files = []
    for path in _walk(folder, frozenset({"__pycache__", *_FOLDERS_OF_SYSTEMS})):
        kind = _kind_by_suffix(path)
        if kind is not None:
            files.append(SourceFile(path, kind, path.relative_to(folder).as_posix()))
    if not files:
        raise DataError(
            f"folder {folder}: no file in it has a suffix known as text or rows (.txt, .md, .py, .jsonl, .parquet,"
            " .tar …). Name the files by a glob, such as 'folder/*.xyz', to read another suffix as text."
        )
    return _without_empty(files, str(folder))


def _walk(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Lists the files below a folder in one order on every platform, without hidden ones."""
    found = []
    for folder, names, files in os.walk(root, onerror=_refuse_folder):
        # In place: os.walk then does not enter what is left out (site-packages can be huge).
        names[:] = [name for name in names if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _list_glob(path: Path, given: str) -> FileList:
    pattern = path.absolute()
    try:
        matches = sorted(Path(pattern.anchor).glob(pattern.relative_to(pattern.anchor).as_posix()))
        _check_folders(Path(pattern.anchor), pattern.relative_to(pattern.anchor).parts)
        files = [SourceFile(path, file_kind(path), path.name) for path in matches if path.is_file()]
    except OSError as error:
        _refuse_folder(error)
    except ValueError as error:
        raise DataError(
            f"dataset {given!r}: this is no pattern ({error}). Write `**` between slashes, as in `folder/**/*.txt`."
        ) from error
    if not files:
        raise DataError(
            f"dataset {given!r}: no file matches this pattern (looked in {Path.cwd()}). Check the spelling; `**`"
            " stands for any depth of folders."
        )
    return _without_empty(files, given)


def _check_folders(root: Path, parts: tuple[str, ...]) -> None:
    """Raises OSError for a folder that a pattern leads into and that cannot be read: globbing passes over it."""
    first = next(depth for depth, part in enumerate(parts) if glob.has_magic(part))
    for depth, part in list(enumerate(parts))[first:]:
        folders = root.glob("/".join(parts[:depth])) if depth else [root]
        if part == "**":
            for folder in folders:
                for _, names, _ in os.walk(folder, onerror=_refuse_folder):
                    names[:] = [name for name in names if name not in _FOLDERS_OF_SYSTEMS]
            return
        for folder in folders:
            if folder.is_dir() and folder.name not in _FOLDERS_OF_SYSTEMS:
                os.scandir(folder).close()
                if not os.access(folder, os.X_OK):  # its files are listed, but cannot be looked at
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(f"{unreadable(error.filename, error)} Or name the text by a pattern that leaves it out.") from error


def _without_empty(files: list[SourceFile], given: str) -> FileList:
    try:
        filled = tuple(file for file in files if file.path.stat().st_size > 0)
    except OSError as error:
        path = Path(error.filename)
        if path.is_symlink() and not isinstance(error, PermissionError):
            raise DataError(
                f"{path}: a link to {path.readlink()}, which cannot be read ({error.strerror}). Restore that file, or"
                " delete the link."
            ) from error
        raise unreadable(error.filename, error) from error
    if not filled:
        what = "the file is" if len(files) == 1 else f"all {len(files)} files are"
        raise DataError(f"dataset {given!r}: {what} empty. Give text to train on.")
    return FileList(filled, len(files) - len(filled))
