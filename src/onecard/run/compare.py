"""Several runs side by side, and whether the best is so by more than chance. No torch, so that it answers at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onecard.errors import InputError
from onecard.evaluation.paired import Items, correct
from onecard.evaluation.ranking import rank
from onecard.report.curves import AXES, Axis, Curves, Kind, find_curves
from onecard.report.differences import Difference, find_differences
from onecard.report.record import RunRecord, StoredItems, read_runs
from onecard.report.score_table import ScoreRow, tabulate_scores
from onecard.report.summary import RunSummary, find_measure, name_runs, summarize_run
from onecard.spec import Comparison

_HELDOUT = {"loss": "held-out loss", "bits_per_byte": "held-out bits per byte"}


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side: everything but `comparisons` and `notes` has an entry per run, in their order.

    `measure` is the held-out figure that all runs can be compared by, None where there is none; `best` names the best
    run by it. `comparisons` set the best by each score beside each other run.
    """

    runs: tuple[RunSummary, ...]
    differences: tuple[Difference, ...]
    measure: str | None
    best: str | None
    scores: tuple[ScoreRow, ...]
    comparisons: tuple[Comparison, ...]
    curves: Curves
    notes: tuple[str, ...]


def compare_runs(paths: Sequence[str | Path], over: str = "tokens", kind: str | None = None) -> RunComparison:
    """Reads runs, finished or not, and sets them side by side.

    Raises:
        InputError: fewer than two runs, what is no run, or an unknown axis or curve.
    """
    axis, curve = _checked(over, kind)
    records = read_runs(paths)
    if len(records) < 2:
        given = f"{records[0].root} alone" if records else "none"
        raise InputError(f"comparing takes two different run folders or more, but there is {given}: give another one")
    names = name_runs(records)
    summaries = tuple(summarize_run(record, name) for record, name in zip(records, names, strict=True))
    measure, obstacle = find_measure(records)
    scores = tabulate_scores(records, [_best_step(*pair) for pair in zip(records, summaries, strict=True)])
    best, unpaired = _rank_heldout(summaries, measure)
    paired = [(row, found) for row in scores if (found := _rank_scores(row, names))]
    if any(_is_heldout(row) and len(found) == len(unpaired) for row, found in paired):
        unpaired = []  # the same, and said better
    curves = find_curves(records, axis, measure, curve)
    notes = [f"note: {obstacle}{_alike(records, names) if measure is None else ''}"] if obstacle else []
    notes += [note for pair in zip(records, summaries, strict=True) for note in _notes(*pair)]
    if 0 < len(empty := [n for n, points in zip(names, curves.points, strict=True) if not points]) < len(names):
        notes.append(f"note: no curve ({curves.of}) of {', '.join(empty)}")
    return RunComparison(
        runs=summaries,
        differences=find_differences(records),
        measure=measure,
        best=best,
        scores=scores,
        comparisons=(*unpaired, *(entry for _, found in paired for entry in found)),
        curves=curves,
        notes=tuple(notes),
    )


def _checked(over: str, kind: str | None) -> tuple[Axis, Kind | None]:
    axis = next((axis for axis in AXES if axis == over), None)
    curves: tuple[Kind, ...] = ("heldout", "train")
    curve = next((curve for curve in curves if curve == kind), None)
    problems = [] if axis else [f"over is {over!r}: give {', '.join(AXES)}"]
    problems += [f"curve is {kind!r}: give heldout or train"] if kind is not None and curve is None else []
    if problems or axis is None:
        raise InputError("\n".join(problems))
    return axis, curve


def _alike(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Names runs that could be compared if the others were left out."""
    groups: dict[object, list[str]] = {}
    for record, name in zip(records, names, strict=True):
        plan = record.plan
        groups.setdefault((plan.corpus.fingerprint, plan.eval_batches, plan.max_seq_length), []).append(name)
    found = [", ".join(group) for group in groups.values() if len(group) > 1]
    return "".join(f"; {group} can be, by themselves" for group in found)


def _best_step(record: RunRecord, summary: RunSummary) -> int | None:
    """The step that `best` means in the run."""
    if record.marked_step is not None:
        return record.marked_step
    return summary.best.step if summary.best is not None else None


def _rank_heldout(runs: Sequence[RunSummary], measure: str | None) -> tuple[str | None, list[Comparison]]:
    """Compares best held-out losses by their standard errors, as if they had been measured on different texts.

    A record holds no losses of single blocks. Runs that are compared on the same text differ by more than chance more
    often than this finds.
    """
    reached = [(run, run.best) for run in runs if run.best is not None]
    if measure is None or len(reached) < 2:
        return None, []
    found = [
        (run.name, point.loss, point.standard_error)
        if measure == "loss"
        else (run.name, point.bits_per_byte or math.inf, point.bits_error)
        for run, point in reached
    ]
    best, value, error = min(found, key=lambda entry: entry[1])
    # A best step was found among all that were evaluated: every two of them are looks.
    num_comparisons = math.comb(sum(run.num_evaluations for run, _ in reached), 2)
    comparisons = []
    for other, other_value, other_error in found:
        if other == best:
            continue
        joint = math.hypot(error, other_error)
        p_value = math.erfc((other_value - value) / joint / math.sqrt(2)) if joint > 0 else 1.0
        comparisons.append(
            Comparison(
                score=_HELDOUT[measure],
                best=best,
                other=other,
                gain=other_value - value,
                standard_error=joint,
                p_value=p_value,
                corrected_p_value=correct(p_value, num_comparisons),
                num_comparisons=num_comparisons,
                test="unpaired z-test",
                n=len(found),
            )
        )
    return best, comparisons


def _is_heldout(row: ScoreRow) -> bool:
    return row.name == "loss" and row.protocol.get("task") == "held-out loss" and row.protocol.get("limit") is None


def _rank_scores(row: ScoreRow, names: Sequence[str]) -> list[Comparison]:
    """Compares, item by item, the runs whose items were kept."""
    found = [
        (name, cell.items, cell.num_scored)
        for name, cell in zip(names, row.cells, strict=True)
        if cell is not None and cell.items is not None
    ]
    found = [entry for entry in found if entry[1].counts == found[0][1].counts]
    if len(found) < 2:
        return []
    _, comparisons = rank(
        row.label,
        [name for name, _, _ in found],
        [_items(stored) for _, stored, _ in found],
        is_lower_better=row.is_lower_better,
        num_looked_at=sum(num_scored for _, _, num_scored in found),
        is_last_chosen=True,
    )
    return comparisons


def _items(stored: StoredItems) -> Items:
    return Items(np.array(stored.sums), np.array(stored.counts))


def _notes(record: RunRecord, run: RunSummary) -> list[str]:
    notes = []
    if run.num_damaged:
        lines = "1 line" if run.num_damaged == 1 else f"{run.num_damaged:,} lines"
        notes.append(f"{run.name}: {lines} of events.jsonl cannot be read and count nowhere")
    if record.recipe is None:
        notes.append(f"{run.name}: recipe.yaml cannot be read, so settings are those of plans alone")
    if record.finished is None and record.age_s is not None:
        notes.append(f"{run.name}: has not ended; its last event is {_ago(record.age_s)} old")
    if run.num_refused:
        notes.append(f"{run.name}: updates not finite and skipped: {run.num_refused:,}")
    notes += [f"{run.name}: {finding}" for finding in run.findings]
    return notes


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
