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

# The leader samples, scores or waits for a disk; the others have nothing to do but wait for it.
_LONGEST_ABSENCE_S = 24 * 3600.0
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
    """The processes of a run, seen from one of them; one process alone agrees with itself at once."""

    def __init__(self, place: Place = ALONE, store: Any = None) -> None:
        self.place = place
        self._store = store
        self._num_absences = 0

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

    def largest(self, value: int) -> int:
        """Gives all ranks the largest of their values."""
        if not self.is_several:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Gives all ranks the rows [n, K] on the host of all of them, those of rank 0 first; n may differ."""
        if not self.is_several:
            return rows
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.num)]
        dist.all_gather(counts, torch.tensor(len(rows)))
        most = max(int(count) for count in counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.num)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def gather_texts(self, text: str) -> list[str]:
        """Gives all ranks what each of them says, by rank."""
        if not self.is_several:
            return [text]
        # A text is a row of bytes; the lengths tell where the next begins.
        content = text.encode()
        lengths = self.gather_rows(torch.tensor([[len(content)]]))
        joined = bytes(self.gather_rows(torch.frombuffer(bytearray(content + b"\0"), dtype=torch.uint8)).tolist())
        texts, start = list[str](), 0
        for length in lengths.flatten().tolist():
            texts.append(joined[start : start + length].decode())
            start += length + 1
        return texts

    def as_leader_says(self, text: str | None) -> str | None:
        """Gives all ranks what the leader says."""
        if not self.is_several:
            return text
        told = self.gather_texts("" if text is None else f"={text}")[0]
        return told.removeprefix("=") if told else None

    def rejoin(self) -> None:
        """Lets the others wait for what the leader has done alone, however long that took."""
        if not self.is_several:
            return
        self._num_absences += 1
        key = f"rejoin/{self._num_absences}"
        if self.is_leader:
            self._store.set(key, "")
            return
        until = time.monotonic() + _LONGEST_ABSENCE_S
        while not self._store.check([key]):  # waiting in the store itself would let no signal through
            if time.monotonic() > until:
                raise dist.DistStoreError("rank 0 stayed away")
            time.sleep(_LOOKING_S)

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


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def is_from_group(error: RuntimeError) -> bool:
    """Whether an error says that a connection between ranks broke or timed out.

    Those of gloo have no type of their own: their texts name its sources, or say that it gave up a connection.
    """
    text = str(error)
    return isinstance(error, dist.DistError) or "/gloo/" in text or "timeout caused pair closure" in text
