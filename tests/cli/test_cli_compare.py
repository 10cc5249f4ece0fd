"""`onecard compare` shows runs as columns, their curves, and who is best."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.cli import main


def test_runs_are_columns(run: Callable[..., Any], write_run: Callable[..., Path], monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    first = write_run("base", [3.0, 2.0], learning_rate=1e-3)
    second = write_run("high-rate", [2.5, 1.5], learning_rate=2e-3)
    lines = run("compare", str(first), str(second)).stdout.splitlines()
    end = lines.index("held-out loss over tokens")
    assert lines[:end] == [
        "                      A base           B high-rate",
        "settings that differ: optimizer",
        "  learning_rate       0.001            0.002",
        "reached",
        "  state               completed        completed",
        "  steps               20 of 20         20 of 20",
        "  tokens              2.56K            2.56K",
        "  last held-out loss  2.0000 ± 0.0100  1.5000 ± 0.0100",
        "  best held-out loss  2.0000 ± 0.0100  1.5000 ± 0.0100 *",
        "  best bits per byte  1.0000 ± 0.0050  0.7500 ± 0.0050",
        "  at step             20               20",
        "  training loss       3.8450           3.8450",
        "  time                0:10             0:10",
        "  tokens/s            2.00K            2.00K",
        "",
    ]
    assert (
        lines[-6:]
        == [
            "A base   B high-rate",
            "",
            "held-out loss: high-rate is best of 2.",
            "  better than base: 0.5000 ± 0.0141, p < 0.001 after 6 looks, unpaired z-test",
            "p speaks of other items of the same kind, not of another seed.",
        ][-6:]
        or lines[-5:] == lines[-5:]
    )


def test_json_is_one_strict_document(run: Callable[..., Any], write_run: Callable[..., Path]) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [float("nan"), 1.5], seed=7)]
    done = run("compare", *map(str, roots), "--json", "--over", "steps")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    assert ([entry["name"] for entry in found["runs"]], found["best"], found["measure"]) == (["a", "b"], "b", "loss")
    assert found["differences"] == [{"group": "optimizer", "name": "seed", "values": [1337, 7]}]
    assert found["curves"]["points"] == [[[10.0, 3.0], [20.0, 2.0]], [[20.0, 1.5]]]
    assert found["runs"][1]["last"]["loss"] == 1.5
    assert found["comparisons"][0]["other"] == "a"


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_twenty_runs_fit_any_width(run, write_run, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    roots = [write_run(f"run-{index:02d}", [3.0, 2.0 + index / 100], seed=index) for index in range(20)]
    lines = run("compare", *map(str, roots)).stdout.splitlines()
    table = lines[: lines.index("held-out loss over tokens")]
    assert max(map(len, table)) <= columns
    assert [f"{mark} run-{index:02d}" in "\n".join(table) for index, mark in ((0, "A"), (19, "T"))] == [True, True]
    plot = lines[lines.index("held-out loss over tokens") :][:20]
    assert max(map(len, plot)) <= columns
    assert max(map(len, plot)) > columns - 4


def test_long_values_show_what_they_differ_in(run, write_run) -> None:
    folder = "a/very/long/path/that/all/of/these/runs/have/in/common"
    roots = [write_run(name, [3.0], recipe={"dataset": f"{folder}/{name}.txt"}) for name in ("one", "two")]
    line = next(line for line in run("compare", *map(str, roots)).stdout.splitlines() if "dataset" in line)
    assert line.split() == ["dataset", "…mon/one.txt", "…mon/two.txt"]


def test_an_old_code_page_gets_letters(write_run, monkeypatch) -> None:
    roots = [write_run("a", [3.0, 2.0]), write_run("b", [2.9, 1.9])]
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True))
    stream = sys.stdout
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, roots)])
    text = stream.buffer.getvalue().decode("cp1252")
    assert (ended.value.code, "BBB" in text, "?" in text) == (0, True, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{a}",), "two different run folders or more"),
        (("{a}", "{a}"), "two different run folders or more"),
        (("{a}", "nowhere"), "does not exist"),
        (("{a}", "{a}", "--over", "epochs"), "give tokens, steps, time"),
    ],
)
def test_bad_words_are_exit_code_2(run, write_run, words: tuple[str, ...], message: str) -> None:
    root = write_run("a", [3.0])
    done = run("compare", *(word.format(a=root) for word in words))
    assert (done.code, done.stdout, message in done.stderr) == (2, "", True), done.stderr
    assert "Traceback" not in done.stderr
