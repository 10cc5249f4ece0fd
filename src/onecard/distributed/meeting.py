"""How the processes of a run come together: the leader prepares and plans, the others wait for its order.

    leader     reads, plans, makes the run folder ── order ──┐            ┌── begin ──► train
    followers  wait ───────────────────────────────────────► ┴ read it ───┴── begin ──► train

The order goes through torchrun's store, in which one may wait for hours; the process group, whose timeouts tell that a
rank is gone, comes to be when all have something to do.
"""

import atexit
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from onecard.distributed.place import Place, find_place
from onecard.distributed.ranks import SOLO, Ranks
from onecard.errors import InputError, OnecardError

# Text may take hours to be prepared.
_LONGEST_PREPARATION = timedelta(hours=48)


class DismissedError(OnecardError):
    """Another rank has ended the run and says why; this one ends in silence, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Meeting:
    """The processes of a run before they train."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._ranks: Ranks | None = None
        self._num_orders = 0
        self._store: Any = None
        self._asked: dict[str, Any] = {}

    def _connect(self) -> Any:
        if self._store is None:
            try:
                self._store = next(dist.rendezvous("env://"))[0]
            except (dist.DistError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{self.place} cannot reach the others ({str(error).splitlines()[0]}): check MASTER_ADDR and "
                    "MASTER_PORT, or --rdzv-endpoint of `torchrun`, and that no firewall is between the machines"
                ) from error
        return self._store

    def give_order(self, order: dict[str, Any]) -> None:
        """Tells the others what the run is; nothing where there are none."""
        if self.place.num_ranks > 1:
            self._num_orders += 1
            self._connect().set(f"onecard/order/{self._num_orders}", json.dumps(order | {"asked": self._asked}))

    def await_order(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for what the leader says; `asked` is what this rank was started for.

        Raises:
            DismissedError: it has failed.
            InputError: it was started for something else.
        """
        self._num_orders += 1
        key = f"onecard/order/{self._num_orders}"
        store = self._connect()
        store.wait([key], _LONGEST_PREPARATION)
        order: dict[str, Any] = json.loads(store.get(key))
        if "exit_code" in order:
            raise DismissedError(order["exit_code"])
        given = order["asked"]
        others = {name for name in {*asked, *given} if asked.get(name) != given.get(name)}
        if others:
            told = "; ".join(f"{name} is {asked.get(name)}, not {given.get(name)}" for name in sorted(others))
            raise InputError(f"{self.place} was asked for something else than rank 0: {told}. Start all ranks alike")
        return order

    def begin(self, device: torch.device, timeout_s: float) -> Ranks:
        """Makes the process group, gloo on CPUs and NCCL on GPUs; one process alone needs none.

        Raises:
            InputError: not all ranks have come.
        """
        if self.place.num_ranks == 1:
            return SOLO
        if self._ranks is None:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("onecard/group", self._connect()),
                    rank=self.place.rank,
                    world_size=self.place.num_ranks,
                    timeout=timedelta(seconds=timeout_s),
                )
            except dist.DistError as error:
                raise InputError(
                    f"{self.place} waited {timeout_s:.0f} s for the others in vain ({str(error).splitlines()[0]})"
                ) from error
            atexit.register(_leave)
            self._ranks = Ranks(self.place, self._connect())
        return self._ranks

    @contextmanager
    def led(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Lets the others end, too, where the block, which does what was asked, fails before they have their order."""
        before, self._asked = self._num_orders, dict(asked)
        try:
            yield
        except BaseException as error:
            if self._num_orders == before:
                self.give_order({"exit_code": error.exit_code if isinstance(error, OnecardError) else 1})
            raise


@cache
def meeting() -> Meeting:
    """The meeting of this process, of which it has one."""
    return Meeting(find_place())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
