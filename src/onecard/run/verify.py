"""Steps of a run once more, from one of its checkpoints, beside what its record says of them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.checkpoint import folder_of_step, list_checkpoints, read_checkpoint, step_of_folder
from onecard.errors import InputError
from onecard.model.decoder import CompilerError
from onecard.model.folder import load_adapter, load_masters
from onecard.observe.events import StepEvent
from onecard.report.record import read_runs
from onecard.run.changes import settle_corpus
from onecard.run.feed import Feed
from onecard.run.folder import RunFolder
from onecard.run.inputs import fetch_base_again, prepare_inputs
from onecard.run.loop import seed_step
from onecard.run.session import assemble_run
from onecard.spec import Plan
from onecard.training.schedule import rate_at
from onecard.training.snapshot import restore
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

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
        """The larger relative difference."""
        pairs = (self.loss, self.grad_norm)
        return max(0.0 if was == now else abs(was - now) / max(abs(was), 1e-30) for was, now in pairs)


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
        lines = [f"{len(self.pairs)} steps repeated from {self.checkpoint}, steps {self.pairs[0].step} to "]
        lines[0] += f"{self.pairs[-1].step} of the record"
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
    """
    recorded = {event.step: event for event in read_runs([run.root])[0].of(StepEvent)}
    checkpoint = checkpoint or _find_start(run, max(recorded, default=0), num_steps)
    first = step_of_folder(checkpoint)
    steps = [step for step in range(first + 1, first + num_steps + 1) if step in recorded]
    if not steps:
        raise InputError(f"the record of {run.root} has no steps after {checkpoint.name}: name an earlier checkpoint")
    plan, recipe = run.plan(checkpoint), run.recipe()
    corpus = prepare_inputs(recipe, fetch_base_again(recipe, plan, checkpoint, progress), progress)
    corpus, plan = settle_corpus(recipe, plan, corpus, checkpoint, ())
    state = assemble_run(plan, corpus, checkpoint)
    restore(state, read_checkpoint(checkpoint))
    pairs, same_weights = [], {}
    with Feed(state, corpus) as feed:
        for step, loss, grad_norm in _repeat(state, feed, len(steps)):
            was = recorded[step]
            pairs.append(StepPair(step, (was.loss, loss), (was.grad_norm, grad_norm)))
            if (other := folder_of_step(run.checkpoints, step)).is_dir():
                same_weights[other.name] = _has_state_of(state, other)
    return Verification(checkpoint.name, tuple(pairs), same_weights, plan.device == "cpu" or plan.deterministic)


def _find_start(run: RunFolder, last: int, num_steps: int) -> Path:
    found = [path for path in list_checkpoints(run.checkpoints) if step_of_folder(path) < last]
    if not found:
        raise InputError(f"{run.root} has no checkpoint with recorded steps after it, so there is nothing to repeat")
    enough = [path for path in found if step_of_folder(path) + num_steps <= last]
    return (enough or found)[-1]


def _repeat(state: TrainState, feed: Feed, num_steps: int) -> Iterator[tuple[int, float, float]]:
    plan: Plan = state.plan
    for _ in range(num_steps):
        micro_batches = [place(batch, state) for batch in next(feed)]
        rate = plan.optimizer.learning_rate * rate_at(plan.schedule, state.progress.step) * state.progress.rate_factor
        seed_step(plan.seed, state.progress.step)
        limit = plan.optimizer.max_grad_norm
        try:
            stats = train_step(state, micro_batches, rate, max_grad_norm=limit)
        except CompilerError:  # as the loop does, which tells of it
            state.decoder.to_eager()
            state.optimizer.zero_grad()
            stats = train_step(state, micro_batches, rate, max_grad_norm=limit)
        state.progress.step += 1
        state.progress.position += plan.total_batch_size
        yield state.progress.step, float(stats.loss), float(stats.gradient_norm)


def _has_state_of(state: TrainState, folder: Path) -> bool:
    checkpoint = read_checkpoint(folder)
    is_adapted = state.plan.adapt is not None
    masters = load_adapter(state.model, folder) if is_adapted else load_masters(folder)
    found = masters | checkpoint.tensors("optimizer")
    own = state.optimizer.masters | state.optimizer.state_tensors()
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name].detach().cpu()) for name in own)
