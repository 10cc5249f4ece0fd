import sys
from pathlib import Path

import pytest

from onecard.errors import InputError
from onecard.observe import make_sinks


def test_asking_for_wandb_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install wandb.*report_to: \[tensorboard\]"):
        make_sinks(["wandb"], tmp_path)


def test_nobody_listens_where_nothing_is_asked_for(tmp_path: Path) -> None:
    assert make_sinks([], tmp_path) == []


def test_an_offline_run_is_recorded_and_resumed_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_event, evaluated, sampled, finished
) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, last in ((1, 3), (3, 4)):
        (sink,) = make_sinks(["wandb"], tmp_path, config={"learning_rate": 3e-3})
        for step in range(first, last + 1):
            sink.receive(step_event(step))
        for event in (evaluated, sampled, finished):
            sink.receive(event)
        sink.close()
    run_id = (tmp_path / "wandb_id.txt").read_text(encoding="utf-8")
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert [file for file in files if file.stat().st_size > 0]
