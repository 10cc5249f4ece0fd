"""Freed memory of this process: kept for the next tensor, or given back."""

import ctypes
import sys
from typing import Any

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# Larger blocks, such as those of evaluations with wide MLPs, come and go alone, so that they leave no holes.
_LARGEST_KEPT_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Lets malloc keep what a step frees for the next one; false where the C library is not glibc.

    By itself glibc maps each block of more than 32 MiB anew, and the system fills every page of it with zeros: of a
    thin model's step on a CPU that was half of the time (LOG.md).
    """
    library = _glibc()
    if library is None:
        return False
    kept = library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return bool(kept)


def give_back_freed_memory() -> None:
    """Gives the pages that hold nothing back to the system; does nothing where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process where it is glibc, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
