"""From short runs to the rate that is proposed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onecard.trials.ladder import factor_of
from onecard.trials.parabola import Parabola, comparison_noise, fit_parabola
from onecard.trials.short_runs import Trial

# What the second seed adds to the first.
SEED_STEP = 1
# The best rate of longer runs falls, by no more than the root of their length.
_MOST_SHIFT = 1.0


@dataclass(frozen=True)
class Proposal:
    """What to take: `factor` times the recipe's rates for the whole run, `factor_here` for runs as short as these.

    `noise` is by how much chance moves runs against one another: by what another seed changed, or by how far they lie
    off the fit, whichever is more. `flat` is the range of factors whose loss it cannot tell from the least here; None
    where it is not known. `fit` is in octaves from the recipe's rate; None where the runs show no minimum inside.
    `shift_per_fourfold` is by how many octaves the least moved, per factor of 4 in length; None where it is not known
    or not needed.
    """

    factor: float
    factor_here: float
    loss: float
    recipe_loss: float | None
    noise: float | None
    seed_spread: float | None
    flat: tuple[float, float] | None
    fit: Parabola | None
    shift_per_fourfold: float | None


def losses_of(trials: Sequence[Trial], seed: int, num_steps: int) -> dict[int, float]:
    """Held-out losses by rung; inf of runs that were stopped."""
    return {
        round(2 * math.log2(trial.factor)): math.inf if trial.heldout_loss is None else trial.heldout_loss
        for trial in trials
        if (trial.seed, trial.num_steps) == (seed, num_steps)
    }


def propose(trials: Sequence[Trial], seed: int, lengths: Sequence[int], of_steps: int) -> Proposal | None:
    """Reads a rate off the long runs: the least of a parabola where it lies inside of what was tried, else the best.

    Where a rate was tried with two seeds its loss is the mean of both, after what the seeds do to all rates alike.
    Where the run is longer still, the least is moved on as it moved from the short runs to the long ones.
    """
    first = _finite(losses_of(trials, seed, lengths[-1]))
    if not first:
        return None
    second = _finite(losses_of(trials, seed + SEED_STEP, lengths[-1]))
    pairs = [(first[rung], loss) for rung, loss in second.items() if rung in first]
    offset = sum(b - a for a, b in pairs) / len(pairs) if pairs else 0.0
    losses = {rung: (loss + second[rung] - offset) / 2 if rung in second else loss for rung, loss in first.items()}
    best = min(losses, key=lambda rung: losses[rung])
    seed_noise, fit = comparison_noise(pairs), _fit(losses)
    # Seeds that happen to agree do not make runs that lie off the curve any surer.
    known = [value for value in (seed_noise, fit.residual if fit else None) if value is not None]
    noise = max(known, default=None)
    flat = None if fit is None or noise is None else fit.flat(noise)
    here = fit.x if fit is not None else best / 2
    shift = None if fit is None else _shift(fit, trials, seed, lengths, of_steps)
    rest = math.log(of_steps / lengths[-1], 4)
    return Proposal(
        factor=2 ** (here + (shift or 0.0) * rest),
        factor_here=2**here,
        loss=fit.loss if fit is not None else losses[best],
        recipe_loss=losses.get(0),
        noise=noise,
        seed_spread=max((abs(b - a) for a, b in pairs), default=None),
        flat=None if flat is None else (2 ** flat[0], 2 ** flat[1]),
        fit=fit,
        shift_per_fourfold=shift,
    )


def _shift(fit: Parabola, trials: Sequence[Trial], seed: int, lengths: Sequence[int], of_steps: int) -> float | None:
    if len(lengths) == 1 or lengths[-1] == of_steps:
        return None
    losses = _finite(losses_of(trials, seed, lengths[0]))
    short = _fit(losses) if losses else None
    if short is None:
        return None
    return min(0.0, max(-_MOST_SHIFT, (fit.x - short.x) / math.log(lengths[-1] / lengths[0], 4)))


def _fit(losses: dict[int, float]) -> Parabola | None:
    return fit_parabola([(math.log2(factor_of(rung)), loss) for rung, loss in losses.items()])


def _finite(losses: dict[int, float]) -> dict[int, float]:
    return {rung: loss for rung, loss in losses.items() if math.isfinite(loss)}
