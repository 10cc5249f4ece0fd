"""A step of a run looked at again: which samples it was made of, where they come from, and what each costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from onecard.checkpoint import list_checkpoints, read_checkpoint, reading, step_of_folder
from onecard.data import NO_TARGET, Batch, ChatCorpus, TrainingData
from onecard.errors import CheckpointError, InputError
from onecard.evaluation.heldout import sum_rows
from onecard.model.decoder import Decoder
from onecard.observe.events import Event, RecoveredEvent, StepEvent
from onecard.report.record import RunRecord
from onecard.run.feed import stream_settings
from onecard.run.folder import RunFolder
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.snapshot import restore
from onecard.training.state import TrainState

_MOST_NAMED = 10


@dataclass(frozen=True)
class ReplayedSample:
    """A sample of a step: its source as the user wrote it, its place there, its text by what counts, and its loss.

    `loss` is the mean in nats over its targets without dropout; None where it was not asked for or nothing counts.
    """

    source: str
    place: str
    spans: tuple[tuple[str, bool], ...]
    num_target_tokens: int
    loss: float | None


@dataclass(frozen=True)
class ReplayedStep:
    """The samples of a step in their order, and what its record says; `weights` names those that losses are of."""

    step: int
    position: int
    recorded: StepEvent
    samples: tuple[ReplayedSample, ...]
    weights: str | None


def find_step(record: RunRecord, step: int) -> StepEvent:
    """Finds a step in the record of a run.

    Raises:
        InputError: it has not been made; says which steps were refused.
    """
    found = next((event for event in record.steps if event.step == step), None)
    if found is not None:
        return found
    refused = [str(event.step) for event in record.steps if not event.is_finite]
    made = f"its steps are 1 to {record.steps[-1].step}" if record.steps else "it has made none yet"
    named = f"; refused were {', '.join(refused[:_MOST_NAMED])}" if refused else ""
    raise InputError(f"--step {step}: {record.root} has made no such step, {made}{named}")


def position_of(plan: Plan, events: Sequence[Event], step: int) -> int:
    """How many samples come before those of a step: a run that went back may have skipped some."""
    base_step, base = 0, 0
    for event in events:
        if isinstance(event, RecoveredEvent) and event.position is not None and event.step < step:
            base_step, base = event.step, event.position
    return base + (step - 1 - base_step) * plan.total_batch_size


def replay_step(
    folder: RunFolder, plan: Plan, corpus: TrainingData, record: RunRecord, step: int, *, with_loss: bool
) -> ReplayedStep:
    """Shows the samples of a step; `with_loss` measures each with the newest weights from before it.

    Raises:
        InputError: there is no such step, or the text is another than the run's.
    """
    recorded = find_step(record, step)
    if corpus.fingerprint != plan.corpus.fingerprint:
        raise InputError(
            f"the text of {folder.root} has changed since it was trained on, so its steps cannot be shown: restore it"
        )
    position = position_of(plan, record.events, step)
    # Each sample by itself, so that it can be told from the others.
    alone = replace(stream_settings(plan), micro_batch_size=1, num_workers=0, packing="off", static_shapes=False)
    steps = corpus.steps(alone, plan.seed, plan.max_seq_length)
    sources, places = steps.locate(np.arange(position, position + plan.total_batch_size))
    batches = [steps.build(sources[index : index + 1], places[index : index + 1])[0] for index in range(len(sources))]
    losses, weights = _losses(folder, plan, batches, step) if with_loss else ([None] * len(batches), None)
    samples = tuple(
        ReplayedSample(
            source=corpus.names[source],
            place=_place(corpus, plan, place),
            spans=tuple(_spans(corpus, batch)),
            num_target_tokens=batch.num_targets,
            loss=loss,
        )
        for source, place, batch, loss in zip(sources.tolist(), places.tolist(), batches, losses, strict=True)
    )
    return ReplayedStep(step, position, recorded, samples, weights)


def _place(corpus: TrainingData, plan: Plan, place: int) -> str:
    if isinstance(corpus, ChatCorpus):
        return f"conversation {place + 1:,} to train on"
    return f"tokens {place:,} to {place + plan.max_seq_length:,}"


def _spans(corpus: TrainingData, batch: Batch) -> Iterator[tuple[str, bool]]:
    """Gives the text of a batch of one row in pieces that count or do not, each with whether it does."""
    length = batch.num_tokens
    ids, targets = batch.ids[0, :length].tolist(), batch.targets[0, :length].tolist()
    # The target of a place is the token after it; the last token is only ever a target.
    following = zip([*ids[1:], targets[-1]], targets, strict=True)
    tokens = [(ids[0], False), *((token, target != NO_TARGET) for token, target in following)]
    # Of text all counts but the first token, which nothing comes before.
    is_chat = isinstance(corpus, ChatCorpus)
    known = [(token, counts or not is_chat) for token, counts in tokens if token != NO_TARGET]
    for counts, group in groupby(known, key=lambda pair: pair[1]):
        yield corpus.tokenizer.decode([token for token, _ in group]), counts


def _losses(folder: RunFolder, plan: Plan, batches: Sequence[Batch], step: int) -> tuple[list[float | None], str]:
    state, weights = _weights_before(folder, plan, step)
    state.model.eval()
    decoder = Decoder(state.model, compiled=False)
    losses: list[float | None] = []
    for batch in batches:
        sum_B, _ = sum_rows(decoder, state.head, batch, plan.attn_implementation)
        losses.append(float(sum_B) / batch.num_targets if batch.num_targets else None)
    return losses, weights


def _weights_before(folder: RunFolder, plan: Plan, step: int) -> tuple[TrainState, str]:
    """Loads the newest checkpoint from before a step, or makes the weights that the run began with."""
    state = assemble(plan.model_copy(update={"torch_compile": False}))
    before: list[Path] = [path for path in list_checkpoints(folder.checkpoints) if step_of_folder(path) < step]
    for path in reversed(before):
        try:
            with reading(path):
                restore(state, read_checkpoint(path))
            return state, path.name
        except CheckpointError:
            continue
    return state, "the beginning"
