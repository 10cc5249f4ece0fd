"""A run in training, followed by its record alone."""

import math
import time
from dataclasses import dataclass

from onecard.errors import CheckpointError
from onecard.observe.events import (
    DeviceEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    FinishedEvent,
    FinishReason,
    RecoveredEvent,
    StepEvent,
)
from onecard.observe.lines import parse_event
from onecard.observe.pace import Pace
from onecard.report.record import RunRecord


@dataclass(frozen=True)
class LiveView:
    """A run at a moment.

    `reading` is what its sensors said last, `recovered` the last trouble that it got over, `age_s` the time since its
    record grew; `finished` is None while it trains; `problem` says why its record cannot be read now.
    """

    name: str
    num_steps: int
    step: StepEvent | None
    losses: tuple[float, ...]
    pace: Pace | None
    last: EvaluatedEvent | None
    best: EvaluatedEvent | None
    findings: tuple[FindingEvent, ...]
    reading: DeviceEvent | None
    recovered: RecoveredEvent | None
    finished: FinishReason | None
    age_s: float | None
    problem: str | None = None


class Follower:
    """Reads on where it stopped; begins anew where the record was cut back, as it is when a run is resumed."""

    def __init__(self, run: RunRecord) -> None:
        self._path = run.root / "events.jsonl"
        self._name, self._plan = run.root.name, run.plan
        self._begin()

    def _begin(self) -> None:
        self._position, self._last_line = 0, b""
        self._problem: str | None = None
        self._losses: list[float] = []
        self._step: StepEvent | None = None
        self._pace: Pace | None = None
        self._last: EvaluatedEvent | None = None
        self._best: EvaluatedEvent | None = None
        self._findings: dict[str, FindingEvent] = {}
        self._reading: DeviceEvent | None = None
        self._recovered: RecoveredEvent | None = None
        self._finished: FinishedEvent | None = None

    def look(self) -> LiveView:
        """Reads what has been added and says how the run stands."""
        for line in self._new_lines():
            try:
                self._hear(parse_event(line.decode("utf-8")))
            except (CheckpointError, UnicodeDecodeError):  # a damaged line; the report counts them
                continue
        try:
            age_s: float | None = max(0.0, time.time() - self._path.stat().st_mtime)
        except OSError:
            age_s = None
        return LiveView(
            name=self._name,
            num_steps=self._plan.schedule.num_steps,
            step=self._step,
            losses=tuple(self._losses),
            pace=self._pace,
            last=self._last,
            best=self._best,
            findings=tuple(self._findings.values()),
            reading=self._reading,
            recovered=self._recovered,
            finished=self._finished.reason if self._finished is not None else None,
            age_s=age_s,
            problem=self._problem,
        )

    def _new_lines(self) -> list[bytes]:
        """The whole lines since the last look; a line that is still being written waits for the next."""
        self._problem = None
        try:
            with self._path.open("rb") as file:
                file.seek(self._position - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._begin()
                    file.seek(0)
                *lines, _ = file.read().split(b"\n")
        except OSError as error:  # a share that may come back; before its first line a run has none to read
            if self._position or not isinstance(error, FileNotFoundError):
                self._problem = error.strerror or str(error)
            return []
        if lines:
            self._position += sum(len(line) + 1 for line in lines)
            self._last_line = lines[-1] + b"\n"
        return lines

    def _hear(self, event: Event) -> None:
        match event:
            case StepEvent():
                # A record that goes on after its end is that of a run that was resumed.
                self._finished = None
                self._step = event
                self._losses.append(event.loss)
                self._pace = self._pace or Pace(self._plan.schedule.num_steps, max_hours=self._plan.max_hours)
                self._pace.add(event)
            case EvaluatedEvent():
                self._last = event
                if math.isfinite(event.loss) and (self._best is None or event.loss < self._best.loss):
                    self._best = event
            case FindingEvent():
                self._findings.pop(event.symptom, None)
                self._findings[event.symptom] = event
            case DeviceEvent():
                self._reading = event
            case RecoveredEvent():
                self._recovered = event
            case FinishedEvent():
                self._finished = event
