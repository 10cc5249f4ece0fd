"""Whole runs of a tiny model through the functions people call."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from eight_chats import write_chats
from sick_runs import Place
from tiny_models import make_base

import onecard
from onecard.observe.events import CLOCK_FIELDS, Event, depends_on_clock
from onecard.observe.lines import parse_event
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


FINE_TUNING: dict[str, Any] = {
    "max_seq_length": 48,
    "max_steps": 6,
    "total_batch_size": 8,
    "per_device_train_batch_size": 3,
    "eval_fraction": 0.0,
    "save_steps": 0,
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

    @property
    def last(self) -> Path:
        return self.root / "checkpoints" / self.checkpoints[-1]

    def last_bytes(self, name: str) -> bytes:
        return (self.last / name).read_bytes()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.record if event["event"] == kind]

    @property
    def findings(self) -> list[dict[str, Any]]:
        """All findings, also those that rest on clocks and sensors."""
        lines = (self.root / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "finding"]

    @property
    def record(self) -> list[dict[str, Any]]:
        """Events without what a clock decides."""
        lines = (self.root / "events.jsonl").read_text(encoding="utf-8").splitlines()
        repeated = [json.loads(line) for line in lines if not depends_on_clock(parse_event(line))]
        return [{key: value for key, value in event.items() if key not in CLOCK_FIELDS} for event in repeated]

    @property
    def kinds(self) -> list[tuple[str, int]]:
        return [(event["event"], event["step"]) for event in self.record]

    def assert_equals(self, other: "Outcome") -> None:
        assert self.record == other.record
        names, others = ({path.name for path in one.last.glob("*.safetensors")} for one in (self, other))
        assert names == others > {"optimizer.safetensors", "loss_scale.safetensors"}
        for name in names:
            assert self.last_bytes(name) == other.last_bytes(name), name


@dataclass(frozen=True)
class Runner:
    """Starts and continues runs of one recipe under one folder."""

    folder: Path
    values: dict[str, Any]

    @property
    def text(self) -> Path:
        return Path(self.values["dataset"][0]["path"])

    def recipe(self, **changes: Any) -> Recipe:
        values = self.values | changes
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
    sources = [{"path": str(corpus_text), "weight": 2.0}, {"path": str(poems), "weight": 1.0}]
    return Runner(tmp_path / "runs", {"dataset": sources} | EVERYTHING)


@pytest.fixture
def stop_at() -> Callable[[int], Callable[[Event], None]]:
    """Presses Ctrl+C when a step is reported."""

    def make(step: int) -> Callable[[Event], None]:
        def press(event: Event) -> None:
            if event.event == "step" and event.step == step:
                signal.raise_signal(signal.SIGINT)

        return press

    return make


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models with random weights; the head is drawn large enough for sure answers of adapters."""
    root = tmp_path_factory.mktemp("bases")

    def find(family: str) -> Path:
        return make_base(family, root)

    return find


@pytest.fixture
def tuner(
    bases: Callable[[str], Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Runner]:
    """Runs on eight chats from a tiny model: `tuner("llama", method="lora")`."""
    monkeypatch.setenv("ONECARD_CACHE", str(cache))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    monkeypatch.chdir(tmp_path)

    def make(family: str, **settings: Any) -> Runner:
        if settings.get("method") == "qlora":
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        given = {
            "model_name_or_path": str(bases(family)),
            "dataset": [{"path": str(write_chats(tmp_path / "chats.jsonl"))}],
        }
        return Runner(tmp_path / "runs", given | FINE_TUNING | settings)

    return make


@pytest.fixture
def place(tmp_path: Path, cache: Path, bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("ONECARD_CACHE", str(cache))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, bases)
