"""A rank that is slow, hangs or is killed; the real thing, at more moments, is benchmarks/ranks_lost.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from onecard.distributed.place import Place
from onecard.distributed.ranks import Ranks
from onecard.errors import DoesNotFitError, InputError
from onecard.observe.lines import parse_event
from onecard.run import together
from onecard.run.together import find_sick, refuse_on_one_rank

WORKER = Path(__file__).with_name("lost_on_ranks.py")
SHORT = {"max_steps": 20, "eval_steps": 10, "sample_steps": 20, "save_steps": 5, "per_device_train_batch_size": 2}
_PATIENCE_S = 120


@pytest.fixture
def write_jobs(tmp_path: Path) -> Callable[..., Path]:
    def write(*jobs: dict[str, Any]) -> Path:
        listed = tmp_path / "jobs.json"
        listed.write_text(json.dumps(jobs, default=str), encoding="utf-8")
        return listed

    return write


def test_a_slow_rank_is_seen_and_one_that_hangs_ends_the_run(
    runner: Any, do_on_ranks: Callable[..., tuple[list[int], str]], write_jobs: Callable[..., Path]
) -> None:
    recipe = runner.values | SHORT | {"ddp_timeout": 3}
    slow = {"root": runner.folder / "slow", "recipe": recipe, "slow_s": 0.1}
    hangs = {"root": runner.folder / "hangs", "recipe": recipe, "hangs_at": 12}
    codes, errors = do_on_ranks(WORKER, 2, write_jobs(slow, hangs))
    lines = (runner.folder / "slow" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    looks = [event for event in map(parse_event, lines) if event.event == "ranks"]
    assert [look.step for look in looks] == [10, 20]
    for look in looks:
        assert look.forward_s[1] > look.forward_s[0] + 0.1  # two passes of 0.1 s, whatever else the machine does
        assert look.waiting_shares[0] > 0.2
        assert look.waiting_shares[1] == pytest.approx(0, abs=1e-9)
    assert codes[0] == 1
    told = "rank 1 of 2 did not answer in time (ddp_timeout): it hangs, or its machine cannot be reached, after step 12"
    assert errors.count(told) == 1
    assert runner.outcome("hangs").checkpoints == ["step-000005", "step-000010"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_torchrun_starts_a_run_again_that_goes_on_where_it_stood(runner: Any, write_jobs: Callable[..., Path]) -> None:
    # Killed in its share of a task, for which the other one may wait for hours.
    recipe = runner.values | SHORT | {"eval_tasks": "ifeval", "eval_limit": 5, "eval_max_new_tokens": 4}
    listed = write_jobs({"root": runner.folder / "run", "recipe": recipe, "killed_at": 10})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*torchrun, str(WORKER), str(listed)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        errors = process.communicate(timeout=_PATIENCE_S)[1]
    finally:
        left = [one for one in psutil.process_iter(["cmdline"]) if str(listed) in (one.info["cmdline"] or ())]
        for one in left:
            one.kill()
    assert process.returncode == 0, errors
    assert not left
    assert errors.count("rank 1 of 2 is gone: it was killed, or its machine cannot be reached, after step 10") == 1
    found = runner.outcome("run")
    assert [event["step"] for event in found.events("step")] == list(range(1, 21))
    assert [event["reason"] for event in found.events("finished")] == ["completed"]
    parts = [event for event in found.events("scored") if not event["is_whole"]]
    assert [event["step"] for event in parts] == [5, 10, 15, 20]
    assert len(found.events("chosen")) == 1


class Told(Ranks):
    """Two ranks of which the other one says what is given."""

    def __init__(self, other: Any) -> None:
        super().__init__(Place(0, 2, 0, 2))
        self._other = other

    def gather_texts(self, text: str) -> list[str]:
        return [text, self._other]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, torch.tensor([[self._other]], dtype=rows.dtype)])


class Other(Told):
    """Two ranks of which the other one says what this one does, but for what is given."""

    def gather_texts(self, text: str) -> list[str]:
        return [text, json.dumps(json.loads(text) | self._other)]


def test_ranks_that_would_compute_different_things_are_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError) as refused:
        together.check_same(Other({"onecard": "0.0.1", "card": "NVIDIA H100"}), "text", cpu)
    assert "rank 1 has another onecard than rank 0: 0.0.1, not " in str(refused.value)
    assert "rank 1 has another card than rank 0: NVIDIA H100, not CPU" in str(refused.value)
    together.check_same(Other({}), "text", cpu)


def test_more_ranks_than_cards_are_refused(tiny_plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on this machine need as many cards, it has 1"):
        together.check_cards(tiny_plan(device="cuda:0"), Place(0, 2, 0, 2))
    together.check_cards(tiny_plan(device="cuda:0"), Place(0, 2, 0, 1))
    together.check_cards(tiny_plan(), Place(0, 2, 0, 2))


def test_each_process_takes_a_card_of_its_own(tiny_plan: Callable[..., Any]) -> None:
    given = tiny_plan(device="cuda:1")
    devices = [together.on_own_card(given, Place(rank, 4, rank % 2, 2)).device for rank in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert together.on_own_card(given, Place(0, 1, 0, 1)).device == "cuda:1"
    assert together.on_own_card(tiny_plan(), Place(1, 2, 1, 2)).device == "cpu"


def test_no_rank_makes_its_step_smaller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not even before they have come together: the leader tries its memory then, and would share out another step.
    refuse_on_one_rank()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DoesNotFitError, match="memory ran out on rank 0 of 2"):
        refuse_on_one_rank()


@pytest.mark.parametrize(("own", "other", "sick"), [(True, 0, [1]), (False, 1, [0]), (False, 0, []), (True, 1, [])])
def test_the_rank_whose_loss_is_not_finite_is_found(own: bool, other: int, sick: list[int]) -> None:
    assert find_sick(Told(other), own) == sick
