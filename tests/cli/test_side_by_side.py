"""Several cards side by side, as they become known, and what stays after Ctrl+C."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import onecard.api
from onecard.errors import DoesNotFitError
from onecard.spec import Alternative, Forecast, Plan

WORDS = ("plan", "--dataset", "text.txt", "--card", "rtx-3060-12gb,rtx-4060-laptop,gtx-1080-ti")
NAMES = {"rtx-3060-12gb": "RTX 3060 12GB", "rtx-4060-laptop": "RTX 4060 Laptop", "gtx-1080-ti": "GTX 1080 Ti"}


class Planner:
    """Stands in for `onecard.api`: the first card is known compiled, the second has to be, the third is not."""

    def __init__(self, made: Plan, forecast: Forecast) -> None:
        self.made, self.forecast = made, forecast
        self.calls: list[tuple[str, bool]] = []
        self.interrupted_at: tuple[str, bool] | None = None
        self.fits = True

    def plan(self, recipe: Any, *, card: str, refine: bool, **_: Any) -> Plan:
        self.calls.append((card, refine))
        if self.interrupted_at == (card, refine):
            raise KeyboardInterrupt
        compiled = card != "gtx-1080-ti"
        known = card == "rtx-3060-12gb"
        memory = self.forecast.memory.model_copy(update={"fits": self.fits})
        states = {"is_refined": refine or known or not compiled, "is_interpolated": known, "memory": memory}
        forecast = self.forecast.model_copy(update={"card": NAMES[card]} | states)
        made = self.made.model_copy(update={"forecast": forecast, "torch_compile": compiled})
        if not self.fits:
            raise DoesNotFitError(f"{card} is too small", made)
        return made

    def alternatives(self, plan: Plan, **_: Any) -> Iterator[Alternative]:
        yield Alternative(settings={}, peak_bytes=1, step_s=1.0, fits=True)


@pytest.fixture
def planner(plan: Plan, forecast: Forecast, monkeypatch: pytest.MonkeyPatch) -> Planner:
    settings = {"device": "cuda:0", "gradient_checkpointing": 0.25, "task": "pretrain", "packing": "off"}
    stand_in = Planner(plan.model_copy(update=settings), forecast)
    monkeypatch.setattr(onecard.api, "plan", stand_in.plan)
    monkeypatch.setattr(onecard.api, "alternatives", stand_in.alternatives)
    return stand_in


def test_rows_say_how_sure_they_are_and_of_what_step(run, planner: Planner) -> None:
    done = run(*WORDS)
    assert done.code == 0, done.stderr
    table, notes = done.stdout.split("\n\n")
    header, *rows = table.splitlines()
    assert header.split() == ["card", "in", "memory", "micro-batches", "speed", "whole", "run", "step"]
    assert [row[: row.index("  ")] + ": " + row[header.index("step") :] for row in rows] == [
        "RTX 3060 12GB: compiled, interpolated",
        "RTX 4060 Laptop: before compiling",
        "GTX 1080 Ti: not compiled",
        "RTX 4060 Laptop: compiled",
    ]
    assert all("100.0 MiB (97.0 MiB to 104.0 MiB) of 10.0 GiB" in row for row in rows)
    assert all("0:10 (0:05 to 0:20)" in row for row in rows)
    assert notes.strip() == "RTX 3060 12GB, RTX 4060 Laptop, GTX 1080 Ti: a remark"


def test_all_cards_come_before_any_is_compiled(run, planner: Planner) -> None:
    run(*WORDS)
    assert planner.calls == [*((card, False) for card in NAMES), ("rtx-4060-laptop", True)]
    planner.calls.clear()
    run(*WORDS, "--no-refine")
    assert planner.calls == [(card, False) for card in NAMES]


def test_ctrl_c_keeps_the_rows_that_are_there(run, planner: Planner) -> None:
    planner.interrupted_at = ("gtx-1080-ti", False)
    done = run(*WORDS)
    assert done.code == 130
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:]] == ["RTX 3060 12GB", "RTX 4060 Laptop"]
    assert "stopped; still open: RTX 4060 Laptop, GTX 1080 Ti. What is known" in done.stderr
    planner.interrupted_at = ("rtx-4060-laptop", True)
    done = run(*WORDS, "--json")
    assert done.code == 130
    assert [card["is_refined"] for card in json.loads(done.stdout)["cards"]] == [True, False, True]


def test_a_document_has_caveats_and_alternatives_of_each_card(run, planner: Planner) -> None:
    cards = json.loads(run(*WORDS, "--json").stdout)["cards"]
    assert [card["note"] for card in cards] == ["a remark"] * 3
    assert [len(card["alternatives"]) for card in cards] == [1, 1, 1]


def test_where_nothing_fits_it_ends_with_3(run, planner: Planner) -> None:
    planner.fits = False
    done = run(*WORDS)
    assert done.code == 3
    assert done.stdout.count("does not fit") == 4
    assert "rtx-3060-12gb is too small" in done.stderr


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_cards_fold_to_the_terminal(run, planner: Planner, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = run(*WORDS).stdout.splitlines()
    assert lines[0] == "RTX 3060 12GB in linux: fits, compiled, interpolated"
    assert max(map(len, lines)) <= columns
