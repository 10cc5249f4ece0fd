"""This machine, tested."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecard.diagnose.check import Check


def examine(encoding: str | None = "utf-8") -> "Iterator[Check]":
    """Tests what training needs of this machine and yields each outcome as it is there; none takes over 180 seconds.

    `encoding` is that of the console results are shown on. Raises nothing: what fails is an outcome.
    """
    from onecard.diagnose.doctor import examine

    return examine(encoding)
