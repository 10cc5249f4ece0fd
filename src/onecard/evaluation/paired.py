"""Two models over the same items: what differs between them, without what the items differ in.

The difference of two scores of 541 prompts has a standard error of 2.5 points if the scores are independent. They are
not: easy prompts are easy for both. Item by item, most of that goes away.
"""

import math
from dataclasses import dataclass

import numpy as np

# Below, the normal distribution promises too much of a mean.
_NUM_FOR_NORMAL = 30


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
    McNemar's); other items by the normal distribution of their mean difference.

    Raises:
        ValueError: the items are not the same.
    """
    if not np.array_equal(first.counts, second.counts):
        raise ValueError("only scores over the same items can be compared")
    differences = first.sums - second.sums
    value, standard_error = Items(differences, first.counts).ratio()
    is_verdict = bool((first.counts == 1).all() and np.isin([first.sums, second.sums], (0, 1)).all())
    if is_verdict or len(differences) < _NUM_FOR_NORMAL or not standard_error > 0:
        p_value = sign_test(int((differences > 0).sum()), int((differences < 0).sum()))
        return Difference(value, standard_error, p_value, "sign test")
    return Difference(value, standard_error, math.erfc(abs(value / standard_error) / math.sqrt(2)), "z-test")


def sign_test(num_better: int, num_worse: int) -> float:
    """Gives the two-sided p-value of so many wins and losses between equals, exactly; ties do not count."""
    decided = num_better + num_worse
    tail = sum(math.comb(decided, k) for k in range(min(num_better, num_worse) + 1))
    # Whole numbers up to here: 2^541 leaves the range of no integer.
    return min(1.0, 2 * tail / 2**decided)


def correct(p_value: float, num_comparisons: int) -> float:
    """Gives the p-value after looking so many times, as Bonferroni does: valid however the looks depend."""
    return min(1.0, p_value * num_comparisons)
