"""What the last steps say about loss, speed and the time left."""

from collections import deque

from onecard.observe.events import StepEvent


class Pace:
    """Averages the last `window` steps; the time left counts evaluations and checkpoints in, compilation out."""

    def __init__(self, num_steps: int, *, max_hours: float | None = None, window: int = 10) -> None:
        self._num_steps = num_steps
        self._time_limit_s = None if max_hours is None else max_hours * 3600
        self._recent: deque[StepEvent] = deque(maxlen=window)
        self._first: StepEvent | None = None

    def add(self, event: StepEvent) -> None:
        self._recent.append(event)
        # The first step of a process compiles, warms up and allocates: time is counted from its end.
        self._first = self._first or event

    def go_back(self) -> None:
        """Forgets the steps so far: those that follow have smaller numbers."""
        self._recent.clear()
        self._first = None

    @property
    def loss(self) -> float:
        """Mean loss; NaN as soon as one of the averaged losses is."""
        return sum(event.loss for event in self._recent) / len(self._recent)

    @property
    def tokens_per_s(self) -> float:
        seconds = sum(event.step_s for event in self._recent)
        return sum(event.tokens_per_s * event.step_s for event in self._recent) / seconds if seconds else 0.0

    @property
    def share_of_peak(self) -> float | None:
        """Mean share over the time of the steps; None where the device's peak is not known."""
        known = [(event.share_of_peak, event.step_s) for event in self._recent if event.share_of_peak is not None]
        seconds = sum(step_s for _, step_s in known)
        return sum(share * step_s for share, step_s in known) / seconds if seconds else None

    @property
    def num_refused(self) -> int:
        """Updates among the averaged steps that were not applied because they were not finite."""
        return sum(not event.is_finite for event in self._recent)

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step or the time limit, whichever comes first; None before the second step."""
        if self._first is None or self._recent[-1].step <= self._first.step:
            return None
        first, last = self._first, self._recent[-1]
        seconds_per_step = (last.elapsed_s - first.elapsed_s) / (last.step - first.step)
        left = (self._num_steps - last.step) * seconds_per_step
        if self._time_limit_s is not None:
            left = min(left, self._time_limit_s - last.elapsed_s)
        return max(left, 0.0)
