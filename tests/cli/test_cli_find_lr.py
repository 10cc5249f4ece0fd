"""`onecard find-lr`: what it says, writes and refuses."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import onecard
import onecard.api
from onecard.cli.rate_text import curve_lines, proposal_lines, train_command, trial_rows
from onecard.spec import Plan
from onecard.trials.evidence import Evidence
from onecard.trials.ladder import factor_of
from onecard.trials.rates import Budget, RateSearch, list_warnings
from onecard.trials.short_runs import Trial

WORDS = [
    *("find-lr", "--dataset", "text.txt", "--tokenizer", "bytes", "--max_seq_length", "16", "--max_steps", "6"),
    *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "48"),
    *("--total_batch_size", "2", "--optim", "adamw", "--model_config", "{model_type: llama}", "--precision", "fp32"),
    *("--device", "cpu", "--torch_compile", "false"),
]


def trial(rung: int, loss: float | None, seed: int = 1337, num_steps: int = 100) -> Trial:
    stopped = None if loss is not None else "loss above its start after 25 steps"
    return Trial(factor_of(rung), seed, num_steps, (4.0, 3.0), loss, 0.01, 12.0, stopped)


@pytest.fixture
def search(tiny_plan: Callable[..., Plan]) -> RateSearch:
    """The least is 0.3 octaves above the recipe's rate."""
    trials = [trial(rung, 2.0 + 0.08 * (rung / 2 - 0.3) ** 2) for rung in (-4, -2, -1, 0, 1, 2, 4)]
    trials += [trial(6, None), *(trial(rung, loss, 1338) for rung, loss in ((0, 2.037), (1, 2.032), (2, 2.070)))]
    return RateSearch(tiny_plan(learning_rate=1e-3), Budget((100,), 1000, 0.1, 10.0, 110.0, 4096, 4.5), trials, 100.0)


def test_the_answer_has_its_range_its_noise_and_what_it_leaves_open(search: RateSearch) -> None:
    proposal = search.proposal
    assert proposal is not None
    assert proposal.factor == pytest.approx(2**0.3, rel=0.05)
    assert proposal.flat is not None
    assert proposal.flat[0] < proposal.factor < proposal.flat[1]
    text = "\n".join(proposal_lines(search))
    assert "learning_rate 0.0012, muon_learning_rate 0.025" in text
    assert "noise between runs" in text
    assert any("10 times as long" in warning for warning in list_warnings(search))


def test_every_run_is_a_row_and_those_that_were_stopped_say_why(search: RateSearch) -> None:
    rows = trial_rows(search)
    assert len(rows) == 1 + len(search.trials)
    assert [row[0] for row in rows].count("*") == 1
    (stopped,) = (row for row in rows if row[-1])
    assert stopped[1] == "0.008"
    assert "above its start" in stopped[-1]


def test_the_curve_shows_every_whole_run_that_is_near(search: RateSearch) -> None:
    lines = curve_lines(search)
    assert sum(line.count("o") for line in lines[1:]) == 7 - 1  # the steep end is cut
    assert sum(line.count(".") for line in lines[2:-2]) > 10
    assert lines[-2].split() == ["0.00025", "0.004"]


def test_the_command_can_be_typed_and_holds_every_setting_once(search: RateSearch) -> None:
    given = {"dataset": ["my text.txt"], "learning-rate": "1", "muon_learning_rate": "2", "torch_compile": False}
    words = shlex.split(train_command(search, "demo", given).partition(" train ")[2])
    assert words == [
        *("demo", "--dataset", "my text.txt", "--torch_compile", "false"),
        *("--learning_rate", "0.0012", "--muon_learning_rate", "0.025"),
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    (tmp_path / "text.txt").write_text("some text to train on\n" * 500, encoding="utf-8")
    return tmp_path


def test_a_search_leaves_its_evidence_and_overwrites_none(run: Callable[..., Any], place: Path) -> None:
    done = run(*WORDS, "--output-dir", "evidence", "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["budget"]["lengths"] == [6]
    assert document["command"].startswith(("onecard train --dataset", "/")), document["command"]
    assert document == json.loads((place / "evidence" / "result.json").read_text(encoding="utf-8"))
    lines = (place / "evidence" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(document["trials"])
    assert all(len(json.loads(line)["losses"]) <= 6 for line in lines)
    assert not (place / "evidence" / "plan.json").exists()  # which would make it a run
    again = run(*WORDS, "--output-dir", "evidence")
    assert again.code == 2
    assert "not empty" in again.stderr


def test_losses_that_are_not_finite_are_kept_as_null(search: RateSearch, place: Path) -> None:
    recipe = onecard.load_recipe({"dataset": "text.txt", "max_steps": 6, "vocab_size": 300})
    evidence = Evidence.create(place / "evidence", recipe, search.plan)
    evidence.add(replace(trial(0, None), losses=(4.0, math.nan, math.inf)))
    evidence.discard_if_empty()
    (line,) = (place / "evidence" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["losses"] == [4.0, None, None]


def test_too_little_time_leaves_no_folder(run: Callable[..., Any], place: Path) -> None:
    done = run(*WORDS, "--minutes", "1e-7")
    assert done.code == 2
    assert "Give --minutes" in done.stderr
    assert not (place / "find-lr").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name a recipe"),
        (["demo", "--minutes", "-1"], "give a number above 0"),
        (["demo", "--learning_rate", "fast"], "learning_rate"),
        (["demo", "--eval_fraction", "0", "--early_stopping_patience", "2"], "early_stopping_patience"),
    ],
)
def test_bad_input_ends_it_at_once(run: Callable[..., Any], place: Path, words: list[str], told: str) -> None:
    done = run("find-lr", *words)
    assert done.code == 2
    assert told in done.stderr


def test_what_is_known_is_shown_when_it_is_stopped(
    run: Callable[..., Any], place: Path, search: RateSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.was_stopped = True
    (place / "evidence").mkdir()
    monkeypatch.setattr(onecard.api, "find_lr", lambda recipe, **_: (search, place / "evidence"))
    done = run("find-lr", "demo")
    assert done.code == 130
    assert "stopped by hand" in done.stdout
    assert "--learning_rate 0.0012" in done.stdout
