"""How the processes of a run come together: the leader prepares and plans, the others wait for its order.

    leader     reads, plans, makes the run folder ── order ──► all have it? ┐        ┌── begin ──► train
    followers  take a seat, wait ───────────────── order of their seat ────► ┴─ alike ┴── begin ──► train

The order goes through torchrun's store, in which one may wait for hours; the process group, whose timeouts tell that a
rank is gone, comes to be when all have something to do. The store outlives the processes where torchrun starts them
again, so whatever is in it may be of those before: a seat is taken once, and an order is heard by who sits there.
"""

import atexit
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onecard.distributed.place import Place, find_place, is_launched
from onecard.distributed.ranks import LONGEST_ABSENCE_S, SOLO, Ranks
from onecard.errors import InputError, OnecardError, RankLostError

log = logging.getLogger("onecard.distributed")

# All are started at about the same time; a queue may let one machine begin later than another.
_PATIENCE_S = 120.0
# After so long whoever waits says for what.
_SILENCE_S = 15.0
# For those that are still loading PyTorch when the leader has failed.
_FAREWELL_S = 15.0
_LOOKING_S = 0.1
_LETTING_GO_S = 0.1
_ROOT, _REFUSED = "onecard", "refused"


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
        self._store: Any = None
        self._failure: InputError | None = None
        self._session = ""
        self._asked: dict[str, Any] = {}

    def _connect(self, patience_s: float = _PATIENCE_S) -> Any:
        """Connects to the store of all ranks; rank 0 has it where torchrun is not there to keep one."""
        if self._store is None:
            if self._failure is not None:  # once is enough
                raise self._failure
            try:
                store = self._rendezvous(patience_s)
            except (RuntimeError, ValueError, OSError, OverflowError) as error:
                self._failure = InputError(
                    f"{self.place} cannot reach the others at {_address()} ({_first_line(error)}): start all ranks, "
                    "check MASTER_ADDR and MASTER_PORT, or --rdzv-endpoint of `torchrun`, and that no firewall is "
                    "between the machines"
                )
                raise self._failure from error
            self._store = dist.PrefixStore(_ROOT, store)
        return self._store

    def _rendezvous(self, patience_s: float) -> Any:
        is_keeper = self.place.is_leader and "TORCHELASTIC_RUN_ID" not in os.environ
        if not is_keeper:
            # The store's own client takes up to 2.5 times its timeout, and prints its C++ frames.
            self._knock(patience_s)
            return _find_store(_SILENCE_S)
        with suppress(dist.DistError):
            return _find_store(min(_SILENCE_S, patience_s))
        log.warning("%s waits for the others at %s", self.place, _address())
        return _find_store(max(1.0, patience_s - _SILENCE_S))

    def _knock(self, patience_s: float) -> None:
        """Waits until there is somebody at the address of rank 0.

        Raises:
            OSError: there is nobody.
        """
        begun, is_told = time.monotonic(), False
        while True:
            try:
                with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5):
                    return
            except (OSError, OverflowError):
                waited_s = time.monotonic() - begun
                if waited_s > patience_s:
                    raise
                if waited_s > _SILENCE_S and not is_told:
                    is_told = True
                    log.warning("%s waits for rank 0 at %s", self.place, _address())
            time.sleep(1.0)

    def give_order(self, order: dict[str, Any], patience_s: float) -> None:
        """Tells the others what the run is, and waits until all have heard it; nothing where there are none.

        Raises:
            InputError: not all have come, or not for the same.
        """
        if self.place.num_ranks == 1:
            return
        store = self._connect(patience_s)
        self._session = str(store.add("sessions", 1))
        text = json.dumps(order | {"asked": self._asked, "session": self._session})
        missing, problems, begun = list(range(1, self.place.num_ranks)), list[str](), time.monotonic()
        is_told = False
        while missing := [rank for rank in missing if not self._has_heard(rank, text, problems)]:
            waited_s = time.monotonic() - begun
            names = _list_ranks(missing)
            if waited_s > patience_s:
                raise InputError(
                    f"{names} of {self.place.num_ranks} did not come within {waited_s:.0f} s: start all ranks at about "
                    "the same time, on every machine, or fewer of them"
                )
            if waited_s > _SILENCE_S and not is_told:
                is_told = True
                log.warning("waiting for %s of %d", names, self.place.num_ranks)
            time.sleep(_LOOKING_S)
        store.set(f"verdict/{self._session}", _REFUSED if problems else "")
        if problems:
            raise InputError("\n".join(["the processes of this run were not started alike:", *problems]))

    def _has_heard(self, rank: int, order: str, problems: list[str]) -> bool:
        """Gives a rank its order, if it sits there and has none; says whether it has heard it, and adds its problem."""
        if (seat := self._read(f"seat/{rank}")) is None:
            return False
        key = f"order/{seat}"
        if self._read(key) != order:
            self._store.set(key, order)
        session, _, problem = (self._read(f"heard/{seat}") or "").partition(" ")
        if session == self._session and problem:
            problems.append(f"  - rank {rank}: {problem}")
        return session == self._session

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def await_order(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for what the leader says; `asked` is what this rank was started for.

        Raises:
            DismissedError: it has failed, or somebody was started for something else, and it says so.
            RankLostError: it is gone.
        """
        store = self._connect()
        try:
            seat = store.add("seats", 1)
            store.set(f"seat/{self.place.rank}", str(seat))
            order: dict[str, Any] = json.loads(self._wait_for(f"order/{seat}"))
            self._session = order["session"]
            store.set(f"heard/{seat}", f"{self._session} {_compare(asked, order['asked'])}")
            if "exit_code" in order:
                raise DismissedError(order["exit_code"])
            if self._wait_for(f"verdict/{self._session}") == _REFUSED:
                raise DismissedError(InputError.exit_code)
        except dist.DistError as error:
            raise RankLostError(f"{self.place}: rank 0 ended before the run began") from error
        return order

    def _wait_for(self, key: str) -> str:
        while (found := self._read(key)) is None:  # waiting in the store itself would let no signal through
            time.sleep(_LOOKING_S)
        return found

    def begin(self, device: torch.device, timeout_s: float) -> Ranks:
        """Makes the process group, gloo on CPUs and NCCL on GPUs; one process alone needs none.

        Raises:
            InputError: not all ranks have come.
        """
        if self.place.num_ranks == 1:
            return SOLO
        if self._ranks is None:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            own = dist.PrefixStore(self._session, self._connect())
            try:
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("group", own),
                    rank=self.place.rank,
                    world_size=self.place.num_ranks,
                    timeout=timedelta(seconds=timeout_s),
                )
                patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_ABSENCE_S))
            except RuntimeError as error:  # gloo has no type of its own
                raise InputError(
                    f"{self.place} could not connect to the others within {timeout_s:.0f} s "
                    f"({_first_line(error)}): one of them has ended, or a firewall is between the machines"
                ) from error
            atexit.register(_leave)
            self._ranks = Ranks(self.place, own, patient)
        return self._ranks

    @contextmanager
    def led(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Lets the others end, too, where the block, which does what was asked, fails before they have their order."""
        before, self._asked = self._session, dict(asked)
        try:
            yield
        except BaseException as error:
            if self._session == before:
                code = error.exit_code if isinstance(error, OnecardError) else OnecardError.exit_code
                # Ctrl+C reaches all by itself, and a launcher ends whoever has not come yet.
                patience_s = _FAREWELL_S if isinstance(error, Exception) and not is_launched() else 0.0
                with suppress(OnecardError, dist.DistError):
                    self.give_order({"exit_code": code}, patience_s)
            raise

    def remember(self, root: Path, output_dir: str | Path | None) -> None:
        """Leaves word of where the run is, for processes that are started in the place of these."""
        if self.place.num_ranks > 1:
            self._connect().set(self._run_key(output_dir), str(root.absolute()))

    def recall(self, output_dir: str | Path | None) -> Path | None:
        """Where processes that were here before these, for the same, have begun a run; None where there were none."""
        if self.place.num_ranks == 1:
            return None
        self._connect()
        root = self._read(self._run_key(output_dir))
        return None if root is None else Path(root)

    def _run_key(self, output_dir: str | Path | None) -> str:
        asked = json.dumps([self._asked, str(output_dir)], sort_keys=True)
        return f"run/{hashlib.sha256(asked.encode()).hexdigest()}"


@cache
def meeting() -> Meeting:
    """The meeting of this process, of which it has one."""
    return Meeting(find_place())


def _compare(asked: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Says in what a rank was asked for something else than rank 0."""
    # As it was sent: what stands in tuples here is a list there.
    own = json.loads(json.dumps(asked))
    names = sorted(name for name in {*own, *given} if own.get(name) != given.get(name))
    return "; ".join(f"{name} is {own.get(name)}, not {given.get(name)}" for name in names)


def _find_store(timeout_s: float) -> Any:
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _address() -> str:
    return ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _list_ranks(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads live on where DDP was. One that still lets go of the tensors of the last exchange takes the
        # interpreter's lock for it, and where the interpreter is ending that aborts the process.
        time.sleep(_LETTING_GO_S)
