"""What became of a run, as a page and live."""

from pathlib import Path
from typing import TYPE_CHECKING

from onecard.errors import InputError

if TYPE_CHECKING:
    from onecard.report.live import Follower


def write_report(run: str | Path, *, lang: str = "auto") -> Path:
    """Writes report.html into the folder of a run, finished or in training, and returns it.

    `lang` is en, zh or auto, the language of the system. One file that needs no network. Takes no lock and no torch.

    Raises:
        InputError: no such run, an unknown language, or a folder where the report belongs.
        OSError: its folder cannot be written to.
    """
    from onecard.report import write
    from onecard.report.record import find_record
    from onecard.report.words import LANGUAGES, system_language

    if lang not in (*LANGUAGES, "auto"):
        raise InputError(f"lang {lang!r} is unknown: use {', '.join(LANGUAGES)} or auto")
    language = next((known for known in LANGUAGES if known == lang), system_language())
    return write.write_report(find_record(run), language)


def monitor(run: str | Path) -> "Follower":
    """Follows a run in training by its record: `look()` says how it stands. Takes no lock and no torch.

    Raises:
        InputError: no such run.
    """
    from onecard.report.live import Follower
    from onecard.report.record import find_record

    return Follower(find_record(run))
