"""Whole runs on several processes: what one process would have made of them, written by one of them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs_on_ranks import HOW_IT_DIES

import onecard

Tuner = Callable[..., Any]
# Of a machine that is busy with other things.
_PATIENCE_S = 900
WORKER = Path(__file__).with_name("runs_on_ranks.py")
TEXT = {"max_steps": 50, "eval_steps": 10, "sample_steps": 25, "save_steps": 10, "per_device_train_batch_size": 1}
CHATS = {"max_steps": 50, "per_device_train_batch_size": 1, "total_batch_size": 8, "eval_fraction": 0.25}


def do_on_ranks(num_ranks: int, jobs: list[dict[str, Any]], folder: Path) -> tuple[list[int], str]:
    """Does jobs on so many processes; gives their exit codes and all that they said of errors."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs, default=str), encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(listed)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(num_ranks)
    ]
    errors = [rank.communicate(timeout=_PATIENCE_S)[1].decode() for rank in ranks]
    return [rank.returncode for rank in ranks], "\n".join(errors)


def assert_same(one: Any, other: Any, most: float = 1e-5) -> None:
    """Same events in the same order; of steps and evaluations, numbers that differ by rounding alone."""
    assert one.kinds == other.kinds
    for kind, key, rel in (("step", "loss", 0.0), ("evaluated", "loss", 0.0), ("step", "grad_norm", 1e-4)):
        found, expected = ([event[key] for event in run.events(kind)] for run in (one, other))
        assert found == pytest.approx(expected, abs=most, rel=rel), (kind, key)
    for key in ("tokens_seen", "num_target_tokens", "learning_rate"):
        assert [event[key] for event in one.events("step")] == [event[key] for event in other.events("step")]


def test_two_processes_make_the_run_of_one(runner: Any, tuner: Tuner, tmp_path: Path) -> None:
    text = runner.values | TEXT | {"dropout": 0.0, "optim": "adamw", "report_to": "tensorboard"}
    recipes = {
        "text": text,
        "parts": text | {"strategy": "fsdp"},
        "chats": tuner("llama", **CHATS).values,
        "lora": tuner("gpt2", **CHATS, method="lora", lora_r=4, learning_rate=1e-3).values,
    }
    jobs = [{"root": runner.folder / f"{name}-2", "recipe": recipe} for name, recipe in recipes.items()]
    codes, errors = do_on_ranks(2, jobs, tmp_path)
    assert codes == [0, 0], errors
    for name, recipe in recipes.items():
        onecard.train(onecard.load_recipe(recipe), output_dir=runner.folder / f"{name}-1")
        alone, together = (runner.outcome(f"{name}-{num}") for num in (1, 2))
        assert len(together.events("step")) == 50
        assert_same(together, alone)
    assert len(list((runner.folder / "text-2").glob("tensorboard/*"))) == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(strategy: str, runner: Any, tmp_path: Path) -> None:
    recipe = runner.values | TEXT | {"dropout": 0.1, "optim": "adamw", "strategy": strategy}
    whole = {"root": runner.folder / "whole", "recipe": recipe}
    torn = {"root": runner.folder / "torn", "recipe": recipe, "dies_at": (1, 23)}
    codes, errors = do_on_ranks(2, [whole, torn], tmp_path)
    assert codes == [1, HOW_IT_DIES], errors
    assert "RankLostError: rank 1 of 2 did not answer after step 23" in errors
    assert runner.outcome("torn").checkpoints == ["step-000010", "step-000020"]
    runner.kill("torn", after_events=20)  # on this process alone, after step 30 was saved
    assert "step-000030" in runner.outcome("torn").checkpoints
    codes, errors = do_on_ranks(2, [{"root": runner.folder / "torn"}], tmp_path)
    assert codes == [0, 0], errors
    assert_same(runner.outcome("torn"), runner.outcome("whole"))
