"""One update of a model that no rank holds whole: weights, gradients and moments in parts (FSDP2, `fully_shard`).

    weights, dim 0     rank 0 [0 .. n/2)    rank 1 [n/2 .. n)
    a layer's passes   gathered ─► used ─► let go; its gradient is summed and cut while the next layer works
    update             each rank its own part, by the norm of all
    a start            the leader's weights, scattered one after the other; moments are zeros
    a resume           each rank reads its own rows from the files of the checkpoint

The parts are the fp32 masters; in 16 bits, what is gathered is rounded on the way, and gradients are summed in fp32.
The optimizer works on the parts as plain tensors: AdamW looks at one value at a time, and Muon gathers its matrices.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import CheckpointError, InputError
from onecard.model.folder import load_plain
from onecard.model.loss import find_head
from onecard.model.weight_files import read_headers
from onecard.spec import Plan
from onecard.training.assemble import DTYPES, saved_buffers, weights_of
from onecard.training.in_step import do_in_step
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
        num_matrices, _, num_columns = rows_GmN.shape
        shape, stride = torch.Size([num_matrices, num_rows, num_columns]), (num_rows * num_columns, num_columns, 1)
        return DTensor.from_local(rows_GmN, self._mesh, [Shard(1)], shape=shape, stride=stride).full_tensor()

    def own(self, matrices_GMN: Tensor) -> Tensor:
        return distribute_tensor(matrices_GMN, self._mesh, [Shard(1)], src_data_rank=None).to_local()


class Shards:
    """Gives each rank room for its part of a hollow state, on the device of its plan, and trains it.

    What is in the parts comes by `fill` or `read`.
    """

    is_whole = False

    def __init__(self, state: TrainState) -> None:
        check_shardable(state.plan)
        self._state = state
        plan, dtype = state.plan, DTYPES[state.plan.precision]
        self._mesh = init_device_mesh(torch.device(plan.device).type, (state.ranks.num,))
        inside = _Inside(state)
        # Layers take what they are given as they would on one process.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = [module for module in state.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._is_compiled = state.decoder.is_compiled
        if self._is_compiled:
            state.decoder.compile_each(layers)
        for layer in layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(inside, mesh=self._mesh, mp_policy=policy)
        assert isinstance(inside, FSDPModule)
        self._inside: Any = inside
        kept = dict(state.model.named_buffers(remove_duplicate=False))
        inside.to_empty(device=torch.device(plan.device))
        for name, buffer in state.model.named_buffers(remove_duplicate=False):
            buffer.copy_(kept[name])
        state.optimizer = Optimizer(state.model, plan.optimizer, dtype, _Rows(self._mesh))
        # Outside the passes nobody has the whole weight; its type and device are asked for there.
        stand_in = torch.empty(0, dtype=dtype, device=plan.device)
        state.head = replace(find_head(state.model, plan.loss_chunk_size), weight_VD=stand_in)

    @torch.no_grad()
    def fill(self, weights: dict[str, Tensor] | None) -> None:
        """Gives each rank its part of the leader's `weights`, which are emptied on the way; all ranks have to call it.

        Others than the leader give none, and hold no more than one of them at a time.
        """
        for name, parameter in self._parameters().items():
            # Of the others, only the shape counts, and memory that is not written to is none.
            whole = torch.empty(parameter.shape, device=parameter.device)
            if weights is not None:
                whole = weights.pop(name).to(parameter.device, torch.float32)
            part = distribute_tensor(whole, self._mesh, parameter.placements)
            parameter.to_local().copy_(part.to_local())
        for name, buffer in saved_buffers(self._state.model).items():
            if weights is not None:
                buffer.copy_(weights.pop(name))
            dist.broadcast(buffer, 0)

    def read(self, folder: Path, *, with_moments: bool = True) -> None:
        """Reads this rank's part of masters and moments from a checkpoint, and no more of it.

        Raises:
            CheckpointError: the checkpoint belongs to another model or optimizer, or cannot be read.
        """
        named = self._named()
        stored = {tensor.name: tensor.shape for tensor in read_headers(sorted(folder.glob("*.safetensors")))}
        wanted = named["optimizer"] if with_moments else {}
        # There are families that transformers stores under other names than their parameters have.
        is_renamed = any(name not in stored for name in named["masters"])
        if not is_renamed:
            buffers = saved_buffers(self._state.model)
            wanted = {**wanted, **named["masters"], **{name: buffers[name] for name in buffers if name in stored}}
        wrong = sorted(name for name, tensor in wanted.items() if tuple(tensor.shape) != stored.get(name))
        if wrong:
            raise CheckpointError(
                f"{folder} belongs to another model or optimizer: {len(wrong)} tensors differ, the first is "
                f"{wrong[0]}. Resume with the recipe and plan of its own run"
            )
        if is_renamed:
            self.fill(weights_of(load_plain(folder, torch.float32)) if self._state.ranks.is_leader else None)
        try:
            dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:  # no Exception of Python's
            cause = next((found for found, _ in error.failures.values()), error)
            raise CheckpointError(f"{folder} cannot be read: {cause}") from cause

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
        """Runs what needs the weights, without gradients; all ranks have to, each with work of its own."""
        # Passes of every shape: each would cost a compilation.
        eager = torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()
        try:
            with eager:
                found: Found = self._inside(lambda: do_in_step(self._state, run))
        finally:
            # Without a backward pass the root stays whole, until a checkpoint is written, which one rank does alone.
            self._inside.reshard()
        return found

    @torch.no_grad()
    def gather(self) -> dict[str, dict[str, Tensor]]:
        """Gives masters and moments whole on the host of the leader, others nothing; all ranks have to call it."""
        found: dict[str, dict[str, Tensor]] = {"masters": {}, "optimizer": {}}
        for kind, parts in self._named().items():
            for name, part in parts.items():
                whole = part.full_tensor() if isinstance(part, DTensor) else part.clone()
                if self._state.ranks.is_leader:
                    found[kind][name] = whole.cpu()
        return found

    def _parameters(self) -> dict[str, DTensor]:
        return {name: cast(DTensor, parameter) for name, parameter in self._state.model.named_parameters()}

    def _named(self) -> dict[str, dict[str, Tensor]]:
        """Masters and moments as parts of whole tensors, by the names of a checkpoint; numbers are whole."""
        like = self._parameters()
        moments = self._state.optimizer.state_tensors()
        return {
            "masters": {name: parameter.detach() for name, parameter in like.items()},
            "optimizer": {
                name: _as_part(moment, like[name.split(".", 1)[1].rsplit(".", 1)[0]]) if moment.ndim else moment
                for name, moment in moments.items()
            },
        }


def _as_part(part: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
