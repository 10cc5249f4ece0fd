"""What was prepared before is opened; what was not, or has changed since, is built once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from onecard.data.cache import explained_disk_errors, locked, log
from onecard.data.fingerprint import Fingerprint
from onecard.data.token_file import MANIFEST_FILE
from onecard.errors import DataError

_Prepared = TypeVar("_Prepared")


class _Manifest(Protocol):
    @property
    def key(self) -> dict[str, Any]: ...

    @property
    def content_hash(self) -> str: ...


def open_or_build(
    folder: Path,
    key: dict[str, Any],
    fingerprint: Fingerprint,
    *,
    read: Callable[[Path], _Manifest],
    open_prepared: Callable[[Path], _Prepared],
    build: Callable[[], None],
) -> _Prepared:
    """Opens what lies in a folder if it was made by `key` from the same content, else builds it there first.

    Two processes wait for one another, and what is damaged is built again. Raises DataError for a full disk, and
    OSError where something must be built in a cache that may only be read.
    """
    with explained_disk_errors(folder), locked(folder) as refusal:
        # Not opened before its manifest is known to be right: Windows replaces no file that is mapped.
        if _is_current(folder, key, fingerprint, read):
            try:
                return open_prepared(folder)
            except DataError as error:
                log.warning("%s (preparing it again now)", error)
        if refusal is not None:
            raise refusal
        build()
        return open_prepared(folder)


def _is_current(folder: Path, key: dict[str, Any], fingerprint: Fingerprint, read: Callable[[Path], _Manifest]) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    try:
        manifest = read(folder)
    except DataError as error:
        log.warning("%s (preparing it again now)", error)
        return False
    if manifest.key != key:
        log.warning("%s holds another corpus: preparing it again", folder)
    elif manifest.content_hash != fingerprint.content_hash:
        log.warning("%s has changed since it was prepared: preparing it again", fingerprint.source.path)
    else:
        return True
    return False
