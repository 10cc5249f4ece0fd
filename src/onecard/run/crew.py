"""What the ranks of a run do together between two steps: samples, and the work of tasks that the leader deals out.

    leader     scores a checkpoint ── work ──► its share ┐                  ┌── work ──► … ── no more ──► goes on
    followers  wait for it ────────── work ──► their own ┴── all is told ───┴── work ──► … ── no more ──► go on

The leader alone has the task, its data and its scorer: what crosses are ids, and what was found of them.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from onecard.evaluation.work import Report, Work, read_work, write_work
from onecard.model.shortage import Shortage, attempt
from onecard.run.clock import Clock
from onecard.run.control import Control
from onecard.training.state import TrainState

Item = TypeVar("Item")

_WEIGHTS = "weights"


class InterruptedWorkError(Exception):
    """A rank is asked to stop while a task is measured."""


class Crew:
    """The ranks of a run, seen from one of them; one process alone does all itself."""

    def __init__(self, state: TrainState, tokenizer: PreTrainedTokenizerBase, clock: Clock, control: Control) -> None:
        self.state = state
        self.tokenizer = tokenizer
        self.clock = clock
        self.control = control
        self._ranks = state.ranks
        # A task may take hours; without one, whoever hangs is found after `ddp_timeout`.
        self._is_patient = bool(state.plan.eval_tasks)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Gives what of some items is for this rank: all of them where no rank has the whole model."""
        return list(items) if self.state.is_in_parts else self._ranks.share(items)

    def join(self, own: list[Item] | None) -> list[Item]:
        """Gives all ranks what they have made of their shares, in the order of the items; None of one that could not.

        Raises:
            MemoryError: one of them could not.
        """
        told = {"shortage": "no memory"} if own is None else {"found": own}
        return self._put_together([told] if self.state.is_in_parts else self._tell_all(told))

    def perform(self, work: Work, report: Report) -> list[Any]:
        """Does work as `Work.do`; of several ranks the leader calls this, and each does its share.

        Raises:
            InterruptedWorkError: a rank is asked to stop.
            MemoryError: a rank has not enough.
        """
        if not (self._ranks.is_several and work.can_be_shared):
            return work.do(self.state.model, self.tokenizer, report)
        self._ranks.hear_leader(write_work(work), is_patient=True)
        return self._put_together(self._do_share(work, report))

    def spread_weights(self) -> None:
        """Gives all ranks the leader's weights; the leader calls this."""
        if self._ranks.is_several:
            self._ranks.hear_leader(_WEIGHTS, is_patient=True)
            self._take_weights()

    def rejoin(self) -> None:
        """Lets the others do what the leader deals out, until it has nothing more, however long that takes."""
        if not self._ranks.is_several or self._ranks.is_leader:
            self._ranks.hear_leader(is_patient=self._is_patient)
            return
        with self.clock.stopped():  # the leader counts what of this counts
            while order := self._ranks.hear_leader(is_patient=self._is_patient):
                if order == _WEIGHTS:
                    self._take_weights()
                else:
                    self._do_share(read_work(order), self.refuse_interrupted)

    def refuse_interrupted(self, done: int, total: int) -> None:
        """Ends work where this rank is asked to stop.

        Raises:
            InterruptedWorkError: it is.
        """
        if self.control.stop:
            raise InterruptedWorkError

    def _do_share(self, work: Work, report: Report) -> list[dict[str, Any]]:
        """Does what of some work is for this rank; gives what all ranks tell of theirs."""
        own = work.take(slice(self._ranks.place.rank, None, self._ranks.num))
        do = partial(own.do, self.state.model, self.tokenizer, report)
        try:
            found = attempt(do, self.state.device) if own.items else []
            told: dict[str, Any] = {"shortage": found.evidence} if isinstance(found, Shortage) else {"found": found}
        except InterruptedWorkError:
            told = {"stopped": True}
        return self._tell_all(told)

    def _tell_all(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self._ranks.gather_texts(json.dumps(told), is_patient=self._is_patient)]

    def _put_together(self, everyone: list[dict[str, Any]]) -> list[Any]:
        if any("stopped" in told for told in everyone):
            self.control.stop = True  # also where it was another rank that was asked
            raise InterruptedWorkError
        for rank, told in enumerate(everyone):
            if "shortage" in told:
                raise MemoryError(f"{told['shortage']} (rank {rank} of {len(everyone)})")
        found: list[Any] = [None] * sum(len(told["found"]) for told in everyone)
        for rank, told in enumerate(everyone):
            found[rank :: len(everyone)] = told["found"]
        return found

    def _take_weights(self) -> None:
        # What adapters are attached to is the same in all checkpoints.
        is_adapted = self.state.plan.adapt is not None
        for weight in self.state.model.parameters():
            if weight.requires_grad or not is_adapted:
                self._ranks.take_leaders(weight)
