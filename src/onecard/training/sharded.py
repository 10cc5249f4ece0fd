"""One update of a model that no rank holds whole: weights, gradients and moments in parts (FSDP2, `fully_shard`).

    weights, dim 0     rank 0 [0 .. n/2)    rank 1 [n/2 .. n)
    a layer's passes   gathered ─► used ─► let go; its gradient is summed and cut while the next layer works
    update             each rank its own part, by the norm of all

The parts are the fp32 masters; in 16 bits, what is gathered is rounded on the way, and gradients are summed in fp32.
The optimizer works on the parts as plain tensors: AdamW looks at one value at a time, and Muon gathers its matrices.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import InputError
from onecard.model.loss import find_head
from onecard.spec import Plan
from onecard.training.assemble import DTYPES
from onecard.training.micro_batch import MicroBatch
from onecard.training.optimizer import Optimizer
from onecard.training.state import Found, TrainState
from onecard.training.step import sum_micro_batch


def check_shardable(plan: Plan) -> None:
    """Refuses what cannot be trained in parts.

    Raises:
        InputError: all of it together.
    """
    wrong = {
        f"optim {plan.optimizer.name}: its state is in blocks; use adamw or muon": plan.optimizer.is_8bit,
        f"method {plan.adapt.method if plan.adapt else ''}: adapters are small; use strategy ddp": plan.adapt,
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


class _Rows:
    """Rows of matrices that the ranks of a mesh have in parts, as `Shard(0)` of each cuts them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def whole(self, rows_GmN: Tensor, num_rows: int) -> Tensor:
        shape = torch.Size([len(rows_GmN), num_rows, rows_GmN.shape[2]])
        return _join(rows_GmN, self._mesh, 1, shape)

    def own(self, matrices_GMN: Tensor) -> Tensor:
        return _cut(matrices_GMN, self._mesh, 1)


def _join(part: Tensor, mesh: DeviceMesh, dim: int, shape: torch.Size) -> Tensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(dim)], shape=shape, stride=stride).full_tensor()


def _cut(whole: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None).to_local()


class Shards:
    """Cuts a whole state into parts on the device of its plan, and trains it."""

    is_whole = False

    def __init__(self, state: TrainState) -> None:
        check_shardable(state.plan)
        self._state = state
        plan, dtype = state.plan, DTYPES[state.plan.precision]
        self._mesh = init_device_mesh(torch.device(plan.device).type, (state.ranks.num,))
        moments = state.optimizer.state_tensors()
        for name, parameter in state.model.named_parameters():
            parameter.data = state.optimizer.masters[name].data
        inside = _Inside(state)
        # Layers take what they are given as they would on one process.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = [module for module in state.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if state.decoder.is_compiled:
            state.decoder.compile_each(layers)
        for layer in layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(inside, mesh=self._mesh, mp_policy=policy)
        assert isinstance(inside, FSDPModule)
        self._inside: Any = inside
        state.optimizer = Optimizer(state.model, plan.optimizer, dtype, _Rows(self._mesh))
        state.optimizer.load_state_tensors({name: self._part(moment) for name, moment in moments.items()})
        # Outside the passes nobody has the whole weight; its type and device are asked for there.
        stand_in = torch.empty(0, dtype=dtype, device=plan.device)
        state.head = replace(find_head(state.model, plan.loss_chunk_size), weight_VD=stand_in)
        scale = state.loss_scale
        scale.value, scale.num_good_steps = (tensor.to(plan.device) for tensor in (scale.value, scale.num_good_steps))

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        """Adds the gradients of a micro-batch and gives its loss; they cross between ranks at once.

        Kept until the last micro-batch, they would take four bytes for each parameter, on every rank.
        """
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
        """Gives masters and moments whole on the host of the leader, others nothing; all ranks have to call it."""
        optimizer = self._state.optimizer
        shapes = {name: parameter.shape for name, parameter in self._state.model.named_parameters()}
        found: dict[str, dict[str, Tensor]] = {"masters": {}, "optimizer": {}}
        for kind, parts in (("masters", optimizer.masters), ("optimizer", optimizer.state_tensors())):
            for name, part in parts.items():
                master = name if kind == "masters" else name.split(".", 1)[1].rsplit(".", 1)[0]
                whole = part if part.ndim == 0 else _join(part, self._mesh, 0, shapes[master])
                if self._state.ranks.is_leader:
                    found[kind][name] = whole.to("cpu", copy=True)
        return found

    def _part(self, whole: Tensor) -> Tensor:
        return whole if whole.ndim == 0 else _cut(whole, self._mesh, 0)
