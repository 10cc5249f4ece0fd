"""What in a run several ranks decide or do together; of one process it is what that process says."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import get_args

import torch

from onecard.data import Batch
from onecard.distributed.place import find_place
from onecard.distributed.ranks import Ranks
from onecard.errors import DoesNotFitError
from onecard.evaluation.heldout import HeldoutLoss, measure_blocks, summarize
from onecard.evaluation.paired import Items
from onecard.observe.events import FinishReason
from onecard.training.spread import without_targets
from onecard.training.state import TrainState

_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


def agree_on_end(ranks: Ranks, reason: FinishReason | None) -> FinishReason | None:
    """Gives all ranks one reason to end where any has one; None where none has."""
    found = ranks.largest(0 if reason is None else 1 + _REASONS.index(reason))
    return _REASONS[found - 1] if found else None


def find_sick(ranks: Ranks, is_well: bool) -> list[int]:
    """Gives all ranks the numbers of those that are not well, unless all are alike, which says nothing of any."""
    rows = ranks.gather_rows(torch.tensor([[is_well]], dtype=torch.int64)).flatten().tolist()
    sick = [rank for rank, well in enumerate(rows) if not well]
    return sick if len(sick) < len(rows) else []


def measure_heldout_loss(state: TrainState, batches: Iterable[Batch]) -> HeldoutLoss:
    """Measures the held-out loss, of several ranks by each over its share of the batches."""
    ranks, backend = state.ranks, state.plan.attn_implementation
    # In parts, each layer is gathered from all ranks, which so have to make as many passes.
    own = _in_step(batches, ranks) if state.is_in_parts else islice(batches, ranks.place.rank, None, ranks.num)
    blocks = state.inside(lambda: measure_blocks(state.model, state.head, own, backend))
    if ranks.is_several:
        rows = torch.stack([torch.from_numpy(blocks.sums), torch.from_numpy(blocks.counts).double()], dim=1)
        sums, counts = ranks.gather_rows(rows).numpy().T
        blocks = Items(sums[counts > 0], counts[counts > 0].astype(int))  # those that fill a place have none
    return summarize(blocks)


def _in_step(batches: Iterable[Batch], ranks: Ranks) -> Iterator[Batch]:
    """This rank's share, filled up to that of the others."""
    remaining = iter(batches)
    while group := list(islice(remaining, ranks.num)):
        yield group[ranks.place.rank] if ranks.place.rank < len(group) else without_targets(group[-1])


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
