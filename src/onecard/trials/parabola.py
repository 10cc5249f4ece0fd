"""A minimum read off a few points: a parabola in the logarithm of the rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_POINTS = 5

Point = tuple[float, float]


@dataclass(frozen=True)
class Parabola:
    """loss = `curvature` * (x - `x`)^2 + `loss`; fitted to points from `left` to `right`.

    `residual` is by how much a point lies off it, allowing for what was fitted; None for three points, which lie on it.
    """

    x: float
    loss: float
    curvature: float
    left: float
    right: float
    residual: float | None = None

    def flat(self, noise: float) -> tuple[float, float]:
        """Where the loss is within `noise` of the least, as far as points reach."""
        half = math.sqrt(noise / self.curvature)
        return max(self.left, self.x - half), min(self.right, self.x + half)


def fit_parabola(points: Sequence[Point]) -> Parabola | None:
    """Fits the points next to the lowest one, by least squares; None where they show no minimum inside.

    Far points are left out, for losses rise faster on the side of high rates than any parabola that fits the bottom.
    """
    lowest = min(points, key=lambda point: point[1])
    near = sorted(points, key=lambda point: abs(point[0] - lowest[0]))[:_NUM_POINTS]
    xs, losses = (np.array(values) for values in zip(*near, strict=True))
    if len(near) < 3 or lowest[0] in (xs.min(), xs.max()):
        return None
    # Around the lowest point, for the sake of the numbers.
    curvature, slope, level = np.polyfit(xs - lowest[0], losses, 2)
    if curvature <= 0:
        return None
    at = -slope / (2 * curvature)
    x = lowest[0] + float(at)
    if not xs.min() <= x <= xs.max():
        return None
    loss = float(level + slope * at / 2)
    off = losses - np.polyval((curvature, slope, level), xs - lowest[0])
    residual = math.sqrt(float(off @ off) / (len(near) - 3)) if len(near) > 3 else None
    return Parabola(x, loss, float(curvature), float(xs.min()), float(xs.max()), residual)


def comparison_noise(pairs: Sequence[tuple[float, float]]) -> float | None:
    """By how much chance moves one loss against another of the same seed, from losses with two seeds at several rates.

    What a seed does to all rates alike is no noise between them. None for fewer than two pairs.
    """
    if len(pairs) < 2:
        return None
    differences = [second - first for first, second in pairs]
    return float(np.std(differences, ddof=1)) / math.sqrt(2)
