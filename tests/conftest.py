"""Small plans, models and batches that the tests of the core share. Nothing here imports torch before it is used."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onecard.observe import EvaluatedEvent, Event, FinishedEvent, StepEvent, to_json_line
from onecard.spec import CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan

if TYPE_CHECKING:
    from onecard.training.micro_batch import MicroBatch
    from onecard.training.state import TrainState

VOCABULARY, LENGTH = 97, 16
# Processes that wait for one another must never hold up a suite; they say where they stand a little earlier.
_PATIENCE_S = 120
_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potent jade elixir"
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_COMMON = {"max_position_embeddings": 2 * LENGTH, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_GATED = {"num_key_value_heads": 2, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | _SIZES | _COMMON | _GATED,
    "qwen2": {"model_type": "qwen2"} | _SIZES | _COMMON | _GATED,
    "qwen3": {"model_type": "qwen3", "head_dim": 8} | _SIZES | _COMMON | _GATED,
    "gpt2": {"model_type": "gpt2"} | _SIZES | _COMMON,
}


def pytest_configure() -> None:
    # A shell lets what it starts in the background ignore it, and every process of a test would, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., dict[str, Any]]:
    """A complete config of a tiny model: `settings_of("llama", tie_word_embeddings=True)`."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return ARCHITECTURES[name] | changes

    return make


@pytest.fixture(scope="session")
def tiny_plan() -> Callable[..., Plan]:
    """A plan for a tiny model: `tiny_plan("gpt2", optimizer="adamw", dropout=0.1)`; each keyword finds its part."""

    def make(name: str = "qwen3", *, optimizer: str = "muon", schedule: str = "wsd", **changes: Any) -> Plan:
        model = {"settings": ARCHITECTURES[name], "dropout": 0.0, "init": "transformers", "base": None}
        rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.1, "muon_momentum": 0.95}
        moments = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
        course = {"num_steps": 20, "num_warmup_steps": 2, "num_decay_steps": 8, "min_lr_ratio": 0.0}
        rest: dict[str, Any] = {}
        for key, value in changes.items():
            part = next((part for part in (model, rates, moments, course) if key in part), rest)
            part[key] = value
        return Plan(
            **_PLAN
            | {
                "model": ModelPlan(**model, num_parameters=1, num_matrix_parameters=1),
                "optimizer": OptimizerPlan(name=optimizer, **rates, **moments),
                "schedule": SchedulePlan(name=schedule, **course),
            }
            | rest
        )

    return make


_PLAN: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "deterministic": False,
    "seed": 1337,
    "corpus": CorpusFacts(
        vocab_size=VOCABULARY,
        num_train_tokens=1000,
        num_heldout_tokens=100,
        train_bytes=1000,
        heldout_bytes=100,
        separator_id=0,
        fingerprint="tiny",
    ),
    "max_seq_length": LENGTH,
    "micro_batch_size": 4,
    "total_batch_size": 8,
    "eval_batch_size": 4,
    "max_hours": None,
    "eval_steps": 10,
    "eval_batches": None,
    "save_steps": 10,
    "save_total_limit": None,
    "sample_steps": 10,
    "sample_prompts": (),
    "sample_max_new_tokens": 4,
    "early_stopping_patience": None,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "dataset_num_proc": 1,
    "flops_per_token": 1e5,
    "peak_flops": 1e9,
    "reasons": {},
}


