"""What a program allocates and computes, operator by operator.

                 every operator                       when a storage dies
    program ──────────────────────► Recorder ◄──────────────────────── weak reference
                                       │
                                       ▼
    order   +0 +1 +2 -1 +3 -2 ...      allocations and releases of storages, by number
    work    (operator, phase) -> calls, FLOPs, bytes

Works on real tensors and, under FakeTensorMode, on tensors without storage; both give the same record. Storages are
what is counted, so views cost nothing.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.planner.traffic import count_bytes, count_flops, is_free, only_reserves, tensors_in, written_inputs

# Label of tensors that rest in the memory of the host: they have a size and no place in the order.
ON_HOST = "host"

# Extra device memory that a kernel takes while it runs: operator -> bytes, from its arguments.
Scratch = Callable[..., int]


@dataclass
class Work:
    """Arithmetic and memory traffic of the calls of one operator in one phase with one shape.

    `micro_batch` counts from 1; 0 is what belongs to none. The first differs from the rest, which add to gradients.
    """

    name: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    num_calls: int = 0
    flops: int = 0
    num_bytes: int = 0
    micro_batch: int = 0


@dataclass
class Record:
    """Storages in the order in which they came and went.

    `sizes[i]` bytes and `phases[i]` of storage i; `order` holds i where it is allocated and ~i where it is released.
    `labels` names what some storages are (weights, gradients ...), `omitted` phases that failed, and why.
    """

    sizes: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    omitted: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Says which phases are not in the record."""
        return [
            f"{phase} could not be traced ({reason}), so what it takes is not in these figures"
            for phase, reason in self.omitted.items()
        ]

    @property
    def host_bytes(self) -> int:
        """Bytes of what the card works on and the host keeps."""
        return sum(self.sizes[number] for number, label in self.labels.items() if label == ON_HOST)


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    `phase` names what is going on and `micro_batch` in which one. Whoever runs the program sets them, but a backward
    pass is noticed, and what follows it is the update.
    """

    def __init__(self, scratch: dict[str, Scratch] | None = None) -> None:
        super().__init__()
        self.record = Record()
        self.phase = "start"
        self.micro_batch = 0
        self._scratch = scratch or {}
        self._ids: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._work: dict[tuple[Any, ...], Work] = {}
        self._forgotten: set[int] = set()
        self._is_closed = False
        self._is_open = False

    def __enter__(self) -> Self:
        self._is_open = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        # What is torn down afterwards belongs to no run.
        self._is_closed, self._is_open = True, False
        super().__exit__(*error)

    def adopt(self, tensor: Tensor, label: str) -> None:
        """Counts a tensor that exists already as allocated now; one on the host takes no memory of the card.

        Of a storage that is adopted twice, the first label stays.
        """
        known = len(self.record.order)
        self.record.labels.setdefault(self._number(tensor), label)
        if label == ON_HOST:
            del self.record.order[known:]

    def label(self, tensor: Tensor, label: str) -> None:
        """Says what a recorded tensor is."""
        if (number := self._ids.get(tensor.untyped_storage()._cdata)) is not None:
            self.record.labels[number] = label

    def omit(self, phase: str, reason: str) -> None:
        """Forgets what was recorded of a phase that could not be run to its end."""
        record = self.record
        self._forgotten |= {number for number, known in enumerate(record.phases) if known == phase}
        record.order[:] = [step for step in record.order if max(step, ~step) not in self._forgotten]
        record.work[:] = [work for work in record.work if work.phase != phase]
        record.omitted[phase] = reason

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets compiled programs run under this mode, which then sees what they call."""
        return True

    def count_kernel(self, tensors: list[Tensor]) -> None:
        """Counts one fused kernel that reads or writes each of these tensors once.

        Of a table in which it looks up rows, all counts. What the compiler runs before the recording does not.
        """
        if not self._is_open:
            return
        work = self._work_of("fused", self._current_phase(), tuple(max(tensors, key=Tensor.numel).shape), tensors[-1])
        work.num_calls += 1
        work.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        phase = self._current_phase()
        name = func.overloadpacket.__name__
        fresh = [tensor for tensor in tensors_in(out) if tensor.untyped_storage()._cdata not in self._ids]
        for tensor in fresh:
            self._number(tensor, phase)
        if name in self._scratch and (num_bytes := self._scratch[name](args, out)):
            number = self._add(num_bytes, phase)
            self.record.order.append(~number)
        self._count(func, name, phase, (args, kwargs or {}, out))
        return out

    def _current_phase(self) -> str:
        if torch._C._current_autograd_node() is None:
            return self.phase
        self.phase = "update"
        return "backward"

    def _number(self, tensor: Tensor, phase: str | None = None) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids:
            return self._ids[key]
        number = self._ids[key] = self._add(storage.nbytes(), phase or self.phase)

        def release(_: Any) -> None:
            # Pointers are used again, so the number goes with the storage.
            del self._ids[key], self._references[key]
            if not self._is_closed and number not in self._forgotten:
                self.record.order.append(~number)

        self._references[key] = weakref.ref(storage, release)
        return number

    def _add(self, num_bytes: int, phase: str) -> int:
        number = len(self.record.sizes)
        self.record.sizes.append(num_bytes)
        self.record.phases.append(phase)
        self.record.order.append(number)
        return number

    def _count(self, func: Any, name: str, phase: str, call: tuple[Any, dict[str, Any], Any]) -> None:
        if only_reserves(func):
            return
        args, kwargs, out = call
        inputs = tensors_in(args) + tensors_in([value for key, value in kwargs.items() if key != "out"])
        outputs, written = tensors_in(out), written_inputs(func, args, kwargs)
        results = outputs or written
        if not results or is_free(inputs, outputs, written):
            return
        first = max(results, key=Tensor.numel)
        work = self._work_of(name, phase, _matrix_shape(name, inputs) or tuple(first.shape), first)
        work.num_calls += 1
        work.flops += count_flops(func, args, kwargs, out)
        work.num_bytes += count_bytes(name, inputs, outputs, written)

    def _work_of(self, name: str, phase: str, shape: tuple[int, ...], like: Tensor) -> Work:
        key = (name, phase, shape, like.dtype, self.micro_batch)
        if (work := self._work.get(key)) is None:
            dtype = str(like.dtype).removeprefix("torch.")
            work = self._work[key] = Work(name, phase, shape, dtype, micro_batch=self.micro_batch)
            self.record.work.append(work)
        return work


def _matrix_shape(name: str, inputs: list[Tensor]) -> tuple[int, ...] | None:
    """Sizes M, N, K of a matrix product (with the batch before them), which decide how fast it runs."""
    name = name.removesuffix("_")
    if name in ("mm", "addmm"):
        left, right = inputs[-2], inputs[-1]
        return (left.shape[0], right.shape[1], left.shape[1])
    if name in ("bmm", "baddbmm"):
        left, right = inputs[-2], inputs[-1]
        return (left.shape[0], left.shape[1], right.shape[2], left.shape[2])
    return None
