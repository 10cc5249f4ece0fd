"""What the ranks of a run do together between two steps: evaluation, samples, and what the leader deals out of tasks.

    leader     scores a checkpoint ── work ──► its share ┐                  ┌── work ──► … ── no more ──► goes on
    followers  wait for it ────────── work ──► their own ┴── all is told ───┴── work ──► … ── no more ──► go on

The leader alone has the task, its data and its scorer: what crosses are ids, and what was found of them.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from onecard.data import Batch
from onecard.errors import CheckpointError
from onecard.evaluation.heldout import HeldoutLoss, measure_blocks, summarize
from onecard.evaluation.paired import Items
from onecard.evaluation.work import Report, Work, read_work, write_work
from onecard.model.folder import load_adapter
from onecard.model.in_place import load_in_place
from onecard.model.shortage import Shortage, attempt
from onecard.run.clock import Clock
from onecard.run.control import Control
from onecard.training.sharded import Shards
from onecard.training.state import TrainState

Item = TypeVar("Item")

# What no written work begins with.
_WEIGHTS = "weights of "


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

    def measure_heldout_loss(self, batches: Iterable[Batch]) -> HeldoutLoss:
        """Measures the held-out loss, each rank over its share of the batches."""
        state, ranks = self.state, self._ranks
        own = islice(batches, ranks.place.rank, None, ranks.num)
        blocks = state.inside(lambda: measure_blocks(state.model, state.head, own, state.plan.attn_implementation))
        if ranks.is_several:
            rows = torch.stack([torch.from_numpy(blocks.sums), torch.from_numpy(blocks.counts).double()], dim=1)
            sums, counts = ranks.gather_rows(rows).numpy().T
            blocks = Items(sums, counts.astype(int))
        return summarize(blocks)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Gives what of some items is for this rank."""
        return self._ranks.share(items)

    def join(self, own: list[Item] | None) -> list[Item]:
        """Gives all ranks what they have made of their shares, in the order of the items; None of one that could not.

        Raises:
            MemoryError: one of them could not.
        """
        return self._put_together(self._tell_all({"shortage": "no memory"} if own is None else {"found": own}))

    def perform(self, work: Work, report: Report) -> list[Any]:
        """Does work as `Work.do`; of several ranks the leader calls this, and each does its share.

        Raises:
            InterruptedWorkError: a rank is asked to stop.
            MemoryError: a rank has not enough.
        """
        if not self._ranks.is_several:
            return work.do(self.state.model, self.tokenizer, report)
        self._ranks.hear_leader(write_work(work), is_patient=True)
        return self._put_together(self._do_share(work, report))

    def load_weights(self, folder: Path) -> None:
        """Puts the weights of a checkpoint into the model, on all ranks; the leader calls this.

        Raises:
            CheckpointError: it is damaged, or holds another model.
        """
        if not self.state.is_in_parts:
            _load_whole(self.state, folder)
        if self._ranks.is_several:
            self._ranks.hear_leader(f"{_WEIGHTS}{folder.absolute()}", is_patient=True)
            self._take_weights(folder)

    def rejoin(self) -> None:
        """Lets the others do what the leader deals out, until it has nothing more, however long that takes."""
        if not self._ranks.is_several or self._ranks.is_leader:
            self._ranks.hear_leader(is_patient=self._is_patient)
            return
        with self.clock.stopped():  # the leader counts what of this counts
            while order := self._ranks.hear_leader(is_patient=self._is_patient):
                if order.startswith(_WEIGHTS):
                    self._take_weights(Path(order.removeprefix(_WEIGHTS)))
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

        def do() -> list[Any]:
            return own.do(self.state.model, self.tokenizer, report) if own.items else []

        try:
            found = attempt(lambda: self.state.inside(do), self.state.device)
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

    def _take_weights(self, folder: Path) -> None:
        """Takes the weights of a checkpoint from the leader, who has loaded them, or a part of them from its files."""
        if isinstance(self.state.spread, Shards):
            self.state.spread.read(folder, with_moments=False)
            return
        # What adapters are attached to is the same in all checkpoints.
        is_adapted = self.state.plan.adapt is not None
        for weight in self.state.model.parameters():
            if weight.requires_grad or not is_adapted:
                self._ranks.take_leaders(weight)


def _load_whole(state: TrainState, folder: Path) -> None:
    if state.plan.adapt is None:
        if not load_in_place(state.model, folder):
            raise CheckpointError(f"{folder} holds another model than this run trains: evaluate it by itself")
        return
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_adapter(state.model, folder).items():
            parameters[name].copy_(tensor)
