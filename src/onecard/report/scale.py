"""From values to places on a page, and the round numbers that belong beside them."""

import math
from dataclasses import dataclass

_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Scale:
    """Maps `low` to `start` and `high` to `end`, by logarithm where `is_log`.

    What lies beyond is placed beyond, by half of the length at most: a loss of 1e30 must not break a picture.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Gives the place of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return self.start + min(max(share, -0.5), 1.5) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Gives about `count` round values within the scale."""
        return _decades(self.low, self.high) if self.is_log else round_values(self.low, self.high, count)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value


def round_values(low: float, high: float, count: int) -> list[float]:
    """Gives about `count` multiples of 1, 2, 2.5 or 5 times a power of ten between two values."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = power * next(step for step in _STEPS if step * power >= rough * (1 - 1e-9))
    first = math.ceil(low / distance - 1e-9)
    return [round(index * distance, 12) for index in range(first, math.floor(high / distance + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 5) or 1
    values = [10.0**power for power in range(first, last + 1, every)]
    found = [value for value in values if low <= value <= high]
    return found if len(found) > 1 else round_values(low, high, 4)


def format_tick(value: float) -> str:
    """Writes a round value in few characters: 12000 -> '12K', 0.0005 -> '5e-4'."""
    size = abs(value)
    if size >= 1000:
        for suffix, unit in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
            if size >= unit:
                return f"{value / unit:.4g}{suffix}" if size < 1e13 else f"{value:.0e}"
    if 0 < size < 0.001:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
