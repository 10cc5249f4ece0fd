"""A run says what software it was made with, and so does a resume that finds another."""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import onecard
from onecard.report.record import VERSIONS, read_versions
from onecard.run import stepping, versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from run.conftest import Runner


def steps(root: Path) -> list[tuple[int, str]]:
    return [(line.step, line.versions["torch"]) for line in read_versions(root)]


def test_a_run_records_its_versions_and_a_resume_what_has_changed(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    started = runner.start("run", save_steps=3, eval_steps=3, max_steps=6)
    (line,) = read_versions(started.root)
    assert line.step == 0
    assert {"python", "platform", "onecard", "torch", "transformers"} <= line.versions.keys()

    onecard.resume(started.root / "checkpoints" / "step-000003")
    assert [line.step for line in read_versions(started.root)] == [0]

    other = line.versions | {"torch": "9.9"}
    monkeypatch.setattr(versions, "find_versions", lambda: other)
    onecard.resume(started.root / "checkpoints" / "step-000003")
    assert steps(started.root) == [(0, line.versions["torch"]), (3, "9.9")]


def test_what_belongs_to_steps_that_are_cut_off_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, number in [(0, "1"), (20, "2"), (40, "3"), (30, "3"), (30, "2"), (10, "1")]:
        monkeypatch.setattr(versions, "find_versions", lambda number=number: {"torch": number})
        versions.record_versions(tmp_path, step)
        if (step, number) == (30, "3"):
            assert steps(tmp_path) == [(0, "1"), (20, "2"), (30, "3")]
        if (step, number) == (30, "2"):
            assert steps(tmp_path) == [(0, "1"), (20, "2")]
    assert steps(tmp_path) == [(0, "1")]
    versions.record_versions(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [VERSIONS]


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    text = '{"step": 0, "versions": {"torch": "1"}}\n{"step": "x", "versions": {}}\n[]\n{"step": 2, "versions": 3}\n{'
    (tmp_path / VERSIONS).write_text(text, encoding="utf-8")
    assert steps(tmp_path) == [(0, "1")]


def test_a_clone_says_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "onecard" / "run" / "versions.py"
    monkeypatch.setattr(versions, "__file__", str(package))
    package.parent.mkdir(parents=True)
    package.write_text("", encoding="utf-8")
    versions.onecard_version.cache_clear()
    try:
        plain = versions.onecard_version()
        assert "+g" not in plain
        versions.onecard_version.cache_clear()
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
            subprocess.run([*git, *command], check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
        assert versions.onecard_version() == f"{plain}+g{commit[:9]}"
    finally:
        versions.onecard_version.cache_clear()


def test_steps_made_anew_after_going_back_are_those_of_the_later_versions(
    runner: "Runner", stop_at: "Callable[[int], Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 24, "eval_steps": 0, "sample_steps": 0, "save_steps": 6, "on_nonfinite": "lower_rate"}
    started = runner.start("run", on_event=stop_at(8), save_total_limit=9, **settings)
    (line,) = read_versions(started.root)
    train_step = stepping.train_step

    def train(state: Any, *args: Any, **keywords: Any) -> Any:
        # The second time leads to the checkpoint before that one, which another process wrote.
        if state.progress.step >= 9 and state.progress.rate_factor > 0.3:
            state.loss_scale.value.fill_(float("inf"))
        stats = train_step(state, *args, **keywords)
        state.loss_scale.value.fill_(1.0)
        return stats

    monkeypatch.setattr(stepping, "train_step", train)
    other = line.versions | {"torch": "9.9"}
    monkeypatch.setattr(versions, "find_versions", lambda: other)
    (recovered,) = runner.resume("run").events("recovered")
    assert recovered["step"] == 6
    assert steps(started.root) == [(0, line.versions["torch"]), (6, "9.9")]
