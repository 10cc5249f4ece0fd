"""Real runs with a disease, each found by its name; and healthy ones of many kinds, in which nothing is found."""

import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from eight_chats import write_chats

from onecard.observe.events import DeviceEvent, Event, FindingEvent

if TYPE_CHECKING:
    from run.conftest import Runner

# What a run of a minute would have at its usual intervals, in one of seconds.
QUIET: dict[str, Any] = {"sample_steps": 0, "save_steps": 0, "eval_steps": 20, "save_total_limit": None}
QUIET |= {"optim": "adamw", "learning_rate": 3e-3, "dropout": 0.0, "max_steps": 80}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors of time speak after no time, and sensors are read at each step."""
    monkeypatch.setattr("onecard.observe.detectors.history.LEAST_ELAPSED_S", 0.0)
    monkeypatch.setattr("onecard.run.observation._READING_INTERVAL_S", 0.0)


class Findings:
    """Hears a run and keeps what it found."""

    def __init__(self) -> None:
        self.by_id: dict[str, FindingEvent] = {}
        self.readings: list[DeviceEvent] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, FindingEvent):
            self.by_id[event.id] = event
        elif isinstance(event, DeviceEvent):
            self.readings.append(event)


def found_in(runner: "Runner", **changes: Any) -> dict[str, FindingEvent]:
    heard = Findings()
    runner.start("run", on_event=heard, **QUIET | changes)
    return heard.by_id


def test_a_rate_far_too_high_diverges_and_is_stopped(runner: "Runner") -> None:
    found = found_in(runner, learning_rate=5.0, max_grad_norm=None)
    assert list(found) == ["divergence"]
    outcome = runner.outcome("run")
    finding, *_, finished = outcome.record[-3:]
    assert (finished["event"], finished["reason"]) == ("finished", "diverged")
    assert finished["step"] < 100
    assert "finding" in [event["event"] for event in outcome.record]
    assert finding["step"] <= finished["step"]


def test_a_rate_far_too_low_is_named(runner: "Runner") -> None:
    assert list(found_in(runner, learning_rate=1e-9)) == ["rate-too-low"]


def test_little_text_read_often_is_overfitted_and_the_best_checkpoint_named(runner: "Runner", tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(" ".join(_words(60)), encoding="utf-8")
    (tmp_path / "heldout.txt").write_text(" ".join(_words(200, seed=9)), encoding="utf-8")
    found = found_in(
        runner,
        dataset=[{"path": str(tmp_path / "few.txt")}],
        eval_dataset=[{"path": str(tmp_path / "heldout.txt")}],
        eval_batches=None,
        learning_rate=1e-2,
        max_steps=120,
    )
    assert list(found) == ["overfitting"]
    outcome = runner.outcome("run")
    best = min(outcome.events("evaluated"), key=lambda event: event["loss"])["step"]
    assert f"best checkpoint: step-{best:06d}" in found["overfitting"].evidence
    assert f"step-{best:06d}" in outcome.checkpoints


def _words(number: int, seed: int = 3) -> list[str]:
    """Words of random letters: what is known of some says nothing of the others."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(number)]


