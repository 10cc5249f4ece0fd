"""Whole runs on several processes: what one process would have made of them, written by one of them."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from light_tasks import make_light_task
from runs_on_ranks import HOW_IT_DIES

import onecard
from onecard.run import tasks

Tuner = Callable[..., Any]
Jobs = Callable[[int, list[dict[str, Any]]], tuple[list[int], str]]
WORKER = Path(__file__).with_name("runs_on_ranks.py")
# Three micro-batches of three, three and two samples: of two ranks one has less to do than the other, and for four they
# are cut.
TEXT = {"max_steps": 20, "eval_steps": 5, "sample_steps": 10, "save_steps": 5, "per_device_train_batch_size": 3}
IN_TURN = ("text", "parts")
CHATS = {"max_steps": 20, "per_device_train_batch_size": 1, "total_batch_size": 8, "eval_fraction": 0.25}
# Less items than ranks, then more; prompts that no number of ranks divides.
TASKS = {"eval_tasks": ["ifeval", "likely"], "eval_limit": 3, "eval_max_new_tokens": 6}
SAMPLES = {"sample_prompts": ["the ", "lazy", "a ", "dog", "over "], "sample_max_new_tokens": 8, "sample_steps": 10}
ADAPTED = {"lora_r": 4, "learning_rate": 1e-3}


@pytest.fixture
def do_jobs(do_on_ranks: Callable[..., tuple[list[int], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Does jobs on so many processes; gives their exit codes and all that they said of errors."""
    monkeypatch.setattr(tasks, "make_task", make_light_task)  # as they do

    def do(num_ranks: int, jobs: list[dict[str, Any]]) -> tuple[list[int], str]:
        listed = tmp_path / "jobs.json"
        listed.write_text(json.dumps(jobs, default=str), encoding="utf-8")
        return do_on_ranks(WORKER, num_ranks, listed)

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


def assert_shared(together: Any, alone: Any) -> None:
    """The same samples, scores and choice, and the same of each item, in the same order."""
    for kind, num in (("sampled", 2), ("scored", 10), ("chosen", 2)):
        found, expected = (run.events(kind) for run in (together, alone))
        assert len(found) >= num
        for one, other in zip(found, expected, strict=True):
            for key in ("value", "standard_error", "scores"):
                assert one.pop(key, 0.0) == pytest.approx(other.pop(key, 0.0), rel=1e-4), (kind, key)
            assert one == other
    assert len({sample["completion"] for sample in together.events("sampled")[0]["samples"]}) > 1
    paths = sorted(path.relative_to(alone.root) for path in alone.root.glob("responses/*.jsonl"))
    assert len(paths) >= 10
    for path in paths:
        assert (together.root / path).read_bytes() == (alone.root / path).read_bytes()


def test_four_processes_make_the_run_of_one(runner: Any, tuner: Tuner, do_jobs: Jobs) -> None:
    text = runner.values | TEXT | {"dropout": 0.0, "optim": "adamw", "report_to": "tensorboard"}
    recipes = {
        "text": text | TASKS | SAMPLES,
        "parts": text | TASKS | SAMPLES | {"strategy": "fsdp"},
        "chats": tuner("llama", **CHATS).values,
        "chats-parts": tuner("llama", **CHATS, strategy="fsdp").values,
        "lora": tuner("gpt2", **CHATS, **ADAPTED, **TASKS, method="lora", save_steps=10).values,
    }
    if find_spec("bitsandbytes"):
        recipes["qlora"] = tuner("llama", **CHATS, **ADAPTED, method="qlora").values
    jobs = [{"root": runner.folder / f"{name}-4", "recipe": recipe} for name, recipe in recipes.items()]
    again = [
        {"root": runner.folder / f"{name}-again", "taken_back": (runner.folder / f"{name}-4", 15)} for name in IN_TURN
    ]
    codes, errors = do_jobs(4, [*jobs, *again])
    assert codes == [0] * 4, errors
    for name in IN_TURN:  # more than two are summed in an order, which must not depend on where a run began
        runner.outcome(f"{name}-again").assert_equals(runner.outcome(f"{name}-4"))
    for name, recipe in recipes.items():
        onecard.train(onecard.load_recipe(recipe), output_dir=runner.folder / f"{name}-1")
        alone, together = (runner.outcome(f"{name}-{num}") for num in (1, 4))
        assert len(together.events("step")) == 20
        assert_same(together, alone)
    for name in ("text", "parts"):
        assert_shared(runner.outcome(f"{name}-4"), runner.outcome(f"{name}-1"))
        # A checkpoint of several is a folder that transformers opens.
        alone, together = (load_weights(runner.outcome(f"{name}-{num}").last) for num in (1, 4))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(list((runner.folder / "text-4").glob("tensorboard/*"))) == 1
    # Three micro-batches of three and two samples would leave one of the ranks without.
    plans = [json.loads((runner.folder / f"text-{num}" / "plan.json").read_text(encoding="utf-8")) for num in (1, 4)]
    assert [plan["micro_batch_size"] for plan in plans] == [3, 2]


def test_a_run_goes_on_with_the_same_or_another_number_of_processes(runner: Any, do_jobs: Jobs) -> None:
    common = runner.values | TEXT | {"dropout": 0.1, "optim": "adamw", "save_total_limit": 10}
    recipes = {strategy: common | {"strategy": strategy} for strategy in ("ddp", "fsdp")}
    whole = [{"root": runner.folder / f"{name}-whole", "recipe": recipe} for name, recipe in recipes.items()]
    torn = {"root": runner.folder / "fsdp-torn", "recipe": recipes["fsdp"], "dies_at": (1, 13)}
    codes, errors = do_jobs(2, [*whole, torn])
    assert codes == [1, HOW_IT_DIES], errors
    assert (
        "RankLostError: rank 1 of 2 is gone: it was killed, or its machine cannot be reached, after step 13" in errors
    )
    # With ddp one is killed in test_lost_ranks.py, too: here a run is taken back to where it would have been then.
    shutil.copytree(runner.folder / "ddp-whole", runner.folder / "ddp-torn")
    for step in (15, 20):
        shutil.rmtree(runner.folder / "ddp-torn" / "checkpoints" / f"step-{step:06d}")
    for name in recipes:
        assert runner.outcome(f"{name}-torn").checkpoints == ["step-000005", "step-000010"]
        shutil.copytree(runner.folder / f"{name}-torn", runner.folder / f"{name}-same")
        runner.kill(f"{name}-torn", after_events=10)  # on this process alone, after step 15 was saved
        assert "step-000015" in runner.outcome(f"{name}-torn").checkpoints
    codes, errors = do_jobs(
        2, [{"root": runner.folder / f"{name}-{how}"} for name in recipes for how in ("torn", "same")]
    )
    assert codes == [0, 0], errors
    for name in recipes:
        assert_same(runner.outcome(f"{name}-torn"), runner.outcome(f"{name}-whole"))
        runner.outcome(f"{name}-same").assert_equals(runner.outcome(f"{name}-whole"))
