"""How the processes of a run begin, go on and end together; one process agrees with itself."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch

from onecard.distributed.meeting import DismissedError, meeting
from onecard.distributed.place import Place, find_place, is_launched
from onecard.distributed.ranks import Lost, Ranks, is_from_group
from onecard.errors import DoesNotFitError, InputError, OnecardError, RankLostError
from onecard.observe.events import FinishReason
from onecard.run.folder import RunFolder
from onecard.run.versions import find_versions
from onecard.spec import Plan, Recipe
from onecard.training.spread import spread
from onecard.training.state import TrainState

# What must be the same everywhere, or the ranks compute different things.
_COMPARED = ("onecard", "torch", "transformers")
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


def check_same(ranks: Ranks, corpus_fingerprint: str, device: torch.device) -> None:
    """Refuses to train where ranks would compute different things.

    Raises:
        InputError: names the ranks that differ from rank 0, and in what; raised on all of them.
    """
    own = {name: value for name, value in find_versions().items() if name in _COMPARED}
    own["training text"] = corpus_fingerprint
    own["card"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = [json.loads(text) for text in ranks.gather_texts(json.dumps(own))]
    problems = [
        f"rank {rank} has another {name} than rank 0: {found.get(name)}, not {first}"
        for name, first in facts[0].items()
        for rank, found in enumerate(facts)
        if found.get(name) != first
    ]
    if problems:
        raise InputError("\n".join(["the processes of this run do not agree:", *(f"  - {text}" for text in problems)]))


def check_cards(plan: Plan, place: Place) -> None:
    """Refuses more processes on a machine than it has cards.

    Raises:
        InputError: each process needs one of its own.
    """
    if plan.device.startswith("cuda") and place.num_local_ranks > (num := torch.cuda.device_count()):
        raise InputError(
            f"{place.num_local_ranks} processes on this machine need as many cards, it has {num}: start at most "
            f"{num}, or look at CUDA_VISIBLE_DEVICES"
        )


def on_own_card(plan: Plan, place: Place) -> Plan:
    """The plan for the card of this process: of several each takes that of its number on its machine."""
    if place.num_ranks == 1 or not plan.device.startswith("cuda"):
        return plan
    return plan.model_copy(update={"device": f"cuda:{place.local_rank}"})


def give_order(folder: RunFolder, checkpoint: Path | None, plan: Plan) -> None:
    """Tells the other processes which run they train, from which checkpoint, and by which plan."""
    check_cards(plan, meeting().place)
    root = str(folder.root.absolute())
    start = None if checkpoint is None else str(checkpoint.absolute())
    order = {"root": root, "checkpoint": start, "plan": plan.model_dump(mode="json")}
    meeting().give_order(order, folder.recipe().ddp_timeout)


def come_together(state: TrainState, recipe: Recipe, corpus_fingerprint: str) -> None:
    """Lets a state be trained by all ranks that have the leader's order; nothing where there is one process.

    Raises:
        InputError: they differ, or not all have come.
    """
    place = meeting().place
    if place.num_ranks == 1:
        return
    device = torch.device(state.plan.device)  # a hollow state is on none yet
    ranks = meeting().begin(device, recipe.ddp_timeout)
    try:
        check_same(ranks, corpus_fingerprint, device)
    except InputError as error:  # which all of them raise
        if ranks.is_leader:
            raise
        raise DismissedError(error.exit_code) from error
    if device.type == "cpu" and state.plan.num_threads is not None:
        torch.set_num_threads(max(1, state.plan.num_threads // place.num_local_ranks))
    spread(state, ranks)


def agree_on_end(ranks: Ranks, reason: FinishReason | None) -> FinishReason | None:
    """Gives all ranks one reason to end where any has one; None where none has."""
    found = ranks.largest(0 if reason is None else 1 + _REASONS.index(reason))
    return _REASONS[found - 1] if found else None


def find_sick(ranks: Ranks, is_well: bool) -> list[int]:
    """Gives all ranks the numbers of those that are not well, unless all are alike, which says nothing of any."""
    rows = ranks.gather_rows(torch.tensor([[is_well]], dtype=torch.int64)).flatten().tolist()
    sick = [rank for rank, well in enumerate(rows) if not well]
    return sick if len(sick) < len(rows) else []


def refuse_on_one_rank() -> None:
    """Refuses to change how one rank computes: the others know nothing of it.

    Raises:
        DoesNotFitError: there are others.
    """
    place = find_place()  # the leader tries its memory before the ranks of its state have come together
    if place.num_ranks > 1:
        raise DoesNotFitError(
            f"memory ran out on {place}: resume with half of per_device_train_batch_size, with "
            "gradient_checkpointing true, or on more cards; the last checkpoint is whole"
        )


@contextmanager
def explained_rank_loss(state: TrainState) -> Iterator[None]:
    """Lets all ranks end where one does: with one message, of the rank that knows the cause or saw the loss first.

    Raises:
        RankLostError: a rank is gone or does not answer.
        DismissedError: another rank tells of it.
    """
    try:
        yield
    except Exception as error:
        ranks = state.ranks
        if not ranks.is_several:
            raise
        if not (isinstance(error, RuntimeError) and is_from_group(error)):
            ranks.tell_end(error.exit_code if isinstance(error, OnecardError) else OnecardError.exit_code)
            raise
        lost = ranks.find_lost(error)
        is_told = bool(lost.ended) or (is_launched() and not lost.hangs)
        if is_told or ranks.place.rank != min(lost.here, default=ranks.place.rank):
            raise DismissedError(max(lost.ended.values(), default=RankLostError.exit_code)) from error
        raise RankLostError(_describe_loss(state, lost)) from error


def _describe_loss(state: TrainState, lost: Lost) -> str:
    names = " and ".join(f"rank {rank}" for rank in lost.silent) or "another rank"
    if lost.hangs:
        found = "did not answer in time (ddp_timeout): it hangs, or its machine cannot be reached"
    else:
        found = "is gone: it was killed, or its machine cannot be reached"
    return (
        f"{names} of {state.ranks.num} {found}, after step {state.progress.step}. All ranks stop; the last checkpoint "
        "is whole"
    )
