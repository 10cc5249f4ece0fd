"""The cache folder: where it is, how folders in it are named, locked and written."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onecard.errors import DataError
from onecard.spec.moving import move
from onecard.spec.paths import expand
from onecard.units import format_bytes

log = logging.getLogger("onecard.data")


def cache_folder(given: Path | None = None) -> Path:
    """Gives the folder for prepared text: the one given, else $ONECARD_CACHE, else ~/.cache/onecard.

    Raises DataError for a path that is not UTF-8: the tokenizers' Rust side cannot write there.
    """
    folder = expand(given or os.environ.get("ONECARD_CACHE") or "~/.cache/onecard").absolute()
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"cache folder {str(folder)!a}: its name is not UTF-8, and tokenizers cannot be saved there. Set"
            " ONECARD_CACHE to a folder with another name."
        ) from error
    return folder


def short_hash(content: object) -> str:
    """Gives 12 hex digits for any JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file beside its place and renames it there, so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    # The name of a file may hold bytes that are no UTF-8: they come out as they went in.
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8", errors="surrogateescape")
    move(beside, path)


def write_sealed(path: Path, content: object) -> None:
    """Writes a JSON file that `read_sealed` recognises as whole."""
    write_json(path, {"seal": short_hash(content), "content": content})


def read_sealed(path: Path) -> Any:
    """Reads what `write_sealed` wrote; raises ValueError where anything in it has changed, by a fault or by hand."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict) or found.get("seal") != short_hash(found.get("content")):
        raise ValueError("it is not as it was written")
    return found["content"]


def slug(path: str) -> str:
    """Makes a short folder name that says where a corpus comes from."""
    words = re.sub(r"[^\w-]+", "-", Path(path).name).strip("-")
    return words[:40] or "corpus"


def is_read_only(error: OSError) -> bool:
    """Says whether a place may not be written, rather than being full or broken."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def locked(folder: Path) -> Iterator[OSError | None]:
    """Keeps two processes from building one folder; the second says that it waits.

    Where a folder is there in a cache that may only be read, gives the refusal: reading needs no lock, but who finds
    that something must be written raises it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    refusal = None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process prepares %s: waiting for it", folder.name)
        lock.acquire()
    except OSError as error:
        if not is_read_only(error) or not folder.is_dir():
            raise
        refusal = error
    try:
        yield refusal
    finally:
        lock.release()


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, or a file that another process keeps open, into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(folder.parent).free
            raise DataError(
                f"{folder}: no space left on the disk ({format_bytes(free)} free). Free some, or set ONECARD_CACHE to a"
                " folder on another disk; then start again: what is done is kept."
            ) from error
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}). Is it writable, and does no other run use it?"
        ) from error
