"""A report at the end of a run, however it ends."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from onecard.errors import OnecardError
from onecard.report.record import read_runs
from onecard.report.words import system_language
from onecard.report.write import write_report
from onecard.run.folder import RunFolder

log = logging.getLogger("onecard.run")


@contextmanager
def reported(folder: RunFolder) -> Iterator[None]:
    """Writes the report of a run when the block ends, also where it fails; not where nothing has happened in it.

    A report that cannot be written is a warning: the run itself is worth more.
    """
    before = _read_record(folder)
    try:
        yield
    finally:
        try:
            if folder.has_record() and _read_record(folder) != before:
                write_report(read_runs([folder.root])[0], system_language())
        except (OSError, OnecardError) as error:
            log.warning("no report was written: %s. `onecard report %s` tries again", error, folder.root)


def _read_record(folder: RunFolder) -> bytes:
    # Whole: a run that goes back cuts its record, and may write as much again.
    return folder.events.read_bytes() if folder.events.is_file() else b""
