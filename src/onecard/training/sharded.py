"""One update of a model that no rank holds whole: weights, gradients and moments in parts (FSDP2, `fully_shard`).

    weights, dim 0     rank 0 [0 .. n/2)    rank 1 [n/2 .. n)
    a layer's passes   gathered ─► used ─► let go; its gradient is summed and cut while the next layer works
    update             each rank its own part, by the norm of all

The optimizer works on the parts as plain tensors: AdamW looks at one value at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import InputError
from onecard.model.loss import find_head
from onecard.spec import Plan
from onecard.training.optimizer import Optimizer
from onecard.training.state import Found, TrainState
from onecard.training.step import MicroBatch, sum_micro_batch


def check_shardable(plan: Plan) -> None:
    """Refuses what cannot be trained in parts.

    Raises:
        InputError: all of it together.
    """
    wrong = {
        f"optim {plan.optimizer.name}: its updates look at whole matrices; use adamw": plan.optimizer.name != "adamw",
        f"precision {plan.precision}: use fp32, or strategy ddp": plan.precision != "fp32",
        f"method {plan.adapt.method if plan.adapt else ''}: adapters are small; use strategy ddp": plan.adapt,
        "torch_compile true: set it to false": plan.torch_compile,
        "eval_tasks: score the checkpoints afterwards with `onecard evaluate`": plan.eval_tasks,
    }
    if problems := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise InputError("\n".join(["strategy fsdp does not go with", *(f"  - {text}" for text in problems)]))


class _Inside(nn.Module):
    """The root of what is sharded: whatever runs inside finds embedding, norm and head whole."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.model = state.model
        self._state = state

    def forward(self, run: Callable[[], Found]) -> Found:
        state = self._state
        # Sharding puts the whole weight in the place of the part and back again.
        before, state.head = state.head, find_head(state.model, state.plan.loss_chunk_size)
        try:
            return run()
        finally:
            state.head = before


class Shards:
    """Cuts a whole state into parts, and trains it."""

    is_whole = False

    def __init__(self, state: TrainState) -> None:
        check_shardable(state.plan)
        self._state = state
        self._mesh = init_device_mesh(state.device.type, (state.ranks.num,))
        moments = state.optimizer.state_tensors()
        inside = _Inside(state)
        for layer in [module for module in state.model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=self._mesh)
        fully_shard(inside, mesh=self._mesh)
        assert isinstance(inside, FSDPModule)
        self._inside: Any = inside
        state.optimizer = Optimizer(state.model, state.plan.optimizer)
        state.optimizer.load_state_tensors({name: self._cut(moment) for name, moment in moments.items()})
        state.head = find_head(state.model, state.plan.loss_chunk_size)

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        """Adds the gradients of a micro-batch and gives its loss; they cross between ranks in the last one."""
        self._inside.set_requires_gradient_sync(is_last)
        # It divides by the number of ranks, and the loss is divided by that of all targets already.
        factor = factor * self._state.ranks.num
        loss: Tensor = self._inside(lambda: sum_micro_batch(self._state, batch, factor, adds_head=False))
        loss.backward()
        if is_last:
            self._state.optimizer.take_parts()
        return loss.detach()

    def norm_of_all(self, norm: Tensor) -> Tensor:
        """The 2-norm of the gradients of which each rank has parts, from that of its own."""
        return self._state.ranks.sum(norm.square()).sqrt()

    @torch.no_grad()
    def inside(self, run: Callable[[], Found]) -> Found:
        """Runs what needs the weights, without gradients; all ranks have to, in step."""
        try:
            found: Found = self._inside(run)
        finally:
            # Without a backward pass the root stays whole, until a checkpoint is written, which one rank does alone.
            self._inside.reshard()
        return found

    @torch.no_grad()
    def gather(self) -> dict[str, dict[str, Tensor]]:
        """Gives masters and moments whole, on the host of every rank; all ranks have to call it."""
        optimizer = self._state.optimizer
        shapes = {name: parameter.shape for name, parameter in self._state.model.named_parameters()}
        found: dict[str, dict[str, Tensor]] = {"masters": {}, "optimizer": {}}
        for name, part in optimizer.masters.items():
            found["masters"][name] = self._join(part, shapes[name])
        for name, part in optimizer.state_tensors().items():
            master = name.split(".", 1)[1].rsplit(".", 1)[0]
            found["optimizer"][name] = part.clone() if part.ndim == 0 else self._join(part, shapes[master])
        return found

    def _cut(self, whole: Tensor) -> Tensor:
        if whole.ndim == 0:
            return whole
        return distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None).to_local()

    def _join(self, part: Tensor, shape: torch.Size) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, self._mesh, [Shard(0)], shape=shape, stride=stride).full_tensor().cpu()
