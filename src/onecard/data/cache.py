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

from filelock import FileLock, Timeout

from onecard.errors import DataError
from onecard.spec.paths import expand
from onecard.units import format_bytes

log = logging.getLogger("onecard.data")


def cache_folder(given: Path | None = None) -> Path:
    """Gives the folder for prepared text: the one given, else $ONECARD_CACHE, else ~/.cache/onecard."""
    return expand(given or os.environ.get("ONECARD_CACHE") or "~/.cache/onecard").absolute()


def short_hash(content: object) -> str:
    """Gives 12 hex digits for any JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file beside its place and renames it there, so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.replace(path)


def slug(path: str) -> str:
    """Makes a short folder name that says where a corpus comes from."""
    words = re.sub(r"[^\w-]+", "-", Path(path).name).strip("-")
    return words[:40] or "corpus"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps two processes from building one folder; the second says that it waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process prepares %s: waiting for it", folder.name)
        lock.acquire()
    try:
        yield
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
