"""Runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecard.run.compare import RunComparison


def compare(runs: Sequence[str | Path], *, over: str = "tokens", curve: str | None = None) -> "RunComparison":
    """Sets runs side by side, finished or in training: settings that differ, losses, scores, speed, curves.

    `over` is the axis of the curves: tokens, steps or time; `curve` is heldout or train, by default held-out where
    there is such a one. Takes no lock, writes nothing and needs no torch.

    Raises:
        InputError: fewer than two different runs, or what is none, all of them together.
    """
    from onecard.run.compare import compare_runs

    return compare_runs(runs, over, curve)
