"""Two models over the same items: what differs between them, without what the items differ in.

The difference of two scores of 541 prompts has a standard error of 2.5 points if the scores are independent. They are
not: easy prompts are easy for both. Item by item, most of that goes away.
"""

import math
from dataclasses import dataclass

import numpy as np

# Below, the distribution of a mean may be anything but normal.
_NUM_FOR_MEANS = 30
# Above, Student's distribution and the normal one give the same p-value within a fiftieth of it, down to 1e-6.
_MANY = 10_000


@dataclass(frozen=True)
class Items:
    """What a score is a ratio of, item by item: sums [n] (losses, instructions followed) over counts [n]."""

    sums: np.ndarray
    counts: np.ndarray

    def ratio(self) -> tuple[float, float]:
        """Gives sum over count and its standard error, which treats items as independent; of one item it is 0."""
        num_items, total = len(self.sums), float(self.counts.sum())
        ratio = float(self.sums.sum()) / max(1.0, total)
        # Ratio estimator: items may have unequal counts.
        deviations = self.sums - ratio * self.counts
        variance = float((deviations**2).sum()) * num_items / max(1, num_items - 1)
        return ratio, math.sqrt(variance) / max(1.0, total)


@dataclass(frozen=True)
class Difference:
    """First minus second: its paired standard error, and how probable so large a one is between equals (two-sided)."""

    value: float
    standard_error: float
    p_value: float
    test: str


def compare_items(first: Items, second: Items) -> Difference:
    """Compares two models over the same items.

    Verdicts of right and wrong, and fewer than 30 items, are compared by the exact sign test (for verdicts it is
    McNemar's); other items by Student's t-test of their mean difference, which after many looks is not the normal
    distribution: 4.4 standard errors of 30 items are 13 times as probable. What is not a number is the worst loss.

    Raises:
        ValueError: the items are not the same.
    """
    if not np.array_equal(first.counts, second.counts):
        raise ValueError("only scores over the same items can be compared")
    value, standard_error = Items(first.sums - second.sums, first.counts).ratio()
    differences = _compare_one_by_one(first.sums, second.sums)
    is_verdict = bool((first.counts == 1).all() and np.isin([first.sums, second.sums], (0, 1)).all())
    if is_verdict or len(differences) < _NUM_FOR_MEANS or not standard_error > 0:
        p_value = sign_test(int((differences > 0).sum()), int((differences < 0).sum()))
        return Difference(value, standard_error, p_value, "sign test")
    return Difference(value, standard_error, t_test(value / standard_error, len(differences) - 1), "t-test")


def _compare_one_by_one(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Gives 1, 0 or -1 for each item: which of the two is higher, where what is not a number is higher than any."""
    first, second = (np.where(np.isnan(sums), np.inf, sums) for sums in (first, second))
    return (first > second).astype(int) - (first < second).astype(int)


def t_test(t: float, num_free: int) -> float:
    """Gives the two-sided p-value of a mean that is `t` standard errors from zero, with so many degrees of freedom.

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if num_free > _MANY:
        return math.erfc(abs(t) / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(num_free))
    is_odd = num_free % 2
    terms = [math.cos(angle) if is_odd else 1.0]
    for k in range(2 + is_odd, num_free, 2):
        terms.append(terms[-1] * math.cos(angle) ** 2 * (k - 1) / k)
    inside = math.sin(angle) * math.fsum(terms if num_free > 1 else ())
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if is_odd else inside))


def sign_test(num_better: int, num_worse: int) -> float:
    """Gives the two-sided p-value of so many wins and losses between equals, exactly; ties do not count."""
    decided = num_better + num_worse
    tail = sum(math.comb(decided, k) for k in range(min(num_better, num_worse) + 1))
    # Whole numbers up to here: 2^541 leaves the range of no integer.
    return min(1.0, 2 * tail / 2**decided)


def correct(p_value: float, num_comparisons: int) -> float:
    """Gives the p-value after looking so many times, as Bonferroni does: valid however the looks depend."""
    return min(1.0, p_value * num_comparisons)
