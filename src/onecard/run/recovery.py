"""When memory runs out in a run: the same again with less at once. The last resort, for plan and probe prevent it.

what ran out      what is done instead                                        kept in the state
a step            half the micro-batch ─► recompute all ─► fewer logits       yes, by its plan
an evaluation     half the batch, the same rows                               yes, by its plan
samples           half as many prompts at once                                no
a save            once more, with everything unused given back                –
an update         torn: the run goes back to a checkpoint (retreat.py)        –
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from onecard.errors import DoesNotFitError
from onecard.model.shortage import Shortage, attempt
from onecard.observe.detectors import as_event, make_finding, phrase
from onecard.observe.events import Event, FindingEvent, RecoveredEvent
from onecard.run.clock import Clock
from onecard.run.probe import probe_evaluation, probe_step
from onecard.run.together import refuse_on_one_rank
from onecard.spec.fallback import Fallback, find_smaller_evaluation, find_smaller_step
from onecard.training.assemble import adopt
from onecard.training.state import TrainState

Result = TypeVar("Result")

_LEFT_OUT = {"evaluation": "no-evaluation", "samples": "no-samples", "checkpoint": "no-checkpoint"}


@dataclass(frozen=True)
class Instead:
    """What is done instead of something that had no room, and the settings of the plan that changed for it."""

    remedy: str
    settings: dict[str, Any] = field(default_factory=dict)


class Recovery:
    """Does things again with less at once where memory runs out, and tells of it."""

    def __init__(self, state: TrainState, clock: Clock) -> None:
        self._state = state
        self._elapsed = clock

    def probe(self) -> Iterator[Event]:
        """Tries the fullest moments of the run, with less at once until they fit.

        Raises:
            DoesNotFitError: they do not, however small.
        """
        while isinstance(shortage := attempt(partial(probe_step, self._state), self._state.device), Shortage):
            if self._state.is_updating:
                raise DoesNotFitError(
                    f"memory ran out in an update, whatever the batch ({shortage.evidence}): close what else uses it, "
                    "use a smaller optim, or method lora"
                )
            yield self.split_step(shortage)
        yield from self.insist("evaluation", partial(probe_evaluation, self._state), self.shrink_evaluation)

    def split_step(self, shortage: Shortage) -> RecoveredEvent:
        """Lets the step that ran out of memory be repeated with less at once: same samples, same gradient.

        Raises:
            DoesNotFitError: there is nothing left to be made smaller.
        """
        held_bytes = self.held(shortage)
        self._state.optimizer.forget_gradients()  # those of the micro-batches that were done
        if (instead := self.shrink_step()) is None:
            raise DoesNotFitError(
                f"memory ran out at step {self._state.progress.step + 1} with the smallest step there is, one sequence "
                f"at a time with all activations recomputed ({shortage.evidence}): close what else uses the memory "
                "and resume, or start again with a shorter max_seq_length, a smaller optim, or method lora"
            )
        return self.tell("step", shortage, instead, held_bytes)

    def shrink_step(self) -> Instead | None:
        """Adopts the next smaller step of the plan; None where there is none."""
        return self._adopt(find_smaller_step(self._state.plan))

    def shrink_evaluation(self) -> Instead | None:
        """Adopts smaller batches for evaluation; None where they have one row."""
        return self._adopt(find_smaller_evaluation(self._state.plan))

    def _adopt(self, fallback: Fallback | None) -> Instead | None:
        refuse_on_one_rank()
        if fallback is None:
            return None
        instead = Instead(f"repeated with {fallback.describe(self._state.plan)}", fallback.settings)
        adopt(self._state, fallback.plan)
        return instead

    def insist(
        self, during: str, do: Callable[[], Result], reduce: Callable[[], Instead | None]
    ) -> Generator[RecoveredEvent | FindingEvent, None, Result | None]:
        """Does something, with less at once whenever memory runs out; gives None where it cannot become less."""
        while isinstance(result := attempt(do, self._state.device), Shortage):
            held_bytes = self.held(result)
            if (instead := reduce()) is None:
                yield self.left_out(during, result)
                return None
            yield self.tell(during, result, instead, held_bytes)
        return result

    def held(self, shortage: Shortage) -> dict[str, int]:
        """Says who held the memory: what the allocator knew, and what of it the state has now."""
        return shortage.held_bytes | held_by(self._state)

    def tell(
        self,
        during: str,
        shortage: Shortage,
        instead: Instead,
        held_bytes: dict[str, int],
        step: int | None = None,
    ) -> RecoveredEvent:
        """Tells that something was done with less, at this step or at the one that is given."""
        return RecoveredEvent(
            step=self._state.progress.step if step is None else step,
            elapsed_s=self._elapsed(),
            problem="out of memory",
            during=during,
            evidence=shortage.evidence,
            remedy=instead.remedy,
            settings=instead.settings,
            held_bytes=held_bytes,
        )

    def left_out(self, during: str, shortage: Shortage, step: int | None = None) -> FindingEvent:
        """Tells that something was not done at this step, or at the one that is given."""
        finding = make_finding("left-out", phrase(_LEFT_OUT[during], error=shortage.evidence), "")
        return as_event(finding, self._state.progress.step if step is None else step, self._elapsed())


def held_by(state: TrainState) -> dict[str, int]:
    """Counts the bytes of what a state holds: weights, masters beside them, gradients and moments."""
    parameters, masters = list(state.model.parameters()), list(state.optimizer.masters.values())
    own = {tensor.data_ptr() for tensor in parameters}
    groups = {
        "weights": parameters,
        "masters": [master for master in masters if master.data_ptr() not in own],
        "gradients": [master.grad for master in masters if master.grad is not None],
        "moments": list(state.optimizer.state_tensors().values()),
    }
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in groups.items()}
