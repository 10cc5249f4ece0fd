"""The command `onecard`: one short file per verb that parses, calls `onecard.api` and prints.

Nothing heavy is imported before a verb runs, so that `onecard --help` answers at once.
"""

import errno
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from onecard.cli.app import app
from onecard.errors import InputError, OnecardError


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 bad input, 3 does not fit, 4 diverged, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        _accept_any_text(stream)
    try:
        app(args=None if argv is None else list(argv), prog_name="onecard")
    except OnecardError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        _print_error(_describe_os_error(error))
        sys.exit(InputError.exit_code)
    except Exception:
        _print_error(
            "This is a defect of onecard, not a mistake of yours. Please report it with the text below, "
            "your command, your recipe and the output of: onecard --version"
        )
        raise
    sys.exit(0)


def _describe_os_error(error: OSError) -> str:
    what = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename else ""
    remedy = "free some space on the disk" if error.errno == errno.ENOSPC else "check that it exists and may be used"
    return f"{place}{what}. Nothing that was complete is lost; {remedy} and run the command again"


def _accept_any_text(stream: TextIO) -> None:
    """A console with a code page (cp936, cp1252) shows `?` for what it lacks, instead of ending the program."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
