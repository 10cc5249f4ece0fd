"""A disk or network share that does not answer for now, told from one that says no."""

import errno
from collections.abc import Iterator

# A reset connection or a bad sector says the same: what is asked for again may come, unlike after "no such file".
_NAMES = (
    *("EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO", "ETIMEDOUT", "EHOSTDOWN"),
    *("EREMOTEIO", "ENOLINK", "ENOMEDIUM"),
)
LOST_DISK = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
# ERROR_NOT_READY, BAD_NETPATH, DEV_NOT_EXIST, UNEXP_NET_ERR, NETNAME_DELETED, BAD_NET_NAME, SEM_TIMEOUT,
# NO_SUCH_DEVICE, IO_DEVICE, DEVICE_NOT_CONNECTED, NETWORK_UNREACHABLE, HOST_UNREACHABLE, CONNECTION_ABORTED: Python
# takes some of them for a missing file, others for an invalid argument.
_LOST_ON_WINDOWS = frozenset({21, 53, 55, 59, 64, 67, 121, 433, 1117, 1167, 1231, 1232, 1236})
# What a bad sector says, too, beside which all else can be read: EIO, EREMOTEIO, ERROR_IO_DEVICE.
_OF_A_SECTOR = frozenset(getattr(errno, name) for name in ("EIO", "EREMOTEIO") if hasattr(errno, name))
_OF_A_SECTOR_ON_WINDOWS = 1117


def is_disk_lost(error: BaseException) -> bool:
    """Whether an error, or one that it was made from, is that of a disk which may answer again."""
    return any(_says_so(one) for one in _with_causes(error))


def is_share_lost(error: BaseException) -> bool:
    """The same, where nothing can be read for now: a file that is not read then is not damaged."""
    return any(_says_so(one) and not _may_be_a_sector(one) for one in _with_causes(error))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _says_so(error: BaseException) -> bool:
    return isinstance(error, OSError) and (error.errno in LOST_DISK or _number_on_windows(error) in _LOST_ON_WINDOWS)


def _may_be_a_sector(error: BaseException) -> bool:
    number = _number_on_windows(error)
    if number is not None:  # Python has no errno of its own for most of them
        return number == _OF_A_SECTOR_ON_WINDOWS
    return isinstance(error, OSError) and error.errno in _OF_A_SECTOR


def _number_on_windows(error: BaseException) -> int | None:
    return getattr(error, "winerror", None)
