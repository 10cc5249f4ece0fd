"""Which rate to try next: outward from the recipe's by factors of two, then halfway from the best to its neighbours.

    x1/8   x1/4   x1/2   x1   x2   x4   x8        rungs -6 -4 -2 0 2 4 6: half octaves
                          ^── first, then both neighbours of the lowest, and theirs

Quarter runs climb first, for they are cheap; whole ones begin where those were lowest.
"""

import math
from collections.abc import Mapping

# As far as the climb goes where the least keeps moving outward: a factor of 32.
_LAST = 10
_COARSE, _FINE = 2, 1


def next_rung(losses: Mapping[int, float], start: int = 0, *, is_fine: bool = True) -> int | None:
    """The rung to try after those in `losses` (inf: stopped before its end); None where nothing is left to try.

    The lowest gets its neighbours a factor of two away, then those a factor of four away unless the way there rose to
    a run that had to be stopped, then, if `is_fine`, those of a factor 1.4.
    """
    if not losses:
        return start
    best = min(losses, key=lambda rung: losses[rung])
    if math.isinf(losses[best]):
        # The first rate is too high: the only way to learn more is down.
        lowest = min(losses)
        return lowest - _COARSE if lowest - _COARSE >= -_LAST else None
    sides = (1, -1) if _falls_upward(losses, best) else (-1, 1)
    wanted = []
    if (best - start) % _COARSE == 0:  # a rung between has its coarse neighbours already
        wanted += [best + side * _COARSE for side in sides]
        wanted += [
            best + 2 * side * _COARSE for side in sides if math.isfinite(losses.get(best + side * _COARSE, math.inf))
        ]
    wanted += [best + side * _FINE for side in sides if is_fine]
    return next((rung for rung in wanted if rung not in losses and abs(rung) <= _LAST), None)


def _falls_upward(losses: Mapping[int, float], best: int) -> bool:
    below, above = (losses.get(best + step) for step in (-_COARSE, _COARSE))
    if above is None or below is None:
        return above is None
    return above < below


def factor_of(rung: int) -> float:
    """2^(rung / 2): what a rung multiplies the rate by."""
    return 2.0 ** (rung / 2)
