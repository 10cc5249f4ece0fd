"""Which of two models is better on the same items, and how sure that is."""

from typing import Any

import numpy as np
import pytest

from onecard.evaluation.paired import Items, compare_items, sign_test, t_test
from onecard.evaluation.ranking import rank


def losses(seed: int, num_items: int = 200, gain: float = 0.0) -> tuple[Items, Items]:
    """Two models that find the same blocks hard; the first is better by `gain` nats per token."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(20, 60, num_items)
    hard = generator.normal(3.0, 1.0, num_items)
    first, second = (hard + generator.normal(0, 0.1, num_items) for _ in range(2))
    return Items((first - gain) * counts, counts), Items(second * counts, counts)


def test_the_sign_test_is_exact() -> None:
    # Of 2^10 equally likely outcomes, 11 have at most one loss, and 11 at most one win.
    assert sign_test(9, 1) == sign_test(1, 9) == pytest.approx(22 / 1024)
    assert (sign_test(0, 0), sign_test(5, 5), sign_test(1, 0)) == (1.0, 1.0, 1.0)
    assert 0 <= sign_test(541, 0) < 1e-100


def test_pairing_finds_what_two_separate_errors_hide() -> None:
    first, second = losses(0, gain=0.05)
    difference = compare_items(first, second)
    errors = [items.ratio()[1] for items in (first, second)]
    assert difference.value == pytest.approx(first.ratio()[0] - second.ratio()[0])
    assert difference.p_value < 0.001
    assert abs(difference.value) < np.hypot(*errors)
    assert difference.standard_error < np.hypot(*errors) / 5


@pytest.mark.parametrize("num_items", [12, 200])
def test_equals_differ_by_chance_as_often_as_the_p_value_says(num_items: int) -> None:
    p_values = np.array([compare_items(*losses(seed, num_items)).p_value for seed in range(500)])
    assert (p_values < 0.05).mean() < 0.08
    assert (p_values < 0.5).mean() > 0.3


def test_verdicts_are_compared_by_what_the_two_disagree_on() -> None:
    first = Items(np.array([1.0] * 9 + [0.0] + [1.0] * 50), np.ones(60, int))
    second = Items(np.array([0.0] * 9 + [1.0] + [1.0] * 50), np.ones(60, int))
    difference = compare_items(first, second)
    assert (difference.test, difference.value) == ("sign test", pytest.approx(8 / 60))
    assert difference.p_value == pytest.approx(22 / 1024)


def test_other_items_are_refused() -> None:
    first, second = losses(0)
    with pytest.raises(ValueError, match="same items"):
        compare_items(first, Items(second.sums, second.counts + 1))


def test_the_best_is_set_beside_each_other_and_pays_for_the_looks() -> None:
    best, near = losses(1, gain=0.03)
    far = Items(near.sums + near.counts, near.counts)
    broken = Items(np.full(len(near.sums), np.nan), near.counts)
    index, found = rank("loss", ["a", "b", "c", "d"], [broken, near, best, far], is_lower_better=True)
    assert (index, [entry.other for entry in found]) == (2, ["a", "b", "d"])
    # The last is one that nobody chose by its score: three looks found a better one. The others are of all six pairs.
    assert [entry.num_comparisons for entry in found] == [6, 6, 3]
    near_one, far_one = found[1], found[2]
    assert near_one.gain == pytest.approx(near.ratio()[0] - best.ratio()[0])
    assert near_one.gain > 0
    assert near_one.corrected_p_value == pytest.approx(min(1.0, 6 * near_one.p_value))
    assert far_one.gain > 0.9
    index, found = rank("accuracy", ["a", "b"], [near, far], is_lower_better=False)
    assert index == 1
    assert found[0].gain == pytest.approx(1.0)


def test_the_t_test_agrees_with_the_tables() -> None:
    # Two-sided points of Student's distribution, as printed in any table of it.
    points = {
        (1, 12.706): 0.05,
        (2, 4.303): 0.05,
        (5, 2.571): 0.05,
        (29, 2.045): 0.05,
        (2, 9.925): 0.01,
        (30, 3.646): 0.001,
    }
    for (num_free, t), p_value in points.items():
        assert t_test(t, num_free) == t_test(-t, num_free) == pytest.approx(p_value, rel=0.01)
    assert t_test(0.0, 7) == t_test(0.0, 8) == 1.0
    # Where the finite sum ends, the normal distribution goes on.
    assert t_test(4.4, 10_000) == pytest.approx(t_test(4.4, 10_001), rel=0.02)


@pytest.mark.parametrize("num_items", [30, 64])
def test_of_a_hundred_equals_one_looks_better_no_more_often_than_it_may(num_items: int) -> None:
    generator, num_found, num_trials = np.random.default_rng(7), 0, 60
    for _ in range(num_trials):
        hard, counts = generator.normal(3.0, 1.0, num_items), generator.integers(20, 60, num_items)
        models = [Items((hard + generator.normal(0, 0.1, num_items)) * counts, counts) for _ in range(100)]
        _, found = rank("loss", [str(number) for number in range(100)], models, is_lower_better=True)
        num_found += any(entry.corrected_p_value < 0.05 for entry in found)
    # Of 60 trials at 5% more than 7 would be one case in a hundred; the normal distribution gives 19 and 8 here.
    assert num_found <= 7


def test_a_model_that_gives_no_numbers_is_worse_by_more_than_chance() -> None:
    first, second = losses(2)
    broken = Items(np.full(len(second.sums), np.nan), second.counts)
    _, (entry,) = rank("loss", ["a", "b"], [first, broken], is_lower_better=True)
    assert (entry.best, entry.test) == ("a", "sign test")
    assert entry.corrected_p_value < 0.001
    _, (entry,) = rank("loss", ["a", "b"], [broken, broken], is_lower_better=True)
    assert entry.p_value == 1.0


def test_looks_that_are_not_shown_count_as_well() -> None:
    models = sorted(losses(1), key=Items.ratio)

    def looks(**changes: Any) -> int:
        _, (entry,) = rank("loss", ["a", "b"], models, is_lower_better=True, **changes)
        return entry.num_comparisons

    assert looks() == 1
    assert looks(num_looked_at=10) == 9
    assert looks(num_looked_at=10, is_last_chosen=True) == 45
