"""Whole runs of a tiny model through the functions people call."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import onecard
from onecard.observe.events import CLOCK_FIELDS, Event
from onecard.spec import Recipe

EVERYTHING: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_seq_length": 16,
    "model_config": {"model_type": "qwen3", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dropout": 0.1,
    "per_device_train_batch_size": 3,
    "total_batch_size": 8,
    "max_steps": 12,
    "eval_steps": 4,
    "eval_batches": 2,
    "sample_steps": 5,
    "sample_prompts": ["the ", "lazy"],
    "sample_max_new_tokens": 4,
    "save_steps": 3,
    "save_total_limit": 2,
    "dataloader_num_workers": 1,
    "precision": "fp32",
    "torch_compile": False,
    "device": "cpu",
    "report_to": "none",
}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test may catch it."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    root: Path

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.root / "checkpoints").glob("step-*"))

    def last_bytes(self, name: str) -> bytes:
        return (self.root / "checkpoints" / self.checkpoints[-1] / name).read_bytes()

    @property
    def record(self) -> list[dict[str, Any]]:
        """Events without what a clock decides."""
        lines = (self.root / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCK_FIELDS} for line in lines]

    @property
    def kinds(self) -> list[tuple[str, int]]:
        return [(event["event"], event["step"]) for event in self.record]

    def assert_equals(self, other: "Outcome") -> None:
        assert self.record == other.record
        for name in ("model.safetensors", "optimizer.safetensors", "loss_scale.safetensors"):
            assert self.last_bytes(name) == other.last_bytes(name), name


@dataclass(frozen=True)
class Runner:
    """Starts and continues runs of one recipe under one folder."""

    text: Path
    folder: Path

    def recipe(self, **changes: Any) -> Recipe:
        sources = [{"path": str(self.text), "weight": 2.0}, {"path": str(self.text.with_name("poems")), "weight": 1.0}]
        values = {"dataset": sources} | EVERYTHING | changes
        return onecard.load_recipe({key: value for key, value in values.items() if value is not None})

    def start(self, name: str, *, on_event: Callable[[Event], None] | None = None, **changes: Any) -> Outcome:
        onecard.train(self.recipe(**changes), output_dir=self.folder / name, on_event=on_event)
        return self.outcome(name)

    def resume(self, name: str, *, on_event: Callable[[Event], None] | None = None) -> Outcome:
        onecard.resume(self.folder / name, on_event=on_event)
        return self.outcome(name)

    def outcome(self, name: str) -> Outcome:
        return Outcome(self.folder / name)

    def kill(self, name: str, *, after_events: int, **changes: Any) -> None:
        """Starts or continues a run that dies after so many events."""
        live = self.resume if (self.folder / name).exists() else partial(self.start, **changes)
        with pytest.raises(Killed):
            live(name, on_event=dies_after(after_events))


def dies_after(num_events: int) -> Callable[[Event], None]:
    remaining = [num_events]

    def count(_: Event) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise Killed

    return count


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runner(tmp_path: Path, corpus_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("ONECARD_CACHE", str(cache))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    monkeypatch.chdir(tmp_path)
    poems = tmp_path / "poems"
    poems.mkdir()
    for index, line in enumerate(corpus_text.read_text(encoding="utf-8").splitlines()[:80]):
        (poems / f"{index:02d}.txt").write_text(line * (1 + index % 3), encoding="utf-8", newline="\n")
    return Runner(corpus_text, tmp_path / "runs")


@pytest.fixture
def stop_at() -> Callable[[int], Callable[[Event], None]]:
    """Presses Ctrl+C when a step is reported."""

    def make(step: int) -> Callable[[Event], None]:
        def press(event: Event) -> None:
            if event.event == "step" and event.step == step:
                signal.raise_signal(signal.SIGINT)

        return press

    return make
