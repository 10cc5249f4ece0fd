"""The command `onecard`: one short file per verb that parses, calls `onecard.api` and prints.

Nothing heavy is imported before a verb runs, so that `onecard --help` answers at once.
"""

import errno
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from onecard.distributed.launch import check_is_for_several, launch, take_num_processes
from onecard.distributed.place import ALONE, find_place, is_one_of_several, is_to_be_said
from onecard.errors import InputError, OnecardError
from onecard.run.disk_loss import is_disk_lost
from onecard.run.supervisor import is_supervised, supervise

# Processes of a run begin within a second of one another, on a busy machine within some.
_PATIENCE_S = 10.0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 2 bad input, 3 does not fit, 4 diverged, 130 interrupted.

    5 says that the GPU was lost, 6 that a process of several was. A command line that trains is run in a process
    of its own, which is started again where it dies.
    """
    if is_one_of_several():
        # What PyTorch warns of in C++ goes past Python, from every process at once; to be said before it is loaded.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if argv is None and (code := _run_elsewhere(sys.argv[1:])) is not None:
        sys.exit(code)
    sys.stdout, sys.stderr = _prepared(sys.stdout), _prepared(sys.stderr)
    try:
        try:
            from onecard.cli.app import app  # here, for a supervisor needs none of it

            words, _ = take_num_processes(sys.argv[1:] if argv is None else argv)
            app(args=words, prog_name="onecard")
        finally:
            sys.stdout.flush()  # here, where an error can still be told
    except OnecardError as error:
        _tell(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # a reader who has seen enough
        sys.stdout = _nowhere()
        sys.exit(1)
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


def _run_elsewhere(words: Sequence[str]) -> int | None:
    """Runs a command that trains in a process of its own, or in several; None where it is for this one."""
    try:
        words, num_processes = take_num_processes(words)
        if "--help" in words:
            return None
        if num_processes > 1 and find_place() != ALONE:
            raise InputError("torchrun has started this process as one of several: leave out --num_processes")
        if num_processes > 1 or is_one_of_several():
            check_is_for_several(words)
    except InputError as error:
        _tell(str(error))
        return error.exit_code
    if is_supervised(words) and (code := supervise(words, num_processes)) is not None:
        return code
    return launch(words, num_processes) if num_processes > 1 else None


def _tell(message: str) -> None:
    """Prints an error; of several processes one does, and the others only where nobody has ended them by then."""
    if not is_to_be_said(message):
        # torchrun ends all as soon as one has ended, and whoever is to say it may be behind.
        time.sleep(_PATIENCE_S)
    if message:
        _print_error(message)


def _prepared(stream: TextIO | None) -> TextIO:
    """Makes a stream take any text; one that the shell has closed (`>&-`) is replaced by one that leads nowhere.

    A console with a code page (cp936, cp1252) shows `?` for what it lacks, instead of ending the program. Files and
    pipes get UTF-8 whatever the code page is, unless PYTHONIOENCODING says otherwise.
    """
    if stream is None:
        return _nowhere()
    if isinstance(stream, io.TextIOWrapper):
        is_ours = not stream.isatty() and not os.environ.get("PYTHONIOENCODING")
        stream.reconfigure(encoding="utf-8" if is_ours else None, errors="replace")
    return stream


def _stdout_fails() -> bool:
    """Says whether stdout is what cannot be written: an error of writing does not name its file."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        sys.stdout = _nowhere()  # or Python complains about it once more at the end
        return True
    return False


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _describe_os_error(error: OSError) -> str:
    from onecard.hardware.page_file import PAGE_FILE_FULL, is_page_file_full

    what = error.strerror or str(error)
    if is_page_file_full(error):
        return (
            f"{what} (Windows error {PAGE_FILE_FULL}): memory and page file together are used up. Close other "
            "programs, or let Windows manage the page file, or give it 16 GB: System, Advanced system settings, "
            "Performance, Advanced, Virtual memory. Then run the command again"
        )
    if not error.filename and _stdout_fails():
        return f"stdout cannot be written to: {what}. Send the output somewhere else"
    if _is_too_long_for_windows(error):
        return (
            f"{error.filename}: {what}. Windows takes paths of less than 260 characters, this one has "
            f"{len(str(error.filename))}: give a shorter --output_dir or move the data up, or allow long paths, as "
            "administrator: reg add HKLM\\SYSTEM\\CurrentControlSet\\Control\\FileSystem /v LongPathsEnabled /t "
            "REG_DWORD /d 1. Then run the command again"
        )
    place = f"{error.filename}: " if error.filename else ""
    if is_disk_lost(error):
        remedy = "see whether the disk, or the network share and its server, are there again"
    else:
        remedy = _REMEDIES.get(error.errno or 0, "check that it exists and may be used")
    return f"{place}{what}. Nothing that was complete is lost; {remedy} and run the command again"


def _is_too_long_for_windows(error: OSError) -> bool:
    # A folder of 248 characters is refused already, and both look like one that is missing.
    return getattr(error, "winerror", None) in _NOT_FOUND and len(str(error.filename or "")) >= 248


# ERROR_FILE_NOT_FOUND, ERROR_PATH_NOT_FOUND, ERROR_FILENAME_EXCED_RANGE.
_NOT_FOUND = frozenset({2, 3, 206})
_REMEDIES = {errno.ENOSPC: "free some space on the disk", errno.ENAMETOOLONG: "give a shorter name"}


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
