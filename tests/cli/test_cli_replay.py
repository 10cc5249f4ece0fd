"""How the samples of a step are shown."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

import onecard.api
from onecard.observe import StepEvent
from onecard.run.replay import ReplayedSample, ReplayedStep

RECORDED = StepEvent(
    step=7,
    elapsed_s=1.0,
    loss=math.nan,
    learning_rate=1e-3,
    grad_norm=math.inf,
    num_target_tokens=9,
    tokens_seen=90,
    is_finite=False,
    step_s=0.1,
    tokens_per_s=90.0,
    wait_s=0.0,
)
TEXT = ReplayedSample("a.txt", "tokens 16 to 32", (("The lazy dog\x1b[31m", True),), 16, 2.5)
CHAT = ReplayedSample("b.jsonl", "conversation 3 to train on", (("User: Hi\n", False), ("Hello", True)), 5, math.nan)
STEP = ReplayedStep(7, 48, RECORDED, (TEXT, CHAT), "step-000004")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def replay(run: str, step: int, *, with_loss: bool, on_progress: Any) -> ReplayedStep:
        calls.append((run, step, with_loss))
        samples = STEP.samples if with_loss else tuple(replace(sample, loss=None) for sample in STEP.samples)
        return replace(STEP, samples=samples, weights=STEP.weights if with_loss else None)

    monkeypatch.setattr(onecard.api, "replay", replay)
    return calls


def test_texts_are_shown_with_their_places(run, asked: list[Any]) -> None:
    lines = run("replay", "runs/a", "--step", "7", "--loss").stdout.splitlines()
    assert asked == [("runs/a", 7, True)]
    assert lines == [
        "step 7  loss nan, gradient norm inf, refused; samples 48 to 49 of the run",
        "losses by the weights of step-000004, without dropout",
        "",
        "sample 1  a.txt, tokens 16 to 32: 16 targets, loss 2.5000",
        "The lazy dog\ufffd[31m",
        "",
        "sample 2  b.jsonl, conversation 3 to train on: 5 targets, loss nan",
        "User: Hi",
        "«Hello»",
    ]


def test_without_losses_none_are_shown(run, asked: list[Any]) -> None:
    assert "loss 2" not in run("replay", "runs/a", "--step", "7").stdout
    assert asked == [("runs/a", 7, False)]


def test_json_is_strict(run, asked: list[Any]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(run("replay", "a", "--step", "7", "--loss", "--json").stdout, parse_constant=refuse)
    assert document["recorded"]["loss"] is None
    assert [sample["loss"] for sample in document["samples"]] == [2.5, None]


def test_a_step_must_be_named(run) -> None:
    done = run("replay", "runs/a")
    assert done.code == 2
    assert "--step" in done.stderr
