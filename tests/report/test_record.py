"""A run folder is read as it lies there, also while it is written to, and nothing in it is touched."""

from pathlib import Path

import pytest

from onecard.errors import InputError
from onecard.report.record import read_runs


def test_a_finished_run_is_read_whole(write_run) -> None:
    (run,) = read_runs([write_run("a", [3.0, 2.5])])
    assert (len(run.steps), [event.loss for event in run.evaluated]) == (20, [3.0, 2.5])
    assert (run.finished.reason, run.num_damaged) == ("completed", 0)
    assert (run.plan.optimizer.name, run.recipe.optim) == ("muon", "muon")


def test_damaged_lines_are_counted_and_the_rest_is_read(write_run) -> None:
    root = write_run("a", [3.0, 2.5])
    lines = (root / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[7] = b'{"event": "step", "st\n', b"\xff\xfe\n"
    (root / "events.jsonl").write_bytes(b"".join(lines))
    (run,) = read_runs([root])
    assert (run.num_damaged, len(run.steps)) == (2, 18)


def test_a_line_that_is_being_written_is_no_damage(write_run) -> None:
    root = write_run("a", [3.0])
    with (root / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "step": 11, "elap')
    before = sorted(path.name for path in root.rglob("*"))
    (run,) = read_runs([root])
    assert (run.num_damaged, run.finished, run.age_s < 3600) == (0, None, True)
    assert sorted(path.name for path in root.rglob("*")) == before


def test_a_run_is_read_once_however_it_is_called(write_run, monkeypatch) -> None:
    root = write_run("a", [3.0])
    monkeypatch.chdir(root.parent)
    found = read_runs([root, "a", "./a/", "a/../a", "*"])
    assert [run.root.name for run in found] == ["a"]


def test_all_that_is_no_run_is_named_together(write_run, tmp_path: Path) -> None:
    root = write_run("a", [3.0])
    (root / "checkpoints" / "step-000010").mkdir(parents=True)
    (root / "checkpoints" / "step-000010" / "plan.json").write_bytes((root / "plan.json").read_bytes())
    damaged = write_run("b", [3.0])
    (damaged / "plan.json").write_text("{", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as refused:
        read_runs([root, tmp_path / "gone", tmp_path / "empty", root.parent, root / "checkpoints", damaged])
    lines = str(refused.value).splitlines()
    assert len(lines) == 5
    expected = (
        "does not exist",
        "has no plan.json",
        "holds 2: give them, as in",
        "is a part of a run",
        "leave this run",
    )
    assert [text in line for text, line in zip(expected, lines, strict=True)] == [True] * 5
    with pytest.raises(InputError, match="no run folder of such a name"):
        read_runs([root.parent / "z*"])


def test_a_checkpoint_is_a_part_of_its_run(write_run) -> None:
    root = write_run("a", [3.0])
    folder = root / "checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_bytes((root / "plan.json").read_bytes())
    with pytest.raises(InputError, match="is a part of a run: give the run itself"):
        read_runs([folder])


def test_a_recipe_that_cannot_be_read_is_done_without(write_run) -> None:
    root = write_run("a", [3.0])
    (root / "recipe.yaml").write_text("no_such_key: 1\n", encoding="utf-8")
    assert read_runs([root])[0].recipe is None
