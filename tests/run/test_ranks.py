"""Whole runs on several processes: what one process would have made of them, written by one of them."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_ranks import HOW_IT_DIES

import onecard

Tuner = Callable[..., Any]
Jobs = Callable[[list[dict[str, Any]]], tuple[list[int], str]]
WORKER = Path(__file__).with_name("runs_on_ranks.py")
# Three micro-batches of three, three and two samples: one rank has less to do than the other.
TEXT = {"max_steps": 20, "eval_steps": 5, "sample_steps": 10, "save_steps": 5, "per_device_train_batch_size": 3}
CHATS = {"max_steps": 20, "per_device_train_batch_size": 1, "total_batch_size": 8, "eval_fraction": 0.25}
ADAPTED = {"lora_r": 4, "learning_rate": 1e-3}


@pytest.fixture
def do_on_two(do_on_ranks: Callable[..., tuple[list[int], str]], tmp_path: Path) -> Jobs:
    """Does jobs on two processes; gives their exit codes and all that they said of errors."""

    def do(jobs: list[dict[str, Any]]) -> tuple[list[int], str]:
        listed = tmp_path / "jobs.json"
        listed.write_text(json.dumps(jobs, default=str), encoding="utf-8")
        return do_on_ranks(WORKER, 2, listed)

    return do


def assert_same(one: Any, other: Any, most: float = 1e-5) -> None:
    """Same events in the same order; of steps and evaluations, numbers that differ by rounding alone."""
    assert one.kinds == other.kinds
    for kind, key, rel in (("step", "loss", 0.0), ("evaluated", "loss", 0.0), ("step", "grad_norm", 1e-4)):
        found, expected = ([event[key] for event in run.events(kind)] for run in (one, other))
        assert found == pytest.approx(expected, abs=most, rel=rel), (kind, key)
    for key in ("tokens_seen", "num_target_tokens", "learning_rate"):
        assert [event[key] for event in one.events("step")] == [event[key] for event in other.events("step")]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_two_processes_make_the_run_of_one(runner: Any, tuner: Tuner, do_on_two: Jobs) -> None:
    text = runner.values | TEXT | {"dropout": 0.0, "optim": "adamw", "report_to": "tensorboard"}
    recipes = {
        "text": text,
        # Of three batches held out one rank has two: the other has to make as many passes.
        "text-parts": text | {"strategy": "fsdp", "eval_batches": 3, "per_device_eval_batch_size": 1},
        "chats": tuner("llama", **CHATS).values,
        "chats-parts": tuner("llama", **CHATS, strategy="fsdp").values,
        "lora": tuner("gpt2", **CHATS, **ADAPTED, method="lora").values,
    }
    if find_spec("bitsandbytes"):
        recipes["qlora"] = tuner("llama", **CHATS, **ADAPTED, method="qlora").values
    codes, errors = do_on_two(
        [{"root": runner.folder / f"{name}-2", "recipe": recipe} for name, recipe in recipes.items()]
    )
    assert codes == [0, 0], errors
    for name, recipe in recipes.items():
        same = name.removesuffix("-parts")  # one process alone has nothing in parts
        if name == same:
            onecard.train(onecard.load_recipe(recipe), output_dir=runner.folder / f"{name}-1")
        alone, together = runner.outcome(f"{same}-1"), runner.outcome(f"{name}-2")
        assert len(together.events("step")) == 20
        assert_same(together, alone)
    for name in ("text", "text-parts"):
        # A checkpoint of several is a folder that transformers opens.
        alone, together = (load_weights(runner.outcome(run).last) for run in ("text-1", f"{name}-2"))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(list((runner.folder / "text-2").glob("tensorboard/*"))) == 1


def test_a_run_goes_on_with_the_same_or_another_number_of_processes(runner: Any, do_on_two: Jobs) -> None:
    common = runner.values | TEXT | {"dropout": 0.1, "optim": "adamw"}
    recipes = {strategy: common | {"strategy": strategy} for strategy in ("ddp", "fsdp")}
    torn = {
        strategy: {"root": runner.folder / f"{strategy}-torn", "recipe": recipe, "dies_at": (1, 13)}
        for strategy, recipe in recipes.items()
    }
    whole = [{"root": runner.folder / f"{name}-whole", "recipe": recipe} for name, recipe in recipes.items()]
    for jobs in ([torn["ddp"]], [*whole, torn["fsdp"]]):
        codes, errors = do_on_two(jobs)
        assert codes == [1, HOW_IT_DIES], errors
        assert (
            "RankLostError: rank 1 of 2 is gone: it was killed, or its machine cannot be reached, after step 13"
            in errors
        )
    for name in recipes:
        assert runner.outcome(f"{name}-torn").checkpoints == ["step-000005", "step-000010"]
        shutil.copytree(runner.folder / f"{name}-torn", runner.folder / f"{name}-same")
        runner.kill(f"{name}-torn", after_events=10)  # on this process alone, after step 15 was saved
        assert "step-000015" in runner.outcome(f"{name}-torn").checkpoints
    codes, errors = do_on_two(
        [{"root": runner.folder / f"{name}-{how}"} for name in recipes for how in ("torn", "same")]
    )
    assert codes == [0, 0], errors
    for name in recipes:
        assert_same(runner.outcome(f"{name}-torn"), runner.outcome(f"{name}-whole"))
        runner.outcome(f"{name}-same").assert_equals(runner.outcome(f"{name}-whole"))
