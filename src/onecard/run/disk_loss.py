"""A disk or network share that does not answer for now, told from one that says no."""

import errno

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


def is_disk_lost(error: BaseException) -> bool:
    """Whether an error, or one that it was made from, is that of a disk which may answer again."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and _says_so(found):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def _says_so(error: OSError) -> bool:
    return error.errno in LOST_DISK or getattr(error, "winerror", None) in _LOST_ON_WINDOWS
