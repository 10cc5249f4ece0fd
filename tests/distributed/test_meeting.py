"""How ranks come together: orders, what they were asked for, and what those before them have left in the store."""

import json
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from onecard.distributed import meeting as module
from onecard.distributed.launch import check_is_for_several, take_num_processes
from onecard.distributed.meeting import DismissedError, Meeting
from onecard.distributed.place import Place, find_place
from onecard.errors import InputError

ASKED = {"learning_rate": 0.1, "betas": (0.9, 0.95)}


@pytest.fixture
def meet() -> Callable[[int], Meeting]:
    """Makes the meetings of two ranks, which share a store."""
    store = dist.HashStore()

    def make(rank: int) -> Meeting:
        made = Meeting(Place(rank, 2, rank, 2))
        made._store = store
        return made

    return make


def in_thread(do: Callable[[], Any]) -> Callable[[], Any]:
    """Does something beside; what it gives or raises comes when it is asked for."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(do())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(timeout=20)
        (result,) = found
        if isinstance(result, Exception):
            raise result
        return result

    return wait


def test_an_order_reaches_those_that_sit_there_now(meet: Callable[[int], Meeting]) -> None:
    for root, is_late in (("first", False), ("second", True)):  # the store keeps what those before have left
        leader = meet(0)
        if is_late:  # its seat is still the one of before
            give = in_thread(partial(leader.give_order, {"root": root}, 10))
            told = in_thread(lambda: meet(1).await_order({}))
            give()
        else:
            told = in_thread(lambda: meet(1).await_order({}))
            leader.give_order({"root": root}, 10)
        assert told()["root"] == root


def test_ranks_that_were_not_started_alike_all_end(meet: Callable[[int], Meeting]) -> None:
    leader, told = meet(0), in_thread(lambda: meet(1).await_order({**ASKED, "learning_rate": 0.2}))
    with (
        pytest.raises(InputError, match=r"rank 1: learning_rate is 0\.2, not 0\.1"),
        leader.led(ASKED),
    ):
        leader.give_order({"root": "run"}, 10)
    with pytest.raises(DismissedError) as dismissed:
        told()
    assert dismissed.value.exit_code == 2


def test_a_leader_that_fails_lets_the_others_end(meet: Callable[[int], Meeting]) -> None:
    leader, told = meet(0), in_thread(lambda: meet(1).await_order(ASKED))
    with pytest.raises(InputError, match="no such text"), leader.led(ASKED):
        raise InputError("no such text")
    with pytest.raises(DismissedError) as dismissed:
        told()
    assert dismissed.value.exit_code == 2


def test_a_rank_that_does_not_come_is_named(meet: Callable[[int], Meeting]) -> None:
    leader = meet(0)
    with pytest.raises(InputError, match="rank 1 of 2 did not come within 0 s"):
        leader.give_order({"root": "run"}, 0.3)


def test_a_run_is_found_again_by_what_was_asked(meet: Callable[[int], Meeting], tmp_path: Path) -> None:
    first, again = meet(0), meet(0)
    for one in (first, again):
        one._asked = dict(ASKED)
    assert again.recall("out") is None
    first.remember(tmp_path, "out")
    assert again.recall("out") == tmp_path
    assert again.recall("elsewhere") is None
    again._asked = {"learning_rate": 0.3}
    assert again.recall("out") is None


def test_nobody_at_the_address_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with pytest.raises(InputError, match=f"rank 1 of 2 cannot reach the others at 127.0.0.1:{port}"):
        Meeting(Place(1, 2, 1, 2))._connect(0.2)


@pytest.mark.parametrize("environment", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_an_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        find_place(environment)


@pytest.mark.parametrize("value", ["0", "-1", "abc", "9999999", "2.5", ""])
def test_numbers_of_processes_that_cannot_be_are_refused(value: str) -> None:
    with pytest.raises(InputError, match="give one number from 1 to"):
        take_num_processes(["train", "x.yaml", f"--num_processes={value}"])


def test_commands_for_one_process_are_refused() -> None:
    for words in (["evaluate", "run"], ["resume", "run", "--verify", "3"], ["plan", "x"], []):
        with pytest.raises(InputError, match="runs in one process"):
            check_is_for_several(words)
    check_is_for_several(["train", "x.yaml"])
    assert json.dumps(take_num_processes(["resume", "run", "--num-processes", "2"])) == '[["resume", "run"], 2]'
