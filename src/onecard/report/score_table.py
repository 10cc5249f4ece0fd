"""Scores of several runs, each beside those it can be compared with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onecard.report.record import RunRecord, StoredItems

# Of a protocol: whose weights these are and what ran them. All else must agree.
_MAY_DIFFER = {"weights", "onecard", "torch", "transformers", "device", "dtype", "adapter", "num_unfinished"}
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class ScoreCell:
    """What one run reached: at the checkpoint that is its best where that was scored, else at its newest scored one."""

    checkpoint: str
    step: int | None
    value: float
    standard_error: float | None
    items: StoredItems | None
    num_scored: int


@dataclass(frozen=True)
class ScoreRow:
    """A score by one protocol, over `n` items; a cell per run, None where it has no such score.

    `label` is its name, with what tells it from other rows of that name.
    """

    name: str
    label: str
    n: int
    protocol: Mapping[str, Any]
    cells: tuple[ScoreCell | None, ...]

    @property
    def is_lower_better(self) -> bool:
        return self.name.rpartition("/")[2].endswith(_LOWER_IS_BETTER)

    @property
    def best(self) -> int | None:
        """Which run is best; None where fewer than two have the score, or two share the first place."""
        values = {index: cell.value for index, cell in enumerate(self.cells) if cell is not None}
        if len(values) < 2:
            return None
        found = (min if self.is_lower_better else max)(values.values())
        winners = [index for index, value in values.items() if value == found]
        return winners[0] if len(winners) == 1 else None


def tabulate_scores(runs: Sequence[RunRecord], best_steps: Sequence[int | None]) -> tuple[ScoreRow, ...]:
    """Puts scores of equal name, protocol and number of items into one row; of a score that was repeated the newest."""
    keys = dict.fromkeys(key for run in runs for row in run.score_rows if (key := _key(row)) is not None)
    read = {key: tuple(json.loads(key)) for key in keys}
    rows = []
    for key, (name, n, protocol) in read.items():
        cells = tuple(_cell(run, key, step) for run, step in zip(runs, best_steps, strict=True))
        others = [(other_n, other) for other_name, other_n, other in read.values() if other_name == name]
        rows.append(ScoreRow(name, _label(name, n, protocol, others), n, protocol, cells))
    return tuple(rows)


def _label(name: str, n: int, own: Mapping[str, Any], rows: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    differing = [key for key in own if any(row.get(key) != own[key] for _, row in rows)]
    parts = [f"{key} {own[key] if own[key] is not None else 'none'}" for key in differing]
    if len(rows) > 1 and not parts:
        parts = [f"n {n:,}"]
    return f"{name} ({', '.join(parts)})" if parts else name


def _cell(run: RunRecord, key: str, best_step: int | None) -> ScoreCell | None:
    newest = {row.get("step"): row for row in run.score_rows if _key(row) == key}
    if not newest:
        return None
    row = newest.get(best_step) if best_step is not None else None
    row = row or list(newest.values())[-1]
    return ScoreCell(
        checkpoint=str(row.get("checkpoint")),
        step=row.get("step"),
        value=float(row["value"]),
        standard_error=row.get("standard_error"),
        items=next((entry for entry in run.items_of(str(row.get("checkpoint"))) if _is_made_of(row, entry)), None),
        num_scored=len(newest),
    )


def _is_made_of(row: Mapping[str, Any], items: StoredItems) -> bool:
    """Whether items are those of a score: kept with it, and its value is their ratio."""
    if not sum(items.counts):
        return False
    is_kept_with = any(all(row.get(name) == score.get(name) for name in _OF_SCORE) for score in items.scores)
    return is_kept_with and abs(sum(items.sums) / sum(items.counts) - float(row["value"])) < 1e-9


_OF_SCORE = ("name", "value", "n", "protocol")


def _key(row: Mapping[str, Any]) -> str | None:
    """What two scores must share to stand in one row, as JSON; None for a line that is no score."""
    name, n, protocol, value = (row.get(field) for field in ("name", "n", "protocol", "value"))
    if not isinstance(protocol, Mapping) or not isinstance(value, int | float):
        return None
    return json.dumps([name, n, {key: entry for key, entry in protocol.items() if key not in _MAY_DIFFER}])
