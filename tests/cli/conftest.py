"""The commands, run in this process, and a stand-in for `onecard.api` that trains nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onecard.api
from onecard.cli import main
from onecard.observe import Event, FinishedEvent, StepEvent
from onecard.spec import (
    CorpusFacts,
    Forecast,
    MaskAudit,
    MemoryForecast,
    ModelPlan,
    OptimizerPlan,
    Plan,
    SchedulePlan,
    TimeForecast,
)

MIB = 2**20
# A plan for a model of two layers that is trained on `text.txt` (fixture `small_text`).
SMALL_PLAN = (
    *("plan", "--dataset", "text.txt", "--tokenizer", "bytes", "--max_seq_length", "256", "--max_steps", "100"),
    *("--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "4", "--intermediate_size", "128"),
    *("--total_batch_size", "8", "--optim", "adamw", "--model_config", "{model_type: llama}"),
)


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
def small_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, with a text and caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONECARD_HOME", str(tmp_path / "home"))
    (tmp_path / "text.txt").write_text("some text to train on\n" * 500, encoding="utf-8")


@pytest.fixture
def plan() -> Plan:
    """The part of a plan that the commands show."""
    settings = {"model_type": "qwen3", "num_hidden_layers": 6, "hidden_size": 256}
    return Plan.model_construct(
        device="cpu",
        precision="fp32",
        torch_compile=False,
        model=ModelPlan.model_construct(settings=settings, num_parameters=5_500_000),
        optimizer=OptimizerPlan.model_construct(name="muon"),
        schedule=SchedulePlan.model_construct(name="wsd", num_steps=40, num_warmup_steps=4),
        corpus=CorpusFacts.model_construct(
            vocab_size=4096,
            num_train_tokens=655_360,
            num_heldout_tokens=20_000,
            train_bytes=2_000_000,
        ),
        max_seq_length=256,
        micro_batch_size=16,
        total_batch_size=32,
        max_hours=None,
        eval_steps=20,
        save_steps=40,
        sample_steps=20,
        sample_prompts=(),
        reasons={
            "micro_batch_size": "half of the batch is fastest on two cores",
            "schedule.num_steps": "of the recipe",
        },
    )


@pytest.fixture
def forecast() -> Forecast:
    """A small run on a large card: 100 MiB of 10 GiB, 40 steps of 0.1 s, two evaluations and one checkpoint."""
    breakdown = {"activations": 60 * MIB, "weights": 39 * MIB, "batch": MIB // 2, "loss": MIB // 2}
    memory = MemoryForecast(
        fits=True,
        limit_bytes=10240 * MIB,
        peak_bytes=100 * MIB,
        peak_low_bytes=97 * MIB,
        peak_high_bytes=104 * MIB,
        allocated_bytes=90 * MIB,
        context_bytes=400 * MIB,
        breakdown=breakdown,
        peak_phase="loss",
        phase_bytes={"loss": 90 * MIB},
        host_peak_bytes=3000 * MIB,
        disk_bytes=50 * MIB,
        note="a remark",
    )
    time = TimeForecast(
        step_s=0.1,
        step_low_s=0.05,
        step_high_s=0.2,
        tokens_per_s=81920.0,
        total_s=10.0,
        evaluation_s=2.5,
        num_evaluations=2,
        save_s=1.0,
        num_saves=1,
        limited_by="launches",
        share_of_peak=0.1,
        energy_wh=(100.0, 200.0),
    )
    return Forecast(card="RTX 3060 12GB", memory=memory, time=time)


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


FINISHED = FinishedEvent(
    step=40,
    elapsed_s=4.0,
    reason="completed",
    loss=1.8,
    best_loss=1.75,
    best_step=20,
    tokens_seen=40 * 8192,
    num_steps=40,
    tokens_per_s=81920.0,
    seconds=4.0,
)


@dataclass
class FakeApi:
    """Records how it is called and tells the story that a run would."""

    plan_made: Plan
    run_folder: Path
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    finished: FinishedEvent = FINISHED
    raises: BaseException | None = None
    audit: MaskAudit | None = None
    heard: list[Event] = field(default_factory=list)

    def plan(self, recipe: Any, **_: Any) -> Plan:
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
            audit=self.audit,
        )

    def is_chat_model(self, model: Any, *, checkpoint: str) -> bool:
        return str(model).startswith("chat")

    def train(self, recipe: Any, *, output_dir: Any = None, resume: Any = None, **callbacks: Any) -> Path:
        self.calls.append(("train", {"recipe": recipe, "output_dir": output_dir, "resume": resume}))
        return self._tell(**callbacks)

    def resume(self, run: Any, *, accept: Any = (), **callbacks: Any) -> Path:
        self.calls.append(("resume", {"run": run} | ({"accept": accept} if accept else {})))
        return self._tell(**callbacks)

    def generate(self, model: Any, prompts: list[str], **settings: Any) -> list[str]:
        self.calls.append(("generate", {"model": model, "prompts": prompts} | settings))
        return [f"{prompt[::-1]}!" for prompt in prompts]

    def _tell(self, *, on_event: Any, on_plan: Any, on_progress: Any) -> Path:
        on_progress("tokenizing", 1, 2)
        on_plan(self.plan_made, self.run_folder)
        for event in [*steps(1, 40), *self.heard]:
            on_event(event)
        if self.raises is not None:
            raise self.raises
        on_event(self.finished)
        return self.run_folder


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, plan: Plan, tmp_path: Path) -> FakeApi:
    fake = FakeApi(plan, tmp_path / "runs" / "demo-1")
    (fake.run_folder / "tensorboard").mkdir(parents=True)
    (fake.run_folder / "recipe.yaml").write_text("dataset: a.txt\nlogging_steps: 20\n", encoding="utf-8")
    for name in ("plan", "prepare", "train", "resume", "generate", "is_chat_model"):
        monkeypatch.setattr(onecard.api, name, getattr(fake, name))
    monkeypatch.chdir(tmp_path)
    return fake
