"""One update made by several processes: each passes its micro-batches, and their gradients are summed.

    rank 0   micro-batch 0, 2, 4, 6 ──┐                                ┌── the same clipping, update and refusal
                                      ├── sums cross during the last ──┤
    rank 1   micro-batch 1, 3, 5, 7 ──┘   backward pass                └── the same

Every rank holds the whole state and changes it in the same way, so nothing else has to cross.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onecard.data import NO_TARGET, Batch
from onecard.distributed.ranks import Ranks
from onecard.training.micro_batch import MicroBatch
from onecard.training.sharded import Shards
from onecard.training.state import Found, TrainState
from onecard.training.step import sum_micro_batch

# Buffers are the same everywhere and never change; PyTorch 2.13 has renamed the setting.
_HAS_NEW_NAME = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}
# What configs of models call the number of their experts, some of which may get no token in a step.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def spread(state: TrainState, ranks: Ranks) -> None:
    """Lets a freshly assembled or restored state be trained by all ranks together."""
    state.ranks = ranks
    if ranks.is_several:
        if state.plan.strategy == "fsdp":
            state.spread = Shards(state)
        else:
            state.spread = _MasterSums(state) if state.optimizer.is_mixed else _Buckets(state)


def own_share(state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
    """Gives what of the micro-batches of a step is for this rank: every so many-th, and at least one.

    Where a rank has less than its turn, the last one without its targets fills the place: the others count on it, of
    whole states at the end of a step, of states in parts at every pass.
    """
    ranks = state.ranks
    least = -(-len(batches) // ranks.num) if state.is_in_parts else 1
    own = ranks.share(batches)
    return own + [_without_targets(batches[-1])] * (least - len(own))


def _without_targets(batch: Batch) -> Batch:
    return replace(batch, targets=torch.full_like(batch.targets, NO_TARGET), num_targets=0)


class _Pass(nn.Module):
    """The forward pass of a micro-batch as a module, which is what `DistributedDataParallel` takes."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.model = state.model
        self._state = state

    def forward(self, batch: MicroBatch, factor: Tensor, *, adds_head: bool) -> Tensor:
        return sum_micro_batch(self._state, batch, factor, adds_head=adds_head)


class _Whole:
    """Each rank has the whole model and all summed gradients."""

    is_whole = True

    def norm_of_all(self, norm: Tensor) -> Tensor:
        return norm

    def inside(self, run: Callable[[], Found]) -> Found:
        return run()

    def gather(self) -> None:
        return None


class _Buckets(_Whole):
    """fp32: `DistributedDataParallel` sums the gradients of parameters in buckets while the backward pass runs."""

    def __init__(self, state: TrainState) -> None:
        self._num = state.ranks.num
        config = state.model.config
        self._parallel = DistributedDataParallel(
            _Pass(state),
            **_NO_BUFFERS,
            gradient_as_bucket_view=True,
            # Costs a walk through the graph, and an expert without a token would otherwise be waited for.
            find_unused_parameters=any(getattr(config, key, None) for key in _EXPERT_KEYS),
        )
        # The embedding's gradient comes last and takes that of a tied head along; one of its own must come through
        # autograd, which is what the buckets listen to.
        self._is_tied = state.model.get_input_embeddings().weight is state.head.weight_VD

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._parallel.no_sync():
            # It divides by the number of ranks, and the loss is divided by that of all targets already.
            loss: Tensor = self._parallel(batch, factor * self._num, adds_head=self._is_tied or not is_last)
            loss.backward()
        return loss.detach()


class _MasterSums(_Whole):
    """16 bits: the fp32 gradients of the masters are summed after the last backward pass.

    Buckets would sum those of the parameters, in 16 bits, and of the last micro-batch alone.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        loss = sum_micro_batch(self._state, batch, factor)
        loss.backward()
        if is_last:
            works = [dist.all_reduce(gradient, async_op=True) for gradient in self._state.optimizer.all_gradients()]
            for work in works:
                work.wait()
        return loss.detach()