@pytest.fixture(scope="session")
def do_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[int], str]]:
    """Runs a script in several processes with the environment that torchrun would give: `do_on_ranks(script, 2, ...)`.

    Gives their exit codes and all that they said of errors; fails, and ends them, where they take too long.
    """

    def do(script: Path, num_ranks: int, *words: object) -> tuple[list[int], str]:
        logs = [tmp_path_factory.mktemp("rank") / "errors.txt" for _ in range(num_ranks)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        shared["ENDS_AFTER_S"] = str(_PATIENCE_S - 10)
        ranks, until = [], time.monotonic() + _PATIENCE_S
        try:
            for rank, log in enumerate(logs):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("wb") as errors:
                    command = [sys.executable, str(script), *map(str, words)]
                    ranks.append(subprocess.Popen(command, env=os.environ | shared | own, stderr=errors))
            codes = [rank.wait(max(0.0, until - time.monotonic())) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
            if until < time.monotonic():
                print(said, file=sys.stderr)
        return codes, said

    return do


@pytest.fixture
def tiny_state(tiny_plan: Callable[..., Plan]) -> "Callable[..., TrainState]":
    """A model in training, by the words of `tiny_plan`."""

    def make(name: str = "qwen3", **changes: Any) -> "TrainState":
        from onecard.training.assemble import assemble

        return assemble(tiny_plan(name, **changes))

    return make


@pytest.fixture
def random_micro_batch() -> "Callable[..., MicroBatch]":
    """Random tokens [rows, LENGTH]; row i has i targets less than the first, so that rows weigh differently."""

    def make(rows: int, seed: int = 0) -> "MicroBatch":
        import torch

        from onecard.training.micro_batch import MicroBatch

        ids = torch.randint(1, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
        targets = ids[:, 1:].clone()
        for row in range(rows):
            targets[row, : row % LENGTH] = -100
        return MicroBatch(ids[:, :-1].contiguous(), targets, None)

    return make


@pytest.fixture
def corpus_text(tmp_path: Path) -> Path:
    """Some kilobytes of English words that never change."""
    chosen = random.Random(1).choices(_WORDS.split(), k=2500)
    path = tmp_path / "corpus.txt"
    text = " ".join(word + ("\n" if index % 9 == 8 else "") for index, word in enumerate(chosen))
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def write_run(tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Path]:
    """A run folder as a run would leave it: `write_run("a", [3.0, 2.5], optimizer="adamw")`.

    `losses` are held-out losses after every ten steps; `recipe` are settings of its recipe; the rest are those of
    `tiny_plan`.
    """

    def write(name: str, losses: Sequence[float], *, recipe: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        from onecard.spec import load_recipe, recipe_to_yaml

        root, plan = tmp_path / "runs" / name, tiny_plan(**changes)
        root.mkdir(parents=True)
        (root / "plan.json").write_text(plan.model_dump_json(), encoding="utf-8")
        asked = {"dataset": "a.txt", "max_steps": 20, "optim": plan.optimizer.name} | dict(recipe or {})
        (root / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(asked)), encoding="utf-8")
        lines = [to_json_line(event) for event in _events_of(losses, plan)]
        (root / "events.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        return root

    return write


def _events_of(losses: Sequence[float], plan: Plan) -> Iterator[Event]:
    for step in range(1, 10 * len(losses) + 1):
        yield StepEvent(
            step=step,
            elapsed_s=step * 0.5,
            loss=4 - step / 100,
            learning_rate=3e-3,
            grad_norm=0.7,
            num_target_tokens=128,
            tokens_seen=step * 128,
            is_finite=True,
            step_s=0.5,
            tokens_per_s=10.0 if step in (1, 7) else 2000.0,
            wait_s=0.0,
        )
        if step % 10 == 0:
            loss = losses[step // 10 - 1]
            yield EvaluatedEvent(
                step=step,
                elapsed_s=step * 0.5,
                loss=loss,
                bits_per_byte=loss / 2,
                standard_error=0.01,
                num_target_tokens=plan.corpus.num_heldout_tokens,
                is_best=loss <= min(losses),
                seconds=0.1,
            )
    if len(losses) * 10 < plan.schedule.num_steps:
        return
    best = min(losses)
    yield FinishedEvent(
        step=10 * len(losses),
        elapsed_s=5.0 * len(losses),
        reason="completed",
        loss=losses[-1],
        best_loss=best,
        best_step=10 * (losses.index(best) + 1),
        tokens_seen=1280 * len(losses),
        num_steps=plan.schedule.num_steps,
        tokens_per_s=2000.0,
        seconds=5.0 * len(losses),
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
