"""Runs side by side: what can be compared, which is best, and whether that is more than chance."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onecard
from onecard.errors import InputError

ITEMS = 100


def facts(tiny_plan, **changes: Any) -> Any:
    return tiny_plan().corpus.model_copy(update=changes)


def score(root: Path, losses: list[float], *, step: int = 20, data: str = "x", items: bool = True) -> None:
    """Writes what `onecard evaluate` writes: a score and, item by item, what it is made of."""
    protocol = {"weights": root.name, "task": "held-out loss", "data": data, "limit": None, "torch": root.name}
    value = sum(losses) / len(losses)
    row = {"name": "loss", "value": value, "standard_error": 0.1, "n": len(losses), "protocol": protocol}
    name = f"step-{step:06d}"
    with (root / "scores.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": "now", "checkpoint": name, "step": step} | row) + "\n")
    if items:
        (root / "items").mkdir(exist_ok=True)
        content = {"scores": [row], "sums": losses, "counts": [1] * len(losses)}
        (root / "items" / f"loss-00000000-{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_best_is_told_from_the_others_by_more_than_chance_or_not(write_run) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [3.0, 1.5]), write_run("c", [1.51, 1.8])]
    found = onecard.compare(roots)
    assert (found.measure, found.best) == ("loss", "b")
    assert [run.best.step for run in found.runs] == [20, 20, 10]
    first, second = found.comparisons
    assert (first.best, first.other, first.gain) == ("b", "a", pytest.approx(0.5))
    assert first.corrected_p_value < 0.001 < 0.05 < second.corrected_p_value
    assert first.num_comparisons == 15  # of six evaluations


def test_speed_is_the_median_and_tokens_are_those_seen(write_run) -> None:
    run = onecard.compare([write_run("a", [3.0, 2.0]), write_run("b", [3.0])]).runs[0]
    assert (run.tokens_per_s, run.tokens_seen, run.elapsed_s, run.state) == (2000.0, 2560, 10.0, "completed")


def test_another_tokenizer_leaves_bits_per_byte(write_run, tiny_plan) -> None:
    other = facts(tiny_plan, vocab_size=50, num_heldout_tokens=200, fingerprint="other")
    found = onecard.compare([write_run("a", [3.0, 2.0]), write_run("b", [2.5, 1.0], corpus=other)])
    assert (found.measure, found.best, found.curves.of) == ("bits_per_byte", "b", "held-out bits per byte")
    assert "bits per byte are compared" in found.notes[0]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"heldout_bytes": 99, "fingerprint": "other"}, "different text"),
        ({"eval_batches": 3}, {"eval_batches": 4}, "different parts"),
        ({"eval_batches": 3}, {"vocab_size": 50, "eval_batches": 3}, "different parts"),
    ],
)
def test_losses_that_cannot_be_compared_are_not(write_run, tiny_plan, first, second, reason: str) -> None:
    def write(name: str, changes: dict[str, Any]) -> Path:
        settings = dict(changes)
        batches = settings.pop("eval_batches", None)
        return write_run(name, [3.0, 2.0], corpus=facts(tiny_plan, **settings), eval_batches=batches)

    found = onecard.compare([write("a", first), write("b", second)])
    assert (found.measure, found.best, found.comparisons) == (None, None, ())
    assert reason in found.notes[0]


def test_runs_that_are_alike_are_named_where_others_are_not(write_run, tiny_plan) -> None:
    other = facts(tiny_plan, heldout_bytes=99, fingerprint="other")
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [3.0, 2.0], corpus=other), write_run("c", [3.0, 2.0])]
    assert onecard.compare(roots).notes[0].endswith("; a, c can be, by themselves")


def test_items_on_the_disk_are_compared_pair_by_pair(write_run) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [3.0, 2.0])]
    hard = [index / 10 for index in range(ITEMS)]
    score(roots[0], [loss + 0.01 + index % 2 / 100 for index, loss in enumerate(hard)])
    score(roots[1], hard)
    found = onecard.compare(roots)
    (entry,) = found.comparisons  # which stands for the unpaired one, too
    assert (entry.best, entry.other, entry.test, entry.n) == ("b", "a", "t-test", ITEMS)
    # The two means have standard errors of 0.3.
    assert entry.gain == pytest.approx(0.015)
    assert entry.corrected_p_value < 0.001
    assert found.scores[0].best == 1


@pytest.mark.parametrize("change", [{"data": "y"}, {"items": False}])
def test_other_items_are_not_compared_as_pairs(write_run, change: dict[str, Any]) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [3.0, 2.0])]
    score(roots[0], [1.0, 2.0])
    score(roots[1], [2.0, 3.0], **change)
    found = onecard.compare(roots)
    assert [entry.test for entry in found.comparisons] == ["unpaired z-test"]
    assert [row.label for row in found.scores] == (
        ["loss"] if "items" in change else ["loss (data x)", "loss (data y)"]
    )


def test_the_score_of_the_best_checkpoint_counts_not_the_newest(write_run) -> None:
    roots = [write_run("a", [1.0, 2.0]), write_run("b", [3.0, 2.0])]
    score(roots[0], [1.0], step=10)
    score(roots[0], [9.0], step=20)
    (row,) = onecard.compare(roots).scores
    assert (row.cells[0].step, row.cells[0].value, row.cells[1]) == (10, 1.0, None)
    (roots[0] / "best.json").write_text('{"step": 20, "tasks": {}}', encoding="utf-8")
    assert onecard.compare(roots).scores[0].cells[0].step == 20


def test_runs_without_evaluations_and_without_events(write_run) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", []), write_run("c", [float("nan")])]
    found = onecard.compare(roots)
    assert [run.state for run in found.runs] == ["completed", "not begun", "in training"]
    assert [run.best is None for run in found.runs] == [False, True, True]
    assert (found.best, found.comparisons) == (None, ())
    assert any("no curve (training loss) of b" in note for note in found.notes)


def test_what_is_to_be_known_is_said(write_run) -> None:
    root = write_run("a", [3.0])
    with (root / "events.jsonl").open("ab") as file:
        file.write(b"damaged\n")
    (root / "recipe.yaml").write_text("{", encoding="utf-8")
    notes = "\n".join(onecard.compare([root, write_run("b", [3.0, 2.0])]).notes)
    for text in ("1 line of events.jsonl cannot be read", "recipe.yaml cannot be read", "has not ended"):
        assert f"a: {text}" in notes
    assert "b:" not in notes


def test_the_same_run_twice_is_one_run(write_run) -> None:
    root = write_run("a", [3.0])
    with pytest.raises(InputError, match=r"two different run folders or more, but there is .*a alone"):
        onecard.compare([root, root])
    assert [run.name for run in onecard.compare([root, root, write_run("b", [3.0])]).runs] == ["a", "b"]


def test_names_tell_runs_apart(write_run) -> None:
    found = onecard.compare([write_run("x/a", [3.0]), write_run("y/a", [3.0])])
    assert [Path(run.name).as_posix() for run in found.runs] == ["x/a", "y/a"]


def test_an_unknown_axis_and_curve_are_named_together(write_run) -> None:
    with pytest.raises(InputError, match=r"over is 'epochs'.*\ncurve is 'test'"):
        onecard.compare([write_run("a", [3.0])], over="epochs", curve="test")


def test_torch_is_not_imported(write_run) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [3.0, 1.5])]
    for root in roots:
        score(root, [float(index) for index in range(ITEMS)])
    code = (
        "import sys; from onecard.cli import main\ntry: main(sys.argv[1:])\nfinally: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "compare", *map(str, roots)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
