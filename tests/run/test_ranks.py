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

import onecard

Tuner = Callable[..., Any]
# Of a machine that is busy with other things.
_PATIENCE_S = 900
WORKER = Path(__file__).with_name("runs_on_ranks.py")
PRETRAINING = {
    "max_steps": 50,
    "eval_steps": 10,
    "sample_steps": 25,
    "save_steps": 25,
    "per_device_train_batch_size": 1,
}
CHATS = {"max_steps": 50, "per_device_train_batch_size": 1, "total_batch_size": 8, "eval_fraction": 0.25}
COMMAND = [sys.executable, "-m", "onecard"]


def train_on_ranks(num_ranks: int, recipes: dict[Path, dict[str, Any]], folder: Path) -> None:
    listed = folder / "recipes.json"
    listed.write_text(json.dumps({str(root): values for root, values in recipes.items()}), encoding="utf-8")
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
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(errors)


def assert_same(one: Any, other: Any, most: float = 1e-5) -> None:
    """Same events in the same order; of steps and evaluations, numbers that differ by rounding alone."""
    assert one.kinds == other.kinds
    for kind, key in (("step", "loss"), ("step", "grad_norm"), ("evaluated", "loss")):
        found, expected = ([event[key] for event in run.events(kind)] for run in (one, other))
        assert found == pytest.approx(expected, abs=most), (kind, key)
    for key in ("tokens_seen", "num_target_tokens", "learning_rate"):
        assert [event[key] for event in one.events("step")] == [event[key] for event in other.events("step")]


def test_two_processes_make_the_run_of_one(runner: Any, tuner: Tuner, tmp_path: Path) -> None:
    whole = tuner("llama", **CHATS)
    values = {
        "text": runner.values | PRETRAINING,
        "chats": whole.values,
        "lora": tuner("gpt2", **CHATS, method="lora", lora_r=4, learning_rate=1e-3).values,
    }
    values["text"] |= {"dropout": 0.0, "optim": "adamw", "report_to": "tensorboard"}
    ranked = {name: tmp_path / "runs" / f"{name}-2" for name in values}
    train_on_ranks(2, {ranked[name]: values[name] for name in values}, tmp_path)
    for name, recipe in values.items():
        onecard.train(onecard.load_recipe(recipe), output_dir=tmp_path / "runs" / f"{name}-1")
        alone, together = (runner.outcome(f"{name}-{num}") for num in (1, 2))
        assert len(together.events("step")) == 50
        assert_same(together, alone)
        assert together.last.is_dir()
    assert len(list(ranked["text"].glob("tensorboard/*"))) == 1
