"""Memory of the host, and room on the disk, that the processes of a run take.

ddp     every process builds the model; the first one keeps a copy of the state while it is written
fsdp    the first one holds the whole state: weights at a start, all of it at a checkpoint; others nothing whole
"""

import json
from dataclasses import dataclass
from typing import Any

from onecard.distributed.place import find_place
from onecard.errors import DoesNotFitError
from onecard.hardware import Machine
from onecard.model.build import parameter_sizes
from onecard.planner.communication import CARDS_PER_MACHINE
from onecard.planner.shape import count_adapters
from onecard.spec import CardGroup, Plan
from onecard.training.host_copy import LEAST_BYTES_IN_BACKGROUND
from onecard.units import GIB, format_bytes

# A process with PyTorch, transformers and CUDA's libraries, before it holds a model.
_PROCESS_BYTES = int(2.5 * GIB)
_SINGLE_PRECISION_BYTES = 4


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the process that leads, of each other one, and how many share the leader's machine."""

    leader: int
    other: int
    num_local: int

    @property
    def machine(self) -> int:
        return self.leader + (self.num_local - 1) * self.other

    def told(self) -> dict[str, Any]:
        """What a `MemoryForecast` says of it."""
        is_shared = self.num_local > 1
        return {
            "host_peak_bytes": self.leader,
            "host_other_bytes": self.other if is_shared else None,
            "host_machine_bytes": self.machine if is_shared else None,
        }


def host_memory(plan: Plan, group: CardGroup | None, paged_bytes: int = 0, *, has_copy: bool = True) -> HostMemory:
    """The memory of the host beside a GPU: models are built there in fp32, and checkpoints pass through it.

    An existing model is read tensor by tensor, but its pages may stay in memory. `paged_bytes` are what each process
    works on from there; `has_copy` false leaves out what a run does without where there is no room.
    """
    process = _PROCESS_BYTES + paged_bytes
    if group is not None and group.num > 1 and plan.strategy == "fsdp":
        return HostMemory(process + checkpoint_bytes(plan), process, num_local(group))
    trained, weights = _trained(plan)[0] * _SINGLE_PRECISION_BYTES, plan.model.num_parameters * _SINGLE_PRECISION_BYTES
    copied = _page_locked_bytes(plan) if has_copy and copy_bytes(plan) else 0
    leader = process + max(weights + trained, weights + max(_moment_bytes(plan), copied))
    return HostMemory(leader, process + weights + trained, 1 if group is None else num_local(group))


def num_local(group: CardGroup) -> int:
    """Processes on the leader's machine."""
    return min(group.num, group.per_machine or CARDS_PER_MACHINE)


def check_host(plan: Plan, machine: Machine, group: CardGroup) -> None:
    """Refuses a plan for GPUs of this machine whose processes together need more of its memory than is free.

    Raises:
        DoesNotFitError: says how much, and what takes less.
    """
    needed = host_memory(plan, group, has_copy=False)
    # What processes take that have been started by now is not free any more.
    missing = needed.machine - find_place().num_local_ranks * _PROCESS_BYTES
    if needed.num_local == 1 or missing <= machine.free_ram_bytes:
        return
    how = (
        f"the first one {format_bytes(needed.leader)}, for the whole state at each checkpoint"
        if plan.strategy == "fsdp"
        else f"each builds the whole model, {format_bytes(needed.other)}"
    )
    less = "--optim muon, whose moments are half as large" if plan.optimizer.name == "adamw" else "a smaller model"
    raise DoesNotFitError(
        f"this does not fit the memory of this machine: its {needed.num_local} processes need "
        f"{format_bytes(needed.machine)} of it together ({how}), and {format_bytes(machine.free_ram_bytes)} are free. "
        f"Start fewer of them here{', or set --strategy fsdp' if plan.strategy == 'ddp' else f', or use {less}'}",
        plan,
    )


def _trained(plan: Plan) -> tuple[int, int]:
    """How many parameters move, and of them, those in matrices."""
    model = plan.model
    if plan.adapt is None:
        return model.num_parameters, min(model.num_parameters, model.num_matrix_parameters)
    return (count_adapters(model, plan.adapt),) * 2


def _moment_bytes(plan: Plan) -> int:
    """Bytes of the optimizer's state: two moments for AdamW, in 8 bits for matrices or not, one for Muon's matrices."""
    total, matrices = _trained(plan)
    of_matrices = 2 if plan.optimizer.is_8bit else _SINGLE_PRECISION_BYTES * (1 if plan.optimizer.name == "muon" else 2)
    return matrices * of_matrices + (total - matrices) * 2 * _SINGLE_PRECISION_BYTES


def _page_locked_bytes(plan: Plan) -> int:
    """What `copy_bytes` take of a GPU's state: PyTorch rounds each page-locked buffer up to a power of two."""
    if plan.adapt is not None or plan.optimizer.is_8bit:
        return 2 * checkpoint_bytes(plan)  # at most: few large tensors, whose sizes are not known here
    is_muon = plan.optimizer.name == "muon"
    sizes = parameter_sizes(json.dumps(plan.model.settings))
    return sum(
        (2 if is_muon and is_inner else 3) * _round_up(_SINGLE_PRECISION_BYTES * number) for number, is_inner in sizes
    )


def _round_up(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length()


def copy_bytes(plan: Plan) -> int:
    """Bytes of the copy of a state that is written while training goes on; none for a small one."""
    num_bytes = checkpoint_bytes(plan)
    return num_bytes if num_bytes >= LEAST_BYTES_IN_BACKGROUND else 0


def checkpoint_bytes(plan: Plan) -> int:
    """Weights that are trained, in fp32, and their moments: what a checkpoint takes, and a copy of it on the host."""
    return _trained(plan)[0] * _SINGLE_PRECISION_BYTES + _moment_bytes(plan)


def disk_bytes(plan: Plan) -> int:
    """Token files, a model that has yet to come, and checkpoints: the newest, the best, and one being written."""
    checkpoint = checkpoint_bytes(plan)
    num_saves = -(-plan.schedule.num_steps // plan.save_steps)
    kept = num_saves if plan.save_total_limit is None else min(num_saves, plan.save_total_limit)
    token_bytes = 2 if plan.corpus.vocab_size <= 1 << 16 else 4
    tokens = plan.corpus.num_train_tokens + plan.corpus.num_heldout_tokens
    download_bytes = (plan.model.base.download_bytes or 0) if plan.model.base else 0
    return (kept + 2) * checkpoint + tokens * token_bytes + download_bytes
