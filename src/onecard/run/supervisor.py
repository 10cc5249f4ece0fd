"""A small process above the one that trains: it starts it again from the last checkpoint where it dies.

supervisor ── starts ──► worker (`onecard train`, later `onecard resume RUN`)
    │  ▲                    │
    │  └── note: run, limit ┘   a file; its last word is that the worker ended by itself
    └──── standard input ─────► its end tells the worker that the supervisor is gone

Nothing heavy is imported: it is there while the worker loads PyTorch, and for as long as the run.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import FrameType

from onecard.errors import (
    EXIT_INTERRUPTED,
    DeviceLostError,
    DivergedError,
    DoesNotFitError,
    InputError,
    OnecardError,
    RankLostError,
)
from onecard.run.signals import is_ignored, take_signals

# The worker learns from it that it has a supervisor, and where the note is to be written.
NOTE_VARIABLE = "ONECARD_SUPERVISOR_NOTE"
_GAVE_UP, _DEVICE_LOST = OnecardError.exit_code, DeviceLostError.exit_code
_CHOSEN = frozenset({0, InputError.exit_code, DivergedError.exit_code, EXIT_INTERRUPTED})
# Also how a broken process may end: 1 by whatever the system does, 3 by abort() of Windows' C runtime.
_CHOSEN_IF_TOLD = frozenset({OnecardError.exit_code, DoesNotFitError.exit_code})
# A driver that resets a card needs some seconds; another program that took all memory may need more.
_PAUSE_S = 5.0
# What may come back if it is given time; until then a worker that needs it finds its input bad.
_GPU, _DISK = "the GPU", "the disk or network share"
# SIGBUS, STATUS_IN_PAGE_ERROR: how a file that is mapped to memory, such as the text, tells that its disk is gone.
_MAP_LOST = frozenset({-7, 0xC0000006})
_LIKELY_CAUSES = {
    -9: "killed, as a system does that runs out of memory",
    -11: "a crash inside a library (segmentation fault)",
    -7: "a crash inside a library (bus error: a file on a disk that is gone, or a full one)",
    -6: "a crash inside a library (abort)",
    0xC0000006: "a file on a disk that is gone",
    0xC0000005: "a crash inside a library (access violation)",
    0xC0000017: "no memory left",
    _DEVICE_LOST: "the GPU was lost",
    RankLostError.exit_code: "one of its processes was lost",
    DoesNotFitError.exit_code: "a crash inside a library (abort)",
}


@dataclass(frozen=True)
class Note:
    """What a worker has told: its run, how often it may be started again, and how far it got."""

    run: str | None = None
    max_restarts: int = 0
    has_begun: bool = False
    has_ended: bool = False
    has_lost_disk: bool = False


@dataclass(frozen=True)
class _Death:
    """How a worker ended, what it went without, and how often in a row that was without a new checkpoint.

    `reached` is the step of the newest checkpoint, -1 before the first, None where the run folder is not there.
    """

    code: int
    lost: str | None
    note: Note
    reached: int | None
    num_times: int
    pause_s: float


def is_supervised(words: Sequence[str]) -> bool:
    """Whether a command line is one that trains, and is not the worker's own."""
    if NOTE_VARIABLE in os.environ or not words or words[0] not in ("train", "resume"):
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is above this process, and starts it again if asked to
        return False
    own = {word.partition("=")[0].replace("_", "-") for word in words}
    # The one flag that is read here, so that a run can do without a second process.
    flat = [part.replace("_", "-") for word in words for part in word.split("=", 1)]
    is_off = any(pair == ("--max-restarts", "0") for pair in pairwise(flat))
    return not is_off and not own & {"--help", "--verify"}


def supervise(words: Sequence[str], num_processes: int = 1) -> int | None:
    """Runs a command in a worker, and `resume` in another where it dies; gives the exit code of the last one.

    With `num_processes` the worker starts so many, and the next one as many again.

    A worker that has left a new checkpoint behind starts the count of restarts anew. None where nothing was run, for
    there is no place for the note.
    """
    try:
        place = tempfile.TemporaryDirectory(prefix="onecard-", ignore_cleanup_errors=True)
    except OSError as error:
        told = f"there is no room for a temporary file ({error}): a run that dies is not started again by itself"
        print(told, file=sys.stderr)
        return None
    with place as folder:
        command = () if num_processes == 1 else _command("onecard.distributed.launch", str(num_processes))
        return Supervisor(Path(folder) / "note.json", command).run(list(words))


