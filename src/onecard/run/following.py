"""A run in a process that does not lead it: the same loop over its share of the micro-batches, and nothing told.

It keeps no record and writes no checkpoint; of samples and tasks it does its share for the leader, and what it hears of
the run it drops.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from onecard.distributed.meeting import DismissedError, meeting
from onecard.errors import DivergedError, OnecardError
from onecard.observe.events import Event, SaveReason
from onecard.run.changes import settle_corpus
from onecard.run.clock import Clock
from onecard.run.control import Control, stopping_on_signals
from onecard.run.crew import Crew
from onecard.run.device_loss import explained_device_loss
from onecard.run.feed import Feed
from onecard.run.folder import RunFolder
from onecard.run.inputs import OnProgress, fetch_base_again, prepare_inputs
from onecard.run.loop import Loop
from onecard.run.milestones import Milestones
from onecard.run.retreat import NoRetreat
from onecard.run.session import explained_memory, probe
from onecard.run.start import load_start
from onecard.run.together import check_cards, come_together, explained_rank_loss, on_own_card
from onecard.spec import Plan
from onecard.training.state import TrainState


class NoCheckpoints:
    """Stands where the leader keeps the checkpoints of a run."""

    def __init__(self, state: TrainState, folder: RunFolder) -> None:
        self._state = state
        self.root = folder.checkpoints
        self.leading: Callable[[], set[int]] = set

    def is_overdue(self) -> bool:
        return False

    def save(self, reason: SaveReason) -> Iterator[Event]:
        self._state.gather()  # to which each rank gives its part
        yield from ()

    def settle(self, *, waits: bool = True) -> Iterator[Event]:
        yield from ()


def follow(asked: Mapping[str, Any], on_progress: OnProgress | None = None) -> Path:
    """Trains with the others as the leader orders, until it ends; gives the folder of the run.

    `asked` is what this rank was started for, as plain data.

    Raises:
        DismissedError: the leader or another rank has ended and says why.
        OnecardError: this rank cannot go on.
    """
    place = meeting().place
    order = meeting().await_order(asked)
    try:
        _train(order["root"], order["checkpoint"], Plan.model_validate(order["plan"]), on_progress)
    except DismissedError:
        raise
    except DivergedError as error:  # as all others at the same step
        raise DismissedError(error.exit_code) from error
    except OnecardError as error:
        if str(place) not in str(error):
            error.args = (f"{place}: {error}",)
        raise
    return Path(order["root"])


def _train(root: str, start: str | None, plan: Plan, on_progress: OnProgress | None) -> None:
    folder, checkpoint = RunFolder.open(Path(root)), None if start is None else Path(start)
    check_cards(plan, meeting().place)
    plan = on_own_card(plan, meeting().place)
    recipe = folder.recipe()
    corpus = prepare_inputs(recipe, fetch_base_again(recipe, plan, checkpoint, on_progress), on_progress)
    corpus, plan = settle_corpus(recipe, plan, corpus, checkpoint, ())
    with explained_memory(), explained_device_loss(torch.device(plan.device)):
        begun = load_start(plan, corpus, checkpoint)
    state = begun.state
    come_together(state, recipe, corpus.fingerprint)
    if begun.is_hollow:
        with explained_rank_loss(state), explained_memory():
            begun.share_out()
        probe(state)
    with ExitStack() as stack:
        control = Control()
        stack.enter_context(stopping_on_signals(control))
        feed = stack.enter_context(Feed(state, corpus))
        clock = Clock(state.progress.elapsed_s)
        crew = Crew(state, corpus.tokenizer, clock, control)
        milestones = Milestones(crew, corpus, NoCheckpoints(state, folder), None)
        for context in (explained_rank_loss(state), explained_memory(state)):
            stack.enter_context(context)
        loop = Loop(state, milestones, control, clock, NoRetreat())
        for _ in chain(milestones.catch_up(None), loop.run(feed)):
            pass
