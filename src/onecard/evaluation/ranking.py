"""Which checkpoint is best by a score, and how sure that is."""

import math
from collections.abc import Sequence

from onecard.evaluation.paired import Items, compare_items, correct
from onecard.spec.score import Comparison


def rank(
    score: str,
    names: Sequence[str],
    items: Sequence[Items],
    *,
    is_lower_better: bool,
    num_looked_at: int = 0,
    is_last_chosen: bool = False,
) -> tuple[int, list[Comparison]]:
    """Finds the best of several models over the same items, and sets it beside each other one, in their order.

    Against the last, which nobody chose by its score, the best of k was found by k - 1 looks, against any other one by
    all k (k - 1) / 2; so is the last where `is_last_chosen`. By so many each p-value is corrected. k is `num_looked_at`
    where more were looked at than are compared here.
    """
    sign = -1.0 if is_lower_better else 1.0
    values = [sign * entry.ratio()[0] for entry in items]
    # A model that has diverged ranks last; of equals the first is best.
    best = max(range(len(values)), key=lambda index: (not math.isnan(values[index]), values[index], -index))
    count, comparisons = max(len(names), num_looked_at), []
    for index, (name, other) in enumerate(zip(names, items, strict=True)):
        if index == best:
            continue
        difference = compare_items(items[best], other)
        num_comparisons = count - 1 if index == len(names) - 1 and not is_last_chosen else count * (count - 1) // 2
        comparisons.append(
            Comparison(
                score=score,
                best=names[best],
                other=name,
                gain=sign * difference.value,
                standard_error=difference.standard_error,
                p_value=difference.p_value,
                corrected_p_value=correct(difference.p_value, num_comparisons),
                num_comparisons=num_comparisons,
                test=difference.test,
                n=len(other.sums),
            )
        )
    return best, comparisons
