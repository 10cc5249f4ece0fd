"""What the processes of a run agree on while they train.

Numbers and texts alone cross between them, as tensors or through torchrun's store, never pickled objects. What the host
needs goes over gloo, also beside GPUs, so that no agreement waits for a device.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from onecard.distributed.place import ALONE, Place

Item = TypeVar("Item")

_HANGS, _BROKE = "hangs", "broke"

# One may have texts to write, a task to score or a disk to wait for, for so long.
LONGEST_ABSENCE_S = 24 * 3600.0
_LOOKING_S = 0.02
# All ranks see at about the same time that one is gone, and look for it.
_ANSWER_S = 5.0


@dataclass
class Lost:
    """What a rank finds when a connection broke: exit codes of those that ended by themselves, and who answers.

    `hangs`: somebody waited for an answer until the timeout, so a silent rank may still be running.
    """

    ended: dict[int, int] = field(default_factory=dict)
    here: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    hangs: bool = False


class Ranks:
    """The processes of a run, seen from one of them; one process alone agrees with itself at once.

    Of the group `patient` one may wait for another as long as `LONGEST_ABSENCE_S`.
    """

    def __init__(self, place: Place = ALONE, store: Any = None, patient: dist.ProcessGroup | None = None) -> None:
        self.place = place
        self._store = store
        self._patient = patient

    @property
    def num(self) -> int:
        return self.place.num_ranks

    @property
    def is_leader(self) -> bool:
        return self.place.is_leader

    @property
    def is_several(self) -> bool:
        return self.num > 1

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Gives what of some items, which all ranks see in the same order, is for this one: every `num`-th."""
        return list(items[self.place.rank :: self.num])

    def index_of(self, own: int) -> int:
        """Where the item stands among all that is number `own` of this rank's share."""
        return self.place.rank + own * self.num

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.is_several:
            dist.all_reduce(tensor)
        return tensor

    def take_leaders(self, tensor: Tensor) -> None:
        """Gives all ranks the leader's values, in place."""
        dist.broadcast(tensor.detach(), src=0)

    def largest(self, value: int) -> int:
        """Gives all ranks the largest of their values."""
        if not self.is_several:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Gives all ranks the rows [n, K] on the host of all of them, those of rank 0 first; n may differ."""
        return torch.cat(self._gather(rows)) if self.is_several else rows

    def gather_texts(self, text: str, *, is_patient: bool = False) -> list[str]:
        """Gives all ranks what each of them says, by rank; `is_patient`: however long one of them takes for it."""
        if not self.is_several:
            return [text]
        return [part.numpy().tobytes().decode() for part in self._gather(_as_bytes(text), is_patient=is_patient)]

    def _gather(self, rows: Tensor, *, is_patient: bool = False) -> list[Tensor]:
        """Gives all ranks the rows on the host of each, by rank."""
        counts = self._gather_alike(torch.tensor(len(rows)), is_patient)
        padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self._gather_alike(padded, is_patient)
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]

    def _gather_alike(self, tensor: Tensor, is_patient: bool) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.num)]
        _await(dist.all_gather(parts, tensor, group=self._group(is_patient), async_op=True))
        return parts

    def hear_leader(self, text: str = "", *, is_patient: bool = False) -> str:
        """Gives all ranks what the leader says; `is_patient`: however long they wait for it."""
        if not self.is_several:
            return text
        content, group = _as_bytes(text), self._group(is_patient)
        length = torch.tensor(len(content))
        _await(dist.broadcast(length, src=0, group=group, async_op=True))
        if not self.is_leader:
            content = torch.empty(int(length), dtype=torch.uint8)
        _await(dist.broadcast(content, src=0, group=group, async_op=True))
        return content.numpy().tobytes().decode()

    def _group(self, is_patient: bool) -> dist.ProcessGroup | None:
        return self._patient if is_patient else None

    def as_leader_says(self, text: str | None) -> str | None:
        """Gives all ranks what the leader says."""
        if not self.is_several:
            return text
        told = self.gather_texts("" if text is None else f"={text}")[0]
        return told.removeprefix("=") if told else None

    def tell_end(self, exit_code: int) -> None:
        """Leaves word that this rank ends by itself and has said why."""
        self._set(f"ended/{self.place.rank}", str(exit_code))

    def find_lost(self, error: RuntimeError) -> "Lost":
        """Looks, after a connection broke with this error, who is still there."""
        self._set(f"looking/{self.place.rank}", _HANGS if _is_timeout(error) else _BROKE)
        lost, until = Lost(here=[self.place.rank], hangs=_is_timeout(error)), time.monotonic() + _ANSWER_S
        for rank in range(self.num):
            if rank == self.place.rank:
                continue
            while not (self._read(f"looking/{rank}") or self._read(f"ended/{rank}")) and time.monotonic() < until:
                time.sleep(0.1)
            if ended := self._read(f"ended/{rank}"):
                lost.ended[rank] = int(ended)
            elif seen := self._read(f"looking/{rank}"):
                lost.here.append(rank)
                lost.hangs |= seen == _HANGS
            else:
                lost.silent.append(rank)
        return lost

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store itself may be gone
            self._store.set(key, value)

    def _read(self, key: str) -> str:
        """What a rank has left in the store; nothing where it did not, or the store is gone, too."""
        try:
            return self._store.get(key).decode() if self._store.check([key]) else ""
        except RuntimeError:
            return ""


SOLO = Ranks()


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _await(work: dist.Work) -> None:
    """Waits for what ranks do together; waiting in the group itself would let no signal through."""
    while not work.is_completed():
        time.sleep(_LOOKING_S)
    work.wait()


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def is_from_group(error: RuntimeError) -> bool:
    """Whether an error says that a connection between ranks broke or timed out.

    Those of gloo have no type of their own: their texts name its sources, or say that it gave up a connection.
    """
    text = str(error)
    return isinstance(error, dist.DistError) or "/gloo/" in text or "timeout caused pair closure" in text
