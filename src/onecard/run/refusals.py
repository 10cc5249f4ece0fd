"""Updates that were refused because loss or gradient was not finite: each row of them named, too many of them told."""

from collections.abc import Iterator, Sequence

from onecard.observe.detectors import as_event, make_finding, phrase
from onecard.observe.events import FindingEvent, StepEvent
from onecard.run.clock import Clock
from onecard.run.retreat import Trouble
from onecard.training.state import TrainState

# Of updates in a row. In fp16 the search for a loss scale that does not overflow takes up to 16 of them.
_TOO_MANY, _TOO_MANY_IN_FP16 = 5, 25


class Refusals:
    """Counts refused updates in a row, in the state, and says what is to be known of them."""

    def __init__(self, state: TrainState, clock: Clock) -> None:
        self._state = state
        self._elapsed = clock

    @property
    def limit(self) -> int:
        """So many in a row are too many; of a short run, half of its steps."""
        usual = _TOO_MANY_IN_FP16 if self._state.loss_scale.is_dynamic else _TOO_MANY
        return min(usual, max(2, self._state.plan.schedule.num_steps // 2))

    @property
    def are_too_many(self) -> bool:
        return self._state.progress.num_refused_in_a_row >= self.limit

    def watch(self, event: StepEvent) -> Iterator[FindingEvent]:
        """Counts an update; the first refused one of a row is named, so that its texts can be looked at."""
        progress = self._state.progress
        progress.num_refused_in_a_row = 0 if event.is_finite else progress.num_refused_in_a_row + 1
        # A loss scale that was too high is no news of the batch.
        is_usual = self._state.loss_scale.is_dynamic and event.loss == event.loss
        if progress.num_refused_in_a_row == 1 and not is_usual:
            finding = make_finding("update-refused", _describe(event), _replay(event.step))
            yield as_event(finding, event.step, self._elapsed())

    def trouble(self, event: StepEvent) -> Trouble:
        """Why a run goes back after too many."""
        return Trouble("not finite", "steps", self._evidence(event), is_poisoned=True, step=event.step)

    def last_finding(self, event: StepEvent, sick_ranks: Sequence[int] = ()) -> FindingEvent:
        """Why a run ends after too many; `sick_ranks` are those whose part of the loss was not finite."""
        num_retreats, first = self._state.progress.num_retreats, event.step - self.limit + 1
        # Where the recipe says stop, it went back for want of memory if at all.
        is_tried = self._state.plan.on_nonfinite != "stop" and num_retreats
        tried = f"; {phrase('gone-back', num=num_retreats)}" if is_tried else ""
        if sick_ranks:
            tried += f"; {phrase('not-finite-on', names=' and '.join(f'rank {rank}' for rank in sick_ranks))}"
        finding = make_finding("non-finite", self._evidence(event) + tried, _replay(first), stops_run=True)
        return as_event(finding, event.step, self._elapsed())

    def _evidence(self, event: StepEvent) -> str:
        refused, last = phrase("refused-in-a-row", num=self.limit), phrase("last-refused", step=event.step)
        return f"{refused}, {last}, {_describe(event)}"


def _replay(step: int) -> str:
    return f"`onecard replay RUN --step {step}`"


def _describe(event: StepEvent) -> str:
    loss, norm = phrase("loss", loss=f"{event.loss:g}"), phrase("gradient-norm", norm=f"{event.grad_norm:g}")
    return f"{loss}, {norm}"
