"""One update made by several processes: each passes its micro-batches, and their gradients are summed.

    rank 0   micro-batch 0, 2, 4, 6 ──┐                                ┌── the same clipping, update and refusal
                                      ├── sums cross during the last ──┤
    rank 1   micro-batch 1, 3, 5, 7 ──┘   backward pass                └── the same

With ddp every rank holds the whole state and changes it in the same way, so nothing else has to cross; with fsdp it
holds a part of it (`sharded.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from onecard.data import NO_TARGET, Batch
from onecard.distributed.ranks import Ranks
from onecard.training.micro_batch import MicroBatch
from onecard.training.optimizer import Optimizer
from onecard.training.sharded import Shards
from onecard.training.state import Found, TrainState
from onecard.training.step import sum_micro_batch
from onecard.units import MIB

# Buffers are the same everywhere and never change; PyTorch 2.13 has renamed the setting.
_HAS_NEW_NAME = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}
# Of fp32 gradients that are summed at once: what `DistributedDataParallel` takes of itself.
BUCKET_BYTES = 25 * MIB


def spread(state: TrainState, ranks: Ranks) -> None:
    """Lets a freshly assembled or restored state be trained by all ranks together."""
    state.ranks = ranks
    if ranks.is_several:
        state.spread = Shards(state) if state.plan.strategy == "fsdp" else _Buckets(state)


def own_share(state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
    """Gives what of the micro-batches of a step is for this rank: every so many-th, and at least one.

    Where a rank has less than its turn, the last one without its targets fills the place: the others count on it, of
    whole states at the end of a step, of states in parts at every pass.
    """
    ranks = state.ranks
    least = -(-len(batches) // ranks.num) if state.is_in_parts else 1
    own = ranks.share(batches)
    return own + [without_targets(batches[-1])] * (least - len(own))


def without_targets(batch: Batch) -> Batch:
    """A batch that fills a place and adds nothing."""
    return replace(batch, targets=torch.full_like(batch.targets, NO_TARGET), num_targets=0)


class _Pass(nn.Module):
    """The forward pass of a micro-batch as a module, which is what `DistributedDataParallel` takes."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.model = state.model
        self._state = state

    def forward(self, batch: MicroBatch, factor: Tensor, *, adds_head: bool) -> Tensor:
        return sum_micro_batch(self._state, batch, factor, adds_head=adds_head)


class _Buckets:
    """Each rank has the whole state; `DistributedDataParallel` sums gradients while the last backward pass runs.

    In 16 bits the gradients of parameters only tell it when those of the fp32 masters, which they are added to, are
    whole on this rank: these are what is summed.
    """

    is_whole = True

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._parallel = DistributedDataParallel(
            _Pass(state),
            **_NO_BUFFERS,
            gradient_as_bucket_view=True,
            # It counts gradients in the type of the parameters.
            bucket_cap_mb=BUCKET_BYTES / MIB / (2 if state.optimizer.is_mixed else 1),
            # An expert without a token is not waited for. And buckets are laid out once: as gradients come
            # they would change after the first step of each start, and with them the order in which more ranks
            # than two are summed, and the last bits.
            find_unused_parameters=True,
        )
        # The embedding's gradient comes last and takes that of a tied head along; one of its own must come through
        # autograd, which is what the buckets listen to.
        self._is_tied = state.model.get_input_embeddings().weight is state.head.weight_VD
        # It divides by the number of ranks where it sums itself, and the loss is divided by all targets already.
        self._factor = 1 if state.optimizer.is_mixed else state.ranks.num
        if state.optimizer.is_mixed:
            self._parallel.register_comm_hook(state.optimizer, _sum_masters)
        else:
            state.optimizer.keep_gradients()

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._parallel.no_sync():
            loss: Tensor = self._parallel(batch, factor * self._factor, adds_head=self._is_tied or not is_last)
            loss.backward()
        if is_last and self._state.optimizer.is_mixed:
            self._parallel.zero_grad(set_to_none=True)  # views of buckets, in which nothing is
        return loss.detach()

    def norm_of_all(self, norm: Tensor) -> Tensor:
        return norm

    def inside(self, run: Callable[[], Found]) -> Found:
        return run()

    def gather(self) -> None:
        return None


def _sum_masters(optimizer: Optimizer, bucket: dist.GradBucket) -> Future[Tensor]:
    """Sums the gradients of the masters of a bucket's parameters; the bucket itself stays as it is."""
    masters = [optimizer.master_of(parameter) for parameter in bucket.parameters()]
    # An expert without a token has none.
    gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in masters]
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    # They become views of what is summed, so that nothing is copied back and no second copy stays.
    for master, part in zip(masters, vector.split([master.numel() for master in masters]), strict=True):
        master.grad = part.view_as(master)
    work = dist.all_reduce(vector, async_op=True)
    assert work is not None
    summed: Future[Tensor] = work.get_future().then(lambda _: bucket.buffer())
    return summed
