"""Steps of a run once more, from one of its checkpoints, beside what its record says of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.checkpoint import folder_of_step, list_checkpoints, read_checkpoint, reading, step_of_folder
from onecard.errors import InputError
from onecard.model.folder import load_adapter, load_masters
from onecard.observe.events import Event, RecoveredEvent, StepEvent
from onecard.report.record import read_runs
from onecard.run.changes import settle_corpus
from onecard.run.feed import Feed
from onecard.run.folder import RunFolder
from onecard.run.inputs import fetch_base_again, prepare_inputs
from onecard.run.replay import position_of
from onecard.run.session import explained_memory
from onecard.run.start import assemble_run
from onecard.run.stepping import make_step
from onecard.training.assemble import adopt
from onecard.training.snapshot import restore
from onecard.training.state import TrainState
from onecard.training.step import place

OnProgress = Callable[[str, int, int | None], None]

# Sums of a GPU come in any order: two uninterrupted runs differ by so much in 16 bits after some steps.
_TOLERANCE = 5e-3


@dataclass(frozen=True)
class StepPair:
    """Loss and gradient norm of a step, as recorded and as found now."""

    step: int
    loss: tuple[float, float]
    grad_norm: tuple[float, float]

    @property
    def difference(self) -> float:
        """The larger relative difference; of numbers that are none, which a refused step may have, there is none."""
        return max(_difference(*self.loss), _difference(*self.grad_norm))


def _difference(was: float, now: float) -> float:
    if was == now or not (math.isfinite(was) or math.isfinite(now)):
        return 0.0
    difference = abs(was - now) / max(abs(was), 1e-30)
    return difference if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Verification:
    """What came of repeating steps. `same_weights`: per checkpoint on the way, whether its tensors came out again."""

    checkpoint: str
    pairs: tuple[StepPair, ...]
    same_weights: dict[str, bool]
    is_exact: bool

    @property
    def is_same(self) -> bool:
        """Whether the run repeats itself: to the bit where it can, within what sums in another order do elsewhere."""
        worst = max(pair.difference for pair in self.pairs)
        return worst == 0 and all(self.same_weights.values()) if self.is_exact else worst <= _TOLERANCE

    def to_document(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self) | {"is_same": self.is_same}

    def describe(self) -> str:
        """The same in sentences."""
        first = next((pair for pair in self.pairs if pair.difference), None)
        lines = [f"repeated from {self.checkpoint}: steps {self.pairs[0].step} to {self.pairs[-1].step} of the record"]
        if first is None:
            lines.append("losses and gradient norms are the same to the bit")
        else:
            worst = max(pair.difference for pair in self.pairs)
            lines.append(
                f"they differ from step {first.step} on (loss {first.loss[0]!r} recorded, {first.loss[1]!r} now), by "
                f"{worst:.1e} at most"
            )
            if not self.is_exact:
                lines.append("on a GPU without `deterministic: true` sums come in any order, so that is expected")
            else:
                lines.append("this run should repeat itself: look at versions, threads and memory of this machine")
        for name, is_same in self.same_weights.items():
            lines.append(f"weights and moments {'are' if is_same else 'are NOT'} those of {name} to the bit")
        return "\n".join(lines)


def verify_run(
    run: RunFolder, checkpoint: Path | None, num_steps: int, progress: OnProgress | None = None
) -> Verification:
    """Repeats up to so many recorded steps from a checkpoint. Writes nothing into the run, and takes no lock of it.

    Raises:
        InputError: the record has no steps after the checkpoint, the text has changed, or the checkpoint is damaged.
        DoesNotFitError: there is no memory for it.
    """
    record = read_runs([run.root])[0]
    recorded = {event.step: event for event in record.steps}
    checkpoint = checkpoint or _find_start(run, max(recorded, default=0), num_steps)
    first = step_of_folder(checkpoint)
    steps = [recorded[step] for step in range(first + 1, first + num_steps + 1) if step in recorded]
    if not steps:
        raise InputError(f"the record of {run.root} has no steps after {checkpoint.name}: name an earlier checkpoint")
    with reading(checkpoint):  # the run may train on meanwhile
        plan, recipe = run.plan(checkpoint), run.recipe()
        corpus = prepare_inputs(recipe, fetch_base_again(recipe, plan, checkpoint, progress), progress)
        corpus, plan = settle_corpus(recipe, plan, corpus, checkpoint, ())
        with explained_memory():
            state = assemble_run(plan, corpus, checkpoint)
            restore(state, read_checkpoint(checkpoint))
    pairs, same_weights = [], {}
    with explained_memory(state), Feed(state, corpus) as feed:
        for pair in _repeat(state, feed, steps, record.events):
            pairs.append(pair)
            if (other := folder_of_step(run.checkpoints, pair.step)).is_dir():
                same_weights[other.name] = _has_state_of(state, other)
    return Verification(checkpoint.name, tuple(pairs), same_weights, plan.device == "cpu" or plan.deterministic)


def _find_start(run: RunFolder, last: int, num_steps: int) -> Path:
    found = [path for path in list_checkpoints(run.checkpoints) if step_of_folder(path) < last]
    if not found:
        raise InputError(
            f"{run.root} has no checkpoint with recorded steps after it, so there is nothing to repeat: let it train on"
        )
    enough = [path for path in found if step_of_folder(path) + num_steps <= last]
    return (enough or found)[-1]


def _repeat(state: TrainState, feed: Feed, steps: Sequence[StepEvent], events: Sequence[Event]) -> Iterator[StepPair]:
    """Makes steps again as they were made at last: with the samples, the rate and the micro-batch of that time."""
    plan, progress, first = state.plan, state.progress, state.progress.step
    recovered = [event for event in events if isinstance(event, RecoveredEvent) and event.step >= first]
    for was in steps:
        while recovered and recovered[0].step < was.step:
            adopt(state, state.plan.model_copy(update=recovered.pop(0).settings))
            feed.reopen()
        if (position := position_of(plan, events, was.step)) != progress.position:
            progress.position = position
            feed.reopen()
        micro_batches = [place(batch, state) for batch in next(feed)]
        stats = make_step(state, micro_batches, was.learning_rate)
        progress.step += 1
        progress.position += plan.total_batch_size
        loss, grad_norm = float(stats.loss), float(stats.gradient_norm)
        yield StepPair(was.step, (was.loss, loss), (was.grad_norm, grad_norm))


def _has_state_of(state: TrainState, folder: Path) -> bool:
    with reading(folder):
        return _is_same_state(state, folder)


def _is_same_state(state: TrainState, folder: Path) -> bool:
    checkpoint = read_checkpoint(folder)
    is_adapted = state.plan.adapt is not None
    masters = load_adapter(state.model, folder) if is_adapted else load_masters(folder)
    found = masters | checkpoint.tensors("optimizer")
    own = state.optimizer.masters | state.optimizer.state_tensors()
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name].detach().cpu()) for name in own)
