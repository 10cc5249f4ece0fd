"""A search for a learning rate as a table, a curve, a command line, as JSON."""

import math
import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.cli.commands import command
from onecard.cli.rows import print_folded, print_rows
from onecard.report.plot import Frame, draw
from onecard.trials.rates import list_warnings
from onecard.units import format_seconds

if TYPE_CHECKING:
    from onecard.trials.rates import RateSearch
    from onecard.trials.short_runs import Trial

_SIZE = (64, 12)
# What lies higher than so many times the lower half of the losses is cut from the picture.
_SHOWN = 5.0
_FIT_POINTS = 60
_RATE_KEYS = ("learning_rate", "muon_learning_rate")


def print_search(search: "RateSearch", folder: Path, train: str) -> None:
    """Prints runs, curve, what is proposed and why, and the command that trains with it."""
    print_rows(trial_rows(search))
    print()
    for line in curve_lines(search):
        print(line)
    for line in (*proposal_lines(search), *(f"Note: {text}." for text in list_warnings(search))):
        print_folded(line)
    print(f"{'evidence':13}{folder}")
    if search.proposal is not None:
        print(f"{'train':13}{train}")


def trial_rows(search: "RateSearch") -> list[tuple[str, ...]]:
    """One row per run, by length, seed and rate."""
    best = min((loss for trial in _whole(search) if (loss := trial.heldout_loss) is not None), default=None)
    keys = list(search.rates_of(1.0))
    rows: list[tuple[str, ...]] = [("", *keys, "x", "steps", "seed", "held-out loss", "against best", "time", "")]
    for trial in sorted(search.trials, key=lambda trial: (trial.num_steps, trial.seed, trial.factor)):
        is_best = trial.heldout_loss is not None and trial.heldout_loss == best
        behind = trial.num_steps == search.budget.num_steps and trial.heldout_loss is not None and best is not None
        rows.append(
            (
                "*" if is_best else "",
                *(f"{rate:g}" for rate in search.rates_of(trial.factor).values()),
                f"{trial.factor:.3g}",
                str(trial.num_steps),
                str(trial.seed),
                "-" if trial.heldout_loss is None else f"{trial.heldout_loss:.4f}",
                f"{(trial.heldout_loss or 0.0) - (best or 0.0):+.4f}" if behind else "",
                format_seconds(trial.seconds),
                trial.stopped or "",
            )
        )
    return rows


def _whole(search: "RateSearch") -> list["Trial"]:
    """The longest runs of the first seed that came to their end."""
    return [
        trial
        for trial in search.trials
        if trial.heldout_loss is not None
        and trial.num_steps == search.budget.num_steps
        and trial.seed == search.plan.seed
    ]


