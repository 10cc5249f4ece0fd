"""What a run is watched by: sensors read now and then, and detectors told of every event."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from onecard.errors import CheckpointError
from onecard.hardware import probe_machine
from onecard.hardware.sensors import CardReading, CardSensor, HostSensor
from onecard.observe.detectors import Surroundings, Watch
from onecard.observe.events import DeviceEvent, Event, FinishedEvent, RecoveredEvent, StepEvent
from onecard.observe.lines import parse_event
from onecard.run.control import Control
from onecard.run.foresight import Foresight
from onecard.spec import Plan, Recipe

log = logging.getLogger("onecard.run")

# A reading of the host takes 0.07 ms (LOG.md), so even a hundred times that would not be felt.
_READING_INTERVAL_S = 10.0


class Observer:
    """Adds to the events of a run what sensors and detectors say; a finding that stops the run asks `control` to.

    `record` is what the run has written before it was resumed: it says which findings are known.
    """

    def __init__(self, plan: Plan, recipe: Recipe, record: Path, control: Control) -> None:
        self._plan, self._surroundings, self._record = plan, _look_around(plan, recipe), record
        self._foresight = Foresight()
        self._watch = self._recall()
        self._control = control
        self._device = plan.device
        self._read_at = time.monotonic()

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        """Yields the events, each with what follows from it; what a run's end shows comes before its last event."""
        with ExitStack() as stack:
            host, card = HostSensor(), _open_card(self._device)
            if card is not None:
                stack.callback(card.close)
            for event in events:
                if isinstance(event, FinishedEvent):
                    yield from self._hear(event)
                    yield event
                    continue
                yield event
                if isinstance(event, RecoveredEvent) and event.returned_from is not None:
                    # What came after that step has not happened; what the plan had to give up stays given up.
                    self._plan = self._watch.history.plan
                    self._watch = self._recall()
                if isinstance(event, StepEvent) and time.monotonic() - self._read_at >= _READING_INTERVAL_S:
                    self._read_at = time.monotonic()
                    reading = DeviceEvent(
                        step=event.step,
                        elapsed_s=event.elapsed_s,
                        **asdict(card.read() if card is not None else CardReading()),
                        **asdict(host.read()),
                    )
                    yield reading
                    self._watch.hear(reading)
                yield from self._hear(event)

    def _recall(self) -> Watch:
        watch = Watch(self._plan, self._surroundings, self._foresight)
        watch.recall(_read_events(self._record))
        return watch

    def _hear(self, event: Event) -> Iterator[Event]:
        for finding in self._watch.hear(event):
            yield finding
            if finding.stops_run:
                self._control.stop, self._control.reason = True, "diverged"


def _look_around(plan: Plan, recipe: Recipe) -> Surroundings:
    machine = probe_machine()
    return Surroundings(
        gpus=tuple(gpu.name for gpu in machine.gpus),
        torch_cuda=torch.version.cuda,
        is_device_asked=recipe.device != "auto",
        platform=machine.platform,
        num_cores=machine.num_cores,
    )


def _open_card(device: str) -> CardSensor | None:
    if not device.startswith("cuda"):
        return None
    import pynvml

    return CardSensor(pynvml, str(torch.cuda.get_device_properties(device).uuid))


def _read_events(record: Path) -> Iterator[Event]:
    """Reads what a run has recorded so far; a line of another version, or a damaged one, says nothing to detectors."""
    if not record.exists():
        return
    num_damaged = 0
    with record.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                yield parse_event(line)
            except CheckpointError:
                num_damaged += 1
    if num_damaged:
        log.warning("%s: %d lines of it could not be read, and are left as they are", record, num_damaged)