def test_a_slow_reader_starves_the_run(runner: "Runner", impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.data.stream.BatchStream._build_step", _slowed(0.05))
    found = found_in(runner, dataloader_num_workers=0, max_steps=40)
    assert "starved-by-data" in found
    assert "dataloader_num_workers: 2 instead of 0" in found["starved-by-data"].remedy


def _slowed(seconds: float) -> Callable[..., Any]:
    from onecard.data.stream import BatchStream

    build = BatchStream._build_step

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return build(self, *args)

    return slow


def test_saving_at_every_step_is_too_often(runner: "Runner", impatient: None) -> None:
    found = found_in(runner, save_steps=1, save_total_limit=2, max_steps=40, eval_steps=0)
    assert "saving-too-often" in found
    assert " instead of 1 (" in found["saving-too-often"].remedy


def test_evaluating_at_every_step_is_too_often(runner: "Runner", impatient: None) -> None:
    found = found_in(runner, eval_steps=1, max_steps=40, eval_batches=None, eval_fraction=0.5, learning_rate=1e-9)
    assert "evaluating-too-often" in found


def test_a_run_on_the_cpu_beside_a_card_says_so(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.observe.detectors import Surroundings

    here = Surroundings(gpus=("NVIDIA GeForce RTX 3060",))
    monkeypatch.setattr("onecard.run.observation._look_around", lambda plan, recipe: here)
    assert list(found_in(runner, max_steps=12)) == ["gpu-unused"]


def test_memory_that_a_callback_keeps_is_seen_to_grow(
    runner: "Runner", impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.observe.detectors.memory._LEAST_BYTES", 32 << 20)
    heard, kept = Findings(), []

    def keep(event: Event) -> None:
        heard(event)
        if event.event == "step":
            kept.append(b"x" * (8 << 20))

    runner.start("run", on_event=keep, **QUIET | {"max_steps": 60})
    assert "host-memory-grows" in heard.by_id
    assert len(heard.readings) >= 60 - 1
    assert all(reading.own_bytes for reading in heard.readings)


def test_steps_slower_than_planned_are_named(
    runner: "Runner", impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecard.run import stepping

    train_step = stepping.train_step

    def slow(*args: Any, **keywords: Any) -> Any:
        time.sleep(0.05)
        return train_step(*args, **keywords)

    monkeypatch.setattr(stepping, "train_step", slow)
    found = found_in(runner, max_steps=80, eval_steps=0)
    # Other programs on this machine would be the better explanation.
    assert {"slower-than-planned", "cpu-shared"} & set(found)


def test_weights_that_have_no_part_in_the_result_stop_the_run(
    tuner: "Callable[..., Runner]", monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecard.training.optimizer import Optimizer

    norm = Optimizer.gradient_norm
    monkeypatch.setattr(Optimizer, "gradient_norm", lambda self: 0 * norm(self))
    heard = Findings()
    runner = tuner("llama", method="lora", max_steps=40)
    runner.start("run", on_event=heard)
    assert heard.by_id["nothing-trains"].stops_run
    assert runner.outcome("run").events("finished")[-1]["reason"] == "diverged"


def test_a_findings_place_is_the_same_after_a_resume(runner: "Runner", cache: Path) -> None:
    sick = QUIET | {"learning_rate": 1e-9, "save_steps": 15}
    whole = runner.start("whole", **sick)
    assert [event["id"] for event in whole.events("finding")] == ["rate-too-low"]
    runner.kill("killed", after_events=70, **sick)
    runner.resume("killed").assert_equals(whole)


TEXTS: dict[str, dict[str, Any]] = {
    "muon": {"optim": "muon"},
    "adamw": {},
    "8-bit": {"optim": "adamw_8bit"},
    "bf16": {"precision": "bf16"},
    "gpt2": {"model_config": {"model_type": "gpt2"}, "num_key_value_heads": None},
    "llama": {"model_config": {"model_type": "llama", "intermediate_size": 48}},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 20},
    "constant": {"lr_scheduler_type": "constant"},
    "high rate": {"learning_rate": 2e-2},
    "low rate": {"learning_rate": 5e-4},
    "batch of one": {"total_batch_size": 1, "per_device_train_batch_size": 1},
    "no clipping": {"max_grad_norm": None},
    "early stopping": {"early_stopping_patience": 3, "eval_steps": 10},
    "tiny text": {"max_steps": 25, "eval_steps": 5},
    "long": {"max_steps": 250, "eval_steps": 50},
    "nothing held out": {"eval_fraction": 0.0, "eval_batches": None, "eval_steps": 0},
    "dropout": {"dropout": 0.2},
}


@pytest.mark.parametrize("kind", TEXTS)
def test_healthy_runs_on_text_have_no_finding(kind: str, runner: "Runner", tmp_path: Path) -> None:
    changes = TEXTS[kind]
    if kind == "tiny text":
        (tmp_path / "tiny.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 60, encoding="utf-8")
        changes = changes | {"dataset": [{"path": str(tmp_path / "tiny.txt")}]}
    assert found_in(runner, **changes) == {}


def many_chats() -> list[Any]:
    """Chats that are read twice in sixty steps: eight of them would be learned by heart."""
    return [
        [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
        for a in range(16)
        for b in range(16)
    ]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_healthy_runs_on_chats_have_no_finding(family: str, method: str, tuner: "Callable[..., Runner]") -> None:
    heard = Findings()
    rate = {"full": 1e-3, "lora": 5e-3}[method]
    runner = tuner(family, method=method, learning_rate=rate, max_steps=60)
    write_chats(runner.text, many_chats())
    runner.start("run", on_event=heard)
    assert heard.by_id == {}


def test_chats_learned_by_heart_are_said_to_be(tuner: "Callable[..., Runner]") -> None:
    heard = Findings()
    tuner("llama", learning_rate=1e-3, max_steps=60).start("run", on_event=heard)
    assert list(heard.by_id) == ["data-repeated"]


def test_a_healthy_run_that_is_resumed_has_no_finding(runner: "Runner") -> None:
    runner.kill("run", after_events=50, **QUIET | {"save_steps": 20})
    heard = Findings()
    outcome = runner.resume("run", on_event=heard)
    assert heard.by_id == {}
    assert not outcome.events("finding")


def test_healthy_runs_on_chats_of_several_rounds_have_no_finding(tuner: "Callable[..., Runner]") -> None:
    heard = Findings()
    runner = tuner("qwen3", max_seq_length=64, max_steps=60, learning_rate=1e-3)
    write_chats(runner.text, [[*first, *second] for first, second in pairwise(many_chats())])
    runner.start("run", on_event=heard)
    assert heard.by_id == {}
