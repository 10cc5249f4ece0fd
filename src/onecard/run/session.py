"""A run from start to end: folder, lock, record, sinks, and the loop between them."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from onecard.checkpoint import Checkpoint, remove_leftovers
from onecard.data import TrainingData
from onecard.distributed.meeting import meeting
from onecard.errors import CheckpointError, DivergedError, DoesNotFitError
from onecard.model.shortage import is_out_of_memory
from onecard.observe.events import Event, FindingEvent, FinishedEvent, RecoveredEvent, StepEvent
from onecard.observe.jsonl import JsonlSink
from onecard.observe.sinks import SinkThatMayFail, make_sinks
from onecard.run.checkpoints import Checkpoints
from onecard.run.clock import Clock
from onecard.run.control import Control, stopping_on_signals
from onecard.run.crew import Crew
from onecard.run.device_loss import explained_device_loss
from onecard.run.feed import Feed
from onecard.run.folder import RunFolder
from onecard.run.judge import Judge
from onecard.run.loop import Loop
from onecard.run.milestones import Milestones
from onecard.run.observation import Observer
from onecard.run.recovery import Recovery
from onecard.run.retention import set_aside_after
from onecard.run.retreat import NoRetreat, Retreat, recorded_bytes, saved_event
from onecard.run.space import check_space
from onecard.run.start import load_start
from onecard.run.stay_awake import kept_awake
from onecard.run.tasks import RunTasks
from onecard.run.together import come_together, explained_rank_loss, give_order, on_own_card
from onecard.run.versions import record_versions
from onecard.spec import Plan
from onecard.training.state import TrainState

log = logging.getLogger("onecard.run")

OnEvent = Callable[[Event], None]


class Ending:
    """The steps that a session made, and the finding that stopped it, if one did."""

    def __init__(self, control: Control) -> None:
        self.steps: list[StepEvent] = []
        self._control = control
        self._finding: FindingEvent | None = None

    def hear(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self.steps.append(event)
        elif isinstance(event, FinishedEvent) and event.reason == "diverged":
            self._finding = self._control.finding

    def refuse_divergence(self) -> None:
        """Tells whoever called for the run of the finding that stopped it.

        Raises:
            DivergedError: one did; its record is whole.
        """
        if (found := self._finding) is not None:
            raise DivergedError(f"{found.symptom}: {found.evidence}. {found.remedy}")


def run_session(
    folder: RunFolder,
    corpus: TrainingData,
    checkpoint: Path | None,
    on_event: OnEvent | None,
    tasks: RunTasks | None = None,
    plan: Plan | None = None,
) -> Ending:
    """Trains in a locked run folder, from its plan's first step or from a checkpoint, until the plan is done.

    `tasks` score its checkpoints; `plan` is that of the checkpoint with what has changed since. Every event reaches the
    record `events.jsonl`, the sinks of the recipe and `on_event`, in this order.

    Raises:
        CheckpointError: the checkpoint is damaged, or the text has changed since.
        DivergedError: update after update had to be refused.
    """
    plan = on_own_card(plan or folder.plan(checkpoint), meeting().place)
    _check_corpus(plan, corpus)
    state, restored, probed = _make_state(plan, folder, corpus, checkpoint)
    with ExitStack() as stack:
        # A run that died before its first checkpoint begins its record anew.
        was_begun = folder.has_record()
        record = JsonlSink(folder.events, truncate_at=recorded_bytes(restored) if restored else 0)
        stack.callback(record.close)
        record_versions(folder.root, state.progress.step)
        sinks = _open_sinks(stack, folder, plan, state.progress.step if was_begun else None)
        control = Control()
        stack.enter_context(stopping_on_signals(control))
        stack.enter_context(kept_awake())
        feed = stack.enter_context(Feed(state, corpus))
        clock = Clock(state.progress.elapsed_s)
        checkpoints = Checkpoints(state, corpus.tokenizer, folder, clock, record)
        crew = Crew(state, corpus.tokenizer, clock, control)
        judge = Judge(crew, folder, tasks) if tasks is not None else None
        milestones = Milestones(crew, corpus, checkpoints, judge)
        observer = Observer(plan, folder.recipe(), folder.events, control)
        retreat = Retreat(state, folder, record, feed, milestones, clock) if not state.ranks.is_several else NoRetreat()
        ending = Ending(control)
        hearers: list[OnEvent] = [ending.hear, record.receive, partial(_note_retreat, folder.root)]
        hearers += [sink.receive for sink in sinks] + ([on_event] if on_event else [])
        with explained_rank_loss(state), explained_memory(state), explained_device_loss(state.device, state):
            before = milestones.catch_up(saved_event(state, restored))
            events = chain(before, probed, Loop(state, milestones, control, clock, retreat).run(feed))
            for event in observer.watch(_with_last_save(events, checkpoints)):
                for hear in hearers:
                    hear(event)
        return ending


def _make_state(
    plan: Plan, folder: RunFolder, corpus: TrainingData, checkpoint: Path | None
) -> tuple[TrainState, Checkpoint | None, list[Event]]:
    """Loads what a run goes on from and tries whether it has room; only then newer checkpoints are set aside."""
    remove_leftovers(folder.checkpoints)
    check_space(folder.checkpoints, plan)
    give_order(folder, checkpoint, plan)
    with explained_memory(), explained_device_loss(torch.device(plan.device)):
        start = load_start(plan, corpus, checkpoint)
    state, restored = start.state, start.restored
    probed = [] if start.is_hollow else probe(state)
    come_together(state, folder.recipe(), corpus.fingerprint)
    if start.is_hollow:
        with explained_rank_loss(state), explained_memory(), explained_device_loss(state.device, state):
            start.share_out()
        probed = probe(state)
    if restored is not None:
        set_aside_after(restored.folder)
    return state, restored, probed


def probe(state: TrainState) -> list[Event]:
    """Tries on a GPU whether the run has room; of a state in parts all ranks have to."""
    if state.device.type != "cuda":
        return []
    with explained_rank_loss(state), explained_memory(state), explained_device_loss(state.device, state):
        return list(Recovery(state, Clock(state.progress.elapsed_s)).probe())


def _with_last_save(events: Iterator[Event], checkpoints: Checkpoints) -> Iterator[Event]:
    """Lets a checkpoint that is being written come to its end where the run ends by an error."""
    try:
        yield from events
    except Exception:
        yield from checkpoints.settle()
        raise


def _open_sinks(stack: ExitStack, folder: RunFolder, plan: Plan, resumed_at: int | None) -> list[SinkThatMayFail]:
    recipe = folder.recipe()
    sinks = make_sinks(
        recipe.report_to,
        folder.root,
        run_name=recipe.run_name,
        config=plan.model_dump(mode="json"),
        resumed_at=resumed_at,
    )
    bearing = [SinkThatMayFail(sink) for sink in sinks]
    for sink in bearing:
        stack.callback(sink.close)
    return bearing


def _note_retreat(root: Path, event: Event) -> None:
    """Writes down that steps are made anew with what this process has; others may have made them at first."""
    if isinstance(event, RecoveredEvent) and event.returned_from is not None:
        with contextlib.suppress(OSError):  # of a full disk others tell
            record_versions(root, event.step)


def _check_corpus(plan: Plan, corpus: TrainingData) -> None:
    if corpus.fingerprint != plan.corpus.fingerprint:
        raise CheckpointError(
            "the training text, its split, its tokenizer or its chat template has changed since this run began, so it "
            "cannot be continued exactly: restore it, or start a new run with `onecard train`"
        )


@contextmanager
def explained_memory(state: TrainState | None = None) -> Iterator[None]:
    """Turns memory that ran out, at a step of `state` or while it is being loaded, into a `DoesNotFitError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if state is None:
            raise DoesNotFitError(
                "memory ran out while the run was being loaded: close what else uses it, on the card and on the host, "
                "and resume"
            ) from error
        plan = state.plan
        raise DoesNotFitError(
            f"memory ran out after step {state.progress.step} with per_device_train_batch_size "
            f"{plan.micro_batch_size}: start again with half of it and twice the gradient_accumulation_steps, or with "
            "gradient_checkpointing true"
        ) from error
