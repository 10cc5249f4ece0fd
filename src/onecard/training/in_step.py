"""Work of ranks that each have their own, where no pass can be made by one alone: each layer is gathered from all.

    rank 0   pass ── pass ── done ── empty ── empty ──┐
    rank 1   pass ── pass ── pass ── pass ── done ────┴── all are done

Before each pass all ranks say whether they have one to make. Whoever has none left makes an empty one with the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from onecard.distributed.ranks import Ranks
from onecard.errors import DoesNotFitError
from onecard.model.attention import attention_of
from onecard.model.batching import suits
from onecard.model.decoder import Decoder
from onecard.model.generate import plainly
from onecard.model.shortage import is_out_of_memory
from onecard.training.state import Found, TrainState


def do_in_step(state: TrainState, run: Callable[[], Found]) -> Found:
    """Does the work of this rank, with as many passes as any rank makes; all ranks have to call it.

    What the work raises between two passes, it raises once all are done.

    Raises:
        DoesNotFitError: memory ran out within a pass, in which the others wait for this rank.
    """
    # It tries passes of which some may fail, on all ranks alike, and remembers what came of it.
    suits(state.model)
    passes = _Passes(state.ranks)
    try:
        with passes.announced(state.model.base_model):
            found = run()
    except Exception as error:
        if not passes.is_within:
            _go_with_others(state)
            raise
        # The others are amid that pass: nothing can be done together any more.
        if is_out_of_memory(error):
            raise _without_memory() from None  # what is caused by a shortage would be taken for one
        raise
    _go_with_others(state)
    return found


class _Passes:
    """Says before each pass of this rank that there is one; `is_within`: one has begun and not ended."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.is_within = False

    @contextmanager
    def announced(self, decoder: nn.Module) -> Iterator[None]:
        """Lets each pass of a decoder begin with those of the others."""
        hooks = [decoder.register_forward_pre_hook(self._begin), decoder.register_forward_hook(self._end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, *_: object) -> None:
        if self.is_within:  # work that tries again with less cannot know that the others are amid the pass
            raise _without_memory()
        self._ranks.largest(1)
        self.is_within = True

    def _end(self, *_: object) -> None:
        self.is_within = False


def _go_with_others(state: TrainState) -> None:
    ids_11 = torch.zeros((1, 1), dtype=torch.int64, device=state.plan.device)
    decoder = Decoder(state.model, compiled=False)
    with plainly(state.model), attention_of(state.model, "sdpa"):
        while state.ranks.largest(0):
            decoder(ids_11, None)


def _without_memory() -> DoesNotFitError:
    return DoesNotFitError(
        "memory ran out in a pass that all processes make together: close what else uses it, or resume on more cards; "
        "the last checkpoint is whole"
    )
