"""Asks all detectors while a run goes on, and says each finding once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from onecard.observe.detectors import device, generalization, gradients, learning, memory, ranks, speed
from onecard.observe.detectors.catalogue import as_event
from onecard.observe.detectors.history import Foresee, History, Surroundings, foresee_nothing
from onecard.observe.events import Event, FindingEvent, FinishedEvent, StepEvent
from onecard.spec import Finding, Plan

Detect = Callable[[History], Finding | None]

# So often at most, and so rarely at most, in steps; a long run is asked five hundred times.
_LEAST_INTERVAL, _MOST_INTERVAL, _NUM_CHECKS = 10, 200, 500


class Detector(NamedTuple):
    """`num_times`: how often in a row it must find the same before that is said."""

    detect: Detect
    num_times: int = 2


DETECTORS = (
    Detector(learning.find_masked),
    Detector(learning.find_dead_gradient),
    Detector(learning.find_divergence),
    Detector(learning.find_rise),
    Detector(learning.find_flat_loss),
    Detector(learning.find_spike, 1),
    Detector(gradients.find_collapsing_scale),
    Detector(gradients.find_vanishing),
    Detector(gradients.find_clipping),
    Detector(generalization.find_overfitting, 1),
    Detector(generalization.find_repetition),
    Detector(speed.find_unused_gpu, 1),
    Detector(speed.find_starvation),
    Detector(speed.find_frequent_saving),
    Detector(speed.find_frequent_evaluation),
    Detector(ranks.find_slow_rank),
    Detector(device.find_heat),
    Detector(device.find_weak_power),
    Detector(device.find_battery),
    Detector(device.find_spilling),
    Detector(device.find_others_on_card),
    Detector(device.find_busy_cpu),
    Detector(device.find_idle_gpu),
    Detector(memory.find_card_growth),
    Detector(memory.find_host_growth),
    Detector(device.find_slowness, 5),
)


@dataclass
class _Standing:
    """What a detector found last, and how often in a row."""

    id: str = ""
    num_times: int = 0


class Watch:
    """Hears every event of a run and answers with what it shows.

    A finding is said when it has been found several times in a row, and once in a run: what flickers around a
    threshold is not repeated. Detectors are asked at steps alone, so that findings about the loss stand at the same
    place in the record of a resumed run.
    """

    def __init__(
        self, plan: Plan, surroundings: Surroundings | None = None, ask_plan: Foresee = foresee_nothing
    ) -> None:
        self.history = History(plan, surroundings or Surroundings(), ask_plan=ask_plan)
        self._standings = [_Standing() for _ in DETECTORS]
        self._told: set[str] = set()
        share = plan.schedule.num_steps // _NUM_CHECKS
        self._interval = min(_MOST_INTERVAL, max(_LEAST_INTERVAL, share))

    def recall(self, events: Iterable[Event]) -> None:
        """Hears what a run has recorded before it was resumed, and says nothing."""
        plan = self.history.plan
        for event in events:
            if isinstance(event, FindingEvent):
                self._told.add(event.id)
            self._check(event)
        # What had to be changed then is in the plan that the run goes on with; no forecast was made for that.
        is_changed = self.history.plan.forecast is None
        self.history.plan = plan.model_copy(update={"forecast": None}) if is_changed else plan

    def hear(self, event: Event) -> list[FindingEvent]:
        """Takes the next event; gives the findings that it completes."""
        findings = [finding for finding in self._check(event) if finding.id not in self._told]
        self._told |= {finding.id for finding in findings}
        return [as_event(finding, event.step, event.elapsed_s) for finding in findings]

    def _check(self, event: Event) -> list[Finding]:
        """Findings that have stood long enough, whether they were said before or not."""
        self.history.add(event)
        is_due = isinstance(event, StepEvent) and event.step % self._interval == 0
        # An interruption is no end: the run that goes on comes to the same findings by itself.
        is_end = isinstance(event, FinishedEvent) and event.reason != "interrupted"
        if not (is_due or is_end):
            return []
        found = []
        for standing, detector in zip(self._standings, DETECTORS, strict=True):
            finding = detector.detect(self.history)
            id = finding.id if finding else ""
            standing.num_times = standing.num_times + 1 if id == standing.id else 1
            standing.id = id
            if finding is not None and standing.num_times >= detector.num_times:
                found.append(finding)
        return found
