"""The commands, run in this process, and a stand-in for `onecard.api` that trains nothing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import onecard
from onecard.cli import main
from onecard.observe import Event, FinishedEvent, StepEvent
from onecard.spec import CorpusFacts, ModelPlan, OptimizerPlan, Plan, SchedulePlan
from onecard.spec.load import load_recipe


@dataclass
class Outcome:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `onecard` with the given words."""

    def call(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def plan() -> Plan:
    return Plan(
        device="cpu",
        precision="fp32",
        torch_compile=False,
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        deterministic=False,
        seed=1337,
        model=ModelPlan(
            settings={"model_type": "qwen3", "num_hidden_layers": 6, "hidden_size": 256},
            dropout=0.0,
            init="zero-output",
            num_parameters=5_500_000,
            num_matrix_parameters=4_500_000,
        ),
        optimizer=OptimizerPlan(
            name="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=1e-8,
            muon_momentum=0.95,
            max_grad_norm=1.0,
        ),
        schedule=SchedulePlan(name="wsd", num_steps=40, num_warmup_steps=4, num_decay_steps=16, min_lr_ratio=0.0),
        corpus=CorpusFacts(
            vocab_size=4096,
            num_train_tokens=655_360,
            num_heldout_tokens=20_000,
            train_bytes=2_000_000,
            heldout_bytes=60_000,
            separator_id=0,
            fingerprint="abc",
        ),
        max_seq_length=256,
        micro_batch_size=16,
        total_batch_size=32,
        eval_batch_size=32,
        max_hours=None,
        eval_steps=20,
        eval_batches=None,
        save_steps=0,
        save_total_limit=3,
        sample_steps=20,
        early_stopping_patience=None,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        dataset_num_proc=2,
        flops_per_token=3.3e7,
        reasons={"micro_batch_size": "half of the batch is fastest on two cores", "schedule.num_steps": "of the recipe"},
    )


def steps(first: int, last: int) -> list[Event]:
    return [
        StepEvent(
            step=step,
            elapsed_s=step * 0.1,
            loss=2.5,
            learning_rate=3e-3,
            grad_norm=0.7,
            num_target_tokens=8192,
            tokens_seen=step * 8192,
            is_finite=True,
            step_s=0.1,
            tokens_per_s=81920.0,
            wait_s=0.0,
        )
        for step in range(first, last + 1)
    ]


def finish(step: int, **fields: Any) -> FinishedEvent:
    usual: dict[str, Any] = {
        "reason": "completed",
        "loss": 1.8,
        "best_loss": 1.75,
        "best_step": 20,
        "tokens_seen": step * 8192,
        "num_steps": step,
        "tokens_per_s": 81920.0,
        "seconds": 4.0,
    }
    return FinishedEvent(step=step, elapsed_s=4.0, **(usual | fields))


@dataclass
class FakeApi:
    """Records how it is called and tells the story that a run would."""

    plan_made: Plan
    run_folder: Path
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    finished: FinishedEvent = field(default_factory=lambda: finish(40))
    raises: BaseException | None = None

    load_recipe = staticmethod(load_recipe)

    def plan(self, recipe: Any) -> Plan:
        self.calls.append(("plan", {"recipe": recipe}))
        return self.plan_made

    def prepare(self, recipe: Any, *, progress: Any = None) -> Any:
        self.calls.append(("prepare", {"recipe": recipe}))
        progress("tokenizing", 1, 2)
        return SimpleNamespace(
            tokenizer_folder=Path("cache/tokenizer"),
            vocab_size=4096,
            train=(SimpleNamespace(path=Path("cache/train.bin")),),
            heldout=(),
            num_train_tokens=1000,
            num_heldout_tokens=0,
            train_bytes=3000,
            heldout_bytes=0,
        )

    def train(self, recipe: Any, *, output_dir: Any = None, resume: Any = None, **callbacks: Any) -> Path:
        self.calls.append(("train", {"recipe": recipe, "output_dir": output_dir, "resume": resume}))
        return self._tell(**callbacks)

    def resume(self, run: Any, **callbacks: Any) -> Path:
        self.calls.append(("resume", {"run": run}))
        return self._tell(**callbacks)

    def generate(self, model: Any, prompts: list[str], **settings: Any) -> list[str]:
        self.calls.append(("generate", {"model": model, "prompts": prompts} | settings))
        return [f"{prompt[::-1]}!" for prompt in prompts]

    def _tell(self, *, on_event: Any, on_plan: Any, on_progress: Any) -> Path:
        on_progress("tokenizing", 1, 2)
        on_plan(self.plan_made, self.run_folder)
        for event in steps(1, 40):
            on_event(event)
        if self.raises is not None:
            raise self.raises
        on_event(self.finished)
        return self.run_folder


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, plan: Plan, tmp_path: Path) -> FakeApi:
    fake = FakeApi(plan, tmp_path / "runs" / "demo-1")
    (fake.run_folder / "tensorboard").mkdir(parents=True)
    module = ModuleType("onecard.api")
    for name in ("load_recipe", "plan", "prepare", "train", "resume", "generate"):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "onecard.api", module)
    monkeypatch.setattr(onecard, "api", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake
