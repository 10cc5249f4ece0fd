"""Times settings side by side, each in processes of its own, which take turns.

round 1   a  b  c        every cell is a process: its memory is its own, and a crash is a row
round 2   c  b  a        back and forth, so that a machine that slows down favours none
round 3   a  b  c
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onecard.errors import InputError
from onecard.spec import Plan
from onecard.trials.measured import Row, summarize
from onecard.trials.sweep import Setting, name_of

WORKER = (sys.executable, "-m", "onecard.api.bench_worker")
NUM_ROUNDS, ROUND_S = 3, 5.0
# A process that was begun may go on for so long after the time is up; what hangs is ended then.
_GRACE_S = 60.0
# Preparing text and downloading models is not counted, but nothing may hang for ever.
_LONGEST_CHECK_S = 24 * 3600.0

OnProgress = Callable[[str], None]


@dataclass
class _Cell:
    """What is known of one setting so far."""

    setting: Setting
    is_synthetic: bool = False
    plan: dict[str, Any] | None = None
    timings: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Bench:
    """Rows in the order of the settings, the fastest marked, and how many rounds were wanted and begun."""

    source: str
    rows: tuple[Row, ...]
    num_rounds: int
    num_wanted: int
    seconds: float
    was_stopped: bool

    @property
    def notes(self) -> tuple[str, ...]:
        return ("Stopped by hand.",) if self.was_stopped else ()

    @property
    def best(self) -> Row | None:
        return next((row for row in self.rows if row.is_best), None)


@dataclass(frozen=True)
class Workers:
    """How settings are run: the command of a worker, and what all of its jobs share."""

    source: str | None
    overrides: Mapping[str, Any]
    command: Sequence[str] = WORKER

    def check(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Prepares the text of each setting; an answer each, and the reason in the last where the process died."""
        # Text that a person names is to be there.
        job = {"does": "check", "may_be_synthetic": "dataset" not in self.overrides}
        return self._run(job, settings, _LONGEST_CHECK_S)

    def time(self, cell: _Cell, limit_s: float) -> dict[str, Any]:
        """Times a setting once."""
        job = {"does": "time", "plan": cell.plan, "is_synthetic": cell.is_synthetic, "seconds": ROUND_S}
        return self._run(job, [cell.setting], limit_s)[-1]

    def _run(self, job: dict[str, Any], settings: Sequence[Setting], limit_s: float) -> list[dict[str, Any]]:
        job |= {"source": self.source, "settings": [{**self.overrides, **setting} for setting in settings]}
        with tempfile.TemporaryDirectory(prefix="onecard-") as folder:
            file = Path(folder) / "job.json"
            file.write_text(json.dumps(job), encoding="utf-8")
            command = [*self.command, str(file)]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe) as process:
                try:
                    out, said = process.communicate(timeout=limit_s)
                except subprocess.TimeoutExpired:
                    return [{"error": f"no answer after {limit_s:.0f} s"}]
                finally:
                    process.kill()
        answers = [json.loads(line) for line in out.decode("utf-8").splitlines()]
        if len(answers) < len(settings):
            answers.append({"error": _describe_death(process.returncode, said.decode("utf-8", errors="replace"))})
        return answers


def bench(workers: Workers, settings: Sequence[Setting], minutes: float, on_progress: OnProgress) -> Bench:
    """Prepares all settings, then times them in turns until `minutes` are over, preparation apart.

    Raises:
        InputError: a setting cannot be honoured, or its text cannot be used; all of them together.
    """
    started = time.monotonic()
    on_progress("preparing text")
    cells = _checked(workers, settings)
    deadline = time.monotonic() + 60 * minutes
    num_begun = 0
    try:
        for number in range(NUM_ROUNDS):
            due = [cell for cell in cells if cell.problem is None]
            for place, cell in enumerate(due if number % 2 == 0 else reversed(due)):
                if time.monotonic() > deadline:
                    break
                num_begun = number + 1
                on_progress(f"round {number + 1} of {NUM_ROUNDS}, {place + 1} of {len(due)}: {name_of(cell.setting)}")
                _time(workers, cell, deadline - time.monotonic() + _GRACE_S)
        was_stopped = False
    except KeyboardInterrupt:
        was_stopped = True
    rows = _mark([_row(cell, minutes) for cell in cells])
    return Bench(workers.source or "recipe", rows, num_begun, NUM_ROUNDS, time.monotonic() - started, was_stopped)


def _checked(workers: Workers, settings: Sequence[Setting]) -> list[_Cell]:
    answers = workers.check(settings)
    problems: dict[str, list[str]] = {}
    for setting, answer in zip(settings[: len(answers)], answers, strict=True):
        if "error" in answer and not answer.get("does_not_fit"):
            problems.setdefault(answer["error"], []).append(name_of(setting))
    if problems:
        # What every setting meets is none of a setting's fault.
        texts = [
            error if len(names) == len(settings) or names == [name_of({})] else f"{', '.join(names)}: {error}"
            for error, names in problems.items()
        ]
        raise InputError("\n".join(texts))
    return [
        _Cell(setting, answer.get("is_synthetic", False), problem=answer.get("error"))
        for setting, answer in zip(settings, answers, strict=True)
    ]


def _time(workers: Workers, cell: _Cell, limit_s: float) -> None:
    answer = workers.time(cell, limit_s)
    if "error" in answer:
        cell.problem = answer["error"]
        return
    cell.plan = answer["plan"]
    timing = answer["timing"]
    if timing["shortage"] is not None:
        cell.problem = f"memory ran out: {timing['shortage']}"
    else:
        cell.timings.append(timing)


def _row(cell: _Cell, minutes: float) -> Row:
    plan = None if cell.plan is None else Plan.model_validate(cell.plan)
    if plan is not None and cell.timings:
        # A setting that worked and then failed is told as such.
        return replace(summarize(cell.setting, plan, cell.timings, cell.is_synthetic), problem=cell.problem)
    problem = cell.problem or f"not reached in {minutes:g} min"
    return Row(cell.setting, problem=problem, plan=plan, is_synthetic=cell.is_synthetic)


def _mark(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Marks the fastest row and those whose rounds reach into its own."""
    done = [row for row in rows if row.tokens_per_s is not None and row.problem is None]
    if not done:
        return tuple(rows)
    best = max(done, key=lambda row: row.tokens_per_s.median if row.tokens_per_s else 0.0)
    return tuple(
        replace(
            row,
            is_best=row is best,
            is_near_best=row in done and row is not best and _reach(row) >= _floor(best),
        )
        for row in rows
    )


def _reach(row: Row) -> float:
    assert row.tokens_per_s is not None
    return max(row.rounds) if len(row.rounds) > 1 else row.tokens_per_s.high_quarter


def _floor(row: Row) -> float:
    assert row.tokens_per_s is not None
    return min(row.rounds) if len(row.rounds) > 1 else row.tokens_per_s.low_quarter


def _describe_death(code: int, said: str) -> str:
    lines = said.strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    if code in (-9, 137):
        how += ", as the system does where memory runs out"
    return f"its process ended ({how}){f': {lines[-1][:200]}' if lines and code > 0 else ''}"
