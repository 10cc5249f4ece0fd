"""Long curves made short without hiding what they did: each bin keeps its mean, its lowest and its highest value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
# As wide as a curve is on a page; of a short one every value has a bin of its own.
_MAX_BINS = 200
_MAX_SINGLE = 60


@dataclass(frozen=True)
class Thinned:
    """A curve as bins of `bin_size` values: `mean` is (x, y), `band` is (x, lowest, highest), x the end of a bin.

    `gaps` are the x of values that are not finite; they count in no bin. `band` is empty where bins hold one value.
    """

    mean: tuple[Point, ...]
    band: tuple[tuple[float, float, float], ...]
    gaps: tuple[float, ...]
    bin_size: int


def thin(points: Sequence[Point]) -> Thinned:
    """Puts neighbours of a curve into bins, 200 at most: the band goes through the extremes of each."""
    finite = [point for point in points if math.isfinite(point[1])]
    size = 1 if len(finite) <= _MAX_SINGLE else max(5, -(-len(finite) // _MAX_BINS))
    bins = [finite[start : start + size] for start in range(0, len(finite), size)]
    gaps = [x for x, y in points if not math.isfinite(y)]
    return Thinned(
        mean=tuple((part[-1][0], math.fsum(y / len(part) for _, y in part)) for part in bins),
        band=tuple((part[-1][0], min(y for _, y in part), max(y for _, y in part)) for part in bins) * (size > 1),
        gaps=tuple(gaps[:: -(-len(gaps) // _MAX_BINS) or 1]),
        bin_size=size,
    )