class Supervisor:
    """Starts workers one after the other."""

    def __init__(self, note_path: Path, command: Sequence[str] = (), pause_s: float = _PAUSE_S) -> None:
        self._note_path = note_path
        self._command = command or _command("onecard")
        self._pause_s = pause_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self, words: list[str]) -> int:
        """Gives the exit code of the last worker; 1 where workers die without getting anywhere."""
        take_signals(self._pass_on)
        if sys.platform != "win32" and not is_ignored(signal.SIGTSTP):
            signal.signal(signal.SIGTSTP, self._suspend)
        num_deaths, before, known = 0, -1, Note()
        lost: str | None = None
        while True:
            code = self._run_worker(words)
            note = read_note(self._note_path)
            lost = _find_lost(code, note, lost)
            # One that died while it was loading has told nothing; its run is the one of the worker before.
            known = note if note.run is not None else replace(known, has_lost_disk=note.has_lost_disk)
            is_waited_for = lost is not None and known.run is not None and not self._is_stopping
            if not is_waited_for and _is_chosen(code, note):
                return code
            if self._is_stopping:
                return EXIT_INTERRUPTED
            reached = newest_step(known.run)
            # Beside the worker before, not the furthest of all: a run that has gone back gets on from there.
            num_deaths = 1 if reached is not None and reached > before else num_deaths + 1
            before = before if reached is None else reached
            num_pauses = num_deaths if lost else num_deaths - 1
            death = _Death(code, lost, known, reached, num_deaths, self._pause_s * num_pauses)
            if known.run is None or num_deaths > known.max_restarts:
                print(_describe_end(death), file=sys.stderr)
                return _DEVICE_LOST if lost == _GPU else _GAVE_UP
            print(_describe_restart(death), file=sys.stderr, flush=True)
            self._pause(num_pauses)
            if self._is_stopping:
                return EXIT_INTERRUPTED
            words = _words_to_resume(words, known)

    def _run_worker(self, words: Sequence[str]) -> int:
        self._note_path.unlink(missing_ok=True)
        environment = os.environ | {NOTE_VARIABLE: str(self._note_path)}
        # A group of its own (Windows knows none): the terminal's Ctrl+C comes here and is passed on once.
        self._worker = subprocess.Popen(
            [*self._command, *words], stdin=subprocess.PIPE, env=environment, process_group=0
        )
        # Whoever stopped it while it was being started could not be told to the worker then.
        if self._is_stopping and sys.platform != "win32":
            self._worker.send_signal(signal.SIGTERM)
        try:
            return self._worker.wait()
        finally:
            assert self._worker.stdin is not None
            self._worker.stdin.close()
            self._worker = None

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        # On Windows every process of a console hears of Ctrl+C by itself.
        if self._worker is not None and sys.platform != "win32":
            self._worker.send_signal(number)

    def _suspend(self, number: int, _: FrameType | None) -> None:
        """Ctrl+Z stops both, and `fg` lets both go on."""
        if sys.platform == "win32" or self._worker is None:
            return
        self._worker.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._worker.send_signal(signal.SIGCONT)

    def _pause(self, num_times: int) -> None:
        until = time.monotonic() + self._pause_s * num_times
        while time.monotonic() < until and not self._is_stopping:
            time.sleep(min(0.2, self._pause_s))


def read_note(path: Path) -> Note:
    """What a worker has told; nothing where it died before."""
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Note()


def _is_chosen(code: int, note: Note) -> bool:
    """Whether a worker ended as it meant to, rather than died."""
    if code in _CHOSEN:
        return True
    if code not in _CHOSEN_IF_TOLD:
        return False
    return note.has_ended or (code != _GAVE_UP and note.run is None)


def _find_lost(code: int, note: Note, before: str | None) -> str | None:
    """What a worker went without that may come back; `before`: what the one before it went without."""
    if code == _DEVICE_LOST:
        return _GPU
    if code in _MAP_LOST:
        return _DISK
    if code == InputError.exit_code:
        return _DISK if note.has_lost_disk else before
    return None


def newest_step(run: str | None) -> int | None:
    """Step of the newest checkpoint of a run, -1 before the first; None where the run folder cannot be looked at."""
    if run is None:
        return -1
    try:
        Path(run).stat()
        found = list(Path(run).glob("checkpoints/step-*/manifest.json"))
    except OSError:
        return None
    names = [path.parent.name.removeprefix("step-") for path in found]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def _words_to_resume(words: Sequence[str], note: Note) -> list[str]:
    """What the next worker is to do after one that was given `words`."""
    assert note.run is not None
    if not note.has_begun:
        return list(words)  # which may name a checkpoint that is not the newest
    return ["resume", note.run, *_kept_flags(words)]


def _kept_flags(words: Sequence[str]) -> list[str]:
    kept = [word for word in words if word == "--json" or word.startswith("--accept=")]
    return kept + [f"--accept={value}" for flag, value in pairwise(words) if flag == "--accept"]


def _command(module: str, *words: str) -> list[str]:
    return [sys.executable, *_interpreter_flags(), "-m", module, *words]


def _interpreter_flags() -> list[str]:
    # An installed command does not look for modules in the current folder; `python -m` would.
    looks_here = sys.path and sys.path[0] in ("", os.getcwd())  # noqa: PTH109 (pathlib takes longer to import)
    return [] if looks_here and not sys.flags.safe_path else ["-P"]


def _cause_of(death: _Death) -> str:
    code = death.code
    name = f"signal {-code}" if code < 0 else f"exit code {code:#x}" if code > 255 else f"exit code {code}"
    cause = _LIKELY_CAUSES.get(code)
    if code == InputError.exit_code:
        is_new = death.note.has_lost_disk
        cause = f"{_DISK} did not answer" if is_new else f"{death.lost} was lost before, and may not be back yet"
    return f"{name}: {cause}" if cause else name


def _describe_restart(death: _Death) -> str:
    place = f"step {death.reached}"
    if death.reached is None:
        place = "the last checkpoint"
    elif death.reached < 0:
        place = "the beginning, for there is no checkpoint yet"
    wait = f"Waiting {death.pause_s:g} s for {death.lost}; then it" if death.lost else "It"
    return (
        f"\nthe training process died ({_cause_of(death)}). {wait} is started again and goes on from {place} "
        f"(restart {death.num_times} of {death.note.max_restarts} without a new checkpoint)"
    )


def _describe_end(death: _Death) -> str:
    run, cause = death.note.run, _cause_of(death)
    if run is None:
        return f"\nthe process died ({cause}) before the run began; nothing is lost. Run the command again"
    times = "" if death.num_times <= 1 else f" {death.num_times} times without a new checkpoint in between"
    return (
        f"\nthe training process died{times}, the last time by {cause}, and max_restarts is "
        f"{death.note.max_restarts}. Earlier checkpoints are untouched. When the cause is mended, go on with: "
        f"onecard resume {run}"
    )