def curve_lines(search: "RateSearch") -> list[str]:
    """Held-out loss over the rate: letters o are runs, points the fit; steep ends are cut."""
    points = sorted((math.log2(trial.factor), trial.heldout_loss or 0.0) for trial in _whole(search))
    if len(points) < 3:
        return []
    losses = sorted(loss for _, loss in points)
    low, middle = losses[0], losses[len(losses) // 2]
    top = min(losses[-1], low + _SHOWN * max(middle - low, 1e-9))
    left, right = points[0][0], points[-1][0]
    margin = 0.05 * (top - low) or 0.01
    frame = Frame(right - left, low - margin, top + margin)
    fit, runs = _fitted(search, left, frame), [[(x - left, loss)] for x, loss in points if loss <= frame.top]
    below, above = (
        draw(curves, mark * len(curves), frame, _SIZE, dots=False) for mark, curves in ((".", fit), ("o", runs))
    )
    labels = {0: f"{frame.top:.3f}", _SIZE[1] - 1: f"{frame.bottom:.3f}"}
    indent = max(map(len, labels.values())) + 1
    lines = ["held-out loss over learning_rate (o runs, . fit)"]
    for number, (row, over) in enumerate(zip(below, above, strict=True)):
        # Runs stay seen where the fit meets them.
        text = "".join(top if top != " " else mark for (mark, _), (top, _) in zip(row, over, strict=True)).rstrip()
        lines.append(f"{labels.get(number, '').rjust(indent - 1)} |{text}")
    first, last = (f"{search.rates_of(2**x)['learning_rate']:g}" for x in (left, right))
    lines.append(" " * indent + "+" + "-" * _SIZE[0])
    lines.append(" " * (indent + 1) + first + last.rjust(_SIZE[0] - len(first)))
    return [*lines, ""]


def _fitted(search: "RateSearch", left: float, frame: Frame) -> list[list[tuple[float, float]]]:
    """The parabola as points apart from one another, so that runs on it stay seen."""
    fit = search.proposal.fit if search.proposal else None
    if fit is None:
        return []
    xs = [fit.left + (fit.right - fit.left) * number / _FIT_POINTS for number in range(_FIT_POINTS + 1)]
    values = [(x - left, fit.loss + fit.curvature * (x - fit.x) ** 2) for x in xs]
    return [[point] for point in values if point[1] <= frame.top]


def proposal_lines(search: "RateSearch") -> list[str]:
    """What to take, how sure it is, and what the recipe's own rate costs."""
    proposal = search.proposal
    if proposal is None:
        return ["No rate can be proposed."]
    budget = search.budget
    here = _rates(search, proposal.factor_here)
    how = "the least of the fit" if proposal.fit is not None else "the best run"
    times = f"x {proposal.factor_here:.2g} of the recipe's"
    lines = [f"Best at {budget.num_steps} steps: {here} ({times}), loss {proposal.loss:.4f}, {how}."]
    if proposal.flat is not None:
        low, high = (search.rates_of(factor) for factor in proposal.flat)
        ranges = ", ".join(f"{key} {low[key]:g} to {high[key]:g}" for key in low)
        noise = f"noise between runs {proposal.noise:.4f}"
        if proposal.seed_spread is not None:
            noise += f", between seeds {proposal.seed_spread:.4f}"
        lines.append(f"Flat: {ranges}; the loss there is as good as the least ({noise}).")
    if proposal.recipe_loss is not None:
        more = max(0.0, proposal.recipe_loss - proposal.loss)
        is_flat = proposal.flat is not None and proposal.flat[0] <= 1 <= proposal.flat[1]
        where = "within it" if is_flat else f"{more:.4f} above the least"
        lines.append(f"The recipe's own rate is {where} at {budget.num_steps} steps.")
    lines.append(f"Proposed for {budget.of_steps} steps: {_rates(search, proposal.factor)}.")
    return lines


def _rates(search: "RateSearch", factor: float) -> str:
    return ", ".join(f"{key} {rate:g}" for key, rate in search.rates_of(factor).items())


def train_command(search: "RateSearch", source: str | None, overrides: Mapping[str, Any]) -> str:
    """The command line of the search as one of `train`, with the rates that are proposed."""
    words = [*([source] if source else [])]
    rates = search.rates_of(search.proposal.factor) if search.proposal else {}
    for key, value in overrides.items():
        for item in value if isinstance(value, list) else [value]:
            if key.replace("-", "_") not in _RATE_KEYS:
                words += [f"--{key}", *([] if item is True else ["false"] if item is False else [str(item)])]
    for key, rate in rates.items():
        words += [f"--{key}", f"{rate:g}"]
    text = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    return f"{command('onecard')} train {text}"


def search_document(search: "RateSearch", folder: Path, train: str) -> dict[str, Any]:
    """The whole search for programs, without the losses of each step, which are in the folder."""
    proposal, budget = search.proposal, search.budget
    return {
        "proposal": None
        if proposal is None
        else {
            **search.rates_of(proposal.factor),
            **asdict(proposal),
            "here": search.rates_of(proposal.factor_here),
            "flat_rates": None if proposal.flat is None else [search.rates_of(factor) for factor in proposal.flat],
        },
        "command": None if proposal is None else train,
        "warnings": list_warnings(search),
        "budget": asdict(budget),
        "seconds": search.seconds,
        "is_cut_short": search.is_cut_short,
        "trials": [
            {key: value for key, value in asdict(trial).items() if key != "losses"} | search.rates_of(trial.factor)
            for trial in search.trials
        ],
        "folder": str(folder),
    }
