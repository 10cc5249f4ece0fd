"""How `onecard plan` shows alternatives while they become known, and what stays after Ctrl+C."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import onecard.api
from onecard.spec import Alternative, Plan
from onecard.spec.forecast import Forecast, MemoryForecast

WORDS = ("plan", "--dataset", "text.txt", "--card", "rtx-3060-12gb")
GIB = 2**30


def forecast(peak_gib: float, *, is_refined: bool) -> Forecast:
    sizes = dict.fromkeys(
        ("limit_bytes", "peak_low_bytes", "peak_high_bytes", "allocated_bytes", "context_bytes"), 10 * GIB
    )
    memory = MemoryForecast(
        **sizes,
        fits=True,
        peak_bytes=int(peak_gib * GIB),
        breakdown={"weights": int(peak_gib * GIB)},
        peak_phase="loss",
        phase_bytes={},
        host_peak_bytes=0,
        disk_bytes=0,
    )
    return Forecast(card="RTX 3060 12GB", memory=memory, time=None, is_refined=is_refined)


def row(peak_gib: float, *, is_refined: bool, is_interpolated: bool = False, **settings: Any) -> Alternative:
    peak = int(peak_gib * GIB)
    states = {"is_refined": is_refined, "is_interpolated": is_interpolated}
    return Alternative(settings=settings, peak_bytes=peak, step_s=1.0, fits=peak_gib < 10, **states)


class Planner:
    """Stands in for `onecard.api`: three rows before compiling, of which two are compiled; may be interrupted."""

    def __init__(self, made: Plan) -> None:
        self.made = made
        self.interrupted_at: str | None = None
        self.is_changed = False

    def plan(self, recipe: Any, *, on_draft: Callable[[Plan], None], refine: bool, **_: Any) -> Plan:
        draft = self.made.model_copy(update={"forecast": forecast(5, is_refined=False)})
        on_draft(draft)
        if not refine:
            return draft
        self._reach("plan")
        changes = {"micro_batch_size": 2} if self.is_changed else {}
        return draft.model_copy(update={"forecast": forecast(4, is_refined=True)} | changes)

    def alternatives(
        self, plan: Plan, *, refine: bool, on_wait: Callable[..., None], **_: Any
    ) -> Iterator[Alternative]:
        waiting = [row(8, is_refined=False, micro_batch_size=8), row(3, is_refined=False, optimizer="muon")]
        yield row(4, is_refined=True)
        self._reach("rows")
        yield from (*waiting, row(30, is_refined=False, micro_batch_size=64))
        if not refine:
            return
        on_wait(waiting, 80.0)
        yield row(7, is_refined=True, is_interpolated=True, micro_batch_size=8)
        on_wait(waiting[1:], 40.0)
        self._reach("muon")
        yield row(2, is_refined=True, optimizer="muon")

    def _reach(self, place: str) -> None:
        if self.interrupted_at == place:
            raise KeyboardInterrupt


@pytest.fixture
def planner(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Planner:
    settings = {"device": "cuda:0", "corpus": plan.corpus.model_copy(update={"is_estimate": True})}
    stand_in = Planner(plan.model_copy(update=settings))
    monkeypatch.setattr(onecard.api, "plan", stand_in.plan)
    monkeypatch.setattr(onecard.api, "alternatives", stand_in.alternatives)
    # What the plan of the fixtures lacks is not looked at here.
    monkeypatch.setattr("onecard.cli.plan._print_plan", lambda made: print(f"plan {made.forecast.is_refined}"))
    monkeypatch.setattr(
        "onecard.cli.plan.plan_document",
        lambda made, rows: {"is_refined": made.forecast.is_refined, "rows": [one.model_dump() for one in rows]},
    )
    return stand_in


def test_rows_come_before_compiling_and_then_one_by_one(run, planner: Planner) -> None:
    done = run(*WORDS)
    assert done.code == 0, done.stderr
    assert "plan False" in done.stdout
    ladder = done.stdout[done.stdout.index("what else there is") :].splitlines()
    assert [" ".join(line.split()) for line in ladder if line] == [
        "what else there is",
        "as planned 4.0 GiB 1 s a step fits",
        "micro_batch_size 8 8.0 GiB 1 s a step fits, before compiling",
        "optimizer muon 3.0 GiB 1 s a step fits, before compiling",
        "micro_batch_size 64 30.0 GiB 1 s a step does not fit, before compiling",
        "compiled, one by one: 2 rows, about 1:20 in all (Ctrl+C keeps what is here)",
        "micro_batch_size 8 7.0 GiB 1 s a step fits, interpolated",
        "optimizer muon 2.0 GiB 1 s a step fits",
        "not compiled, for it would not make them fit, or cannot be done: micro_batch_size 64",
    ]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_rows_fold_to_the_terminal(run, planner: Planner, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = run(*WORDS)
    assert "before compiling" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert " ".join(done.stdout.split()).count("1 s a step does not fit, before compiling") == 1


def test_no_refine_leaves_all_rows_before_compiling(run, planner: Planner) -> None:
    done = run(*WORDS, "--no-refine")
    assert done.stdout.count("before compiling") == 3
    assert "compiled, one by one" not in done.stdout
    assert done.code == 0


def test_a_plan_that_changed_when_it_was_compiled_is_shown_whole(run, planner: Planner) -> None:
    assert "plan True" not in run(*WORDS).stdout
    planner.is_changed = True
    done = run(*WORDS)
    assert done.stdout.index("compiled, other settings are needed") < done.stdout.index("plan True")


@pytest.mark.parametrize(
    ("place", "kept", "told"),
    [
        ("plan", "plan False", "stopped; the figures above are those before compiling"),
        ("rows", "as planned", "stopped. What is known is remembered"),
        ("muon", "fits, interpolated", "stopped; still before compiling: optimizer muon. What is known"),
    ],
)
def test_ctrl_c_keeps_what_is_there_and_says_what_is_not(
    run, planner: Planner, place: str, kept: str, told: str
) -> None:
    planner.interrupted_at = place
    done = run(*WORDS)
    assert done.code == 130
    assert kept in done.stdout
    assert told in done.stderr


@pytest.mark.parametrize(("place", "peaks"), [("plan", []), ("rows", [4]), ("muon", [4, 7, 3, 30])])
def test_ctrl_c_leaves_a_whole_document(run, planner: Planner, place: str, peaks: list[int]) -> None:
    planner.interrupted_at = place
    done = run(*WORDS, "--json", "--refine-all")
    assert done.code == 130
    document = json.loads(done.stdout)
    assert document["is_refined"] is (place != "plan")
    assert [one["peak_bytes"] // GIB for one in document["rows"]] == peaks


def test_a_document_waits_for_compiled_rows_only_where_it_is_told_to(run, planner: Planner) -> None:
    rows = [json.loads(run(*WORDS, "--json", *more).stdout)["rows"] for more in ([], ["--refine-all"])]
    assert [[one["is_refined"] for one in found] for found in rows] == [
        [True, False, False, False],
        [True, True, True, False],
    ]
    assert [one["is_interpolated"] for one in rows[1]] == [False, True, False, False]
