"""Which rate comes next, and what is read off the losses."""

import math
from collections.abc import Callable

import pytest

from onecard.trials.ladder import factor_of, next_rung
from onecard.trials.parabola import comparison_noise, fit_parabola
from onecard.trials.proposal import propose
from onecard.trials.short_runs import Trial


def climb(loss_at: Callable[[float], float], start: int = 0, *, is_fine: bool = True) -> dict[int, float]:
    losses: dict[int, float] = {}
    while (rung := next_rung(losses, start, is_fine=is_fine)) is not None:
        assert rung not in losses
        losses[rung] = loss_at(rung / 2)
        assert len(losses) < 30
    return losses


@pytest.mark.parametrize("least", [-4.0, -1.3, -0.2, 0.0, 0.6, 2.0, 3.7])
def test_the_climb_ends_around_the_least(least: float) -> None:
    losses = climb(lambda x: (x - least) ** 2)
    best = min(losses, key=lambda rung: losses[rung])
    assert abs(best / 2 - least) <= 0.26
    assert {best - 1, best + 1} <= losses.keys()
    assert len(losses) <= 8 + abs(round(least)), losses


def test_a_climb_beside_what_has_to_be_stopped_goes_no_further_that_way() -> None:
    losses = climb(lambda x: math.inf if x > 0.4 else (x + 0.1) ** 2)
    assert max(losses) == 2
    assert [factor_of(rung) for rung in (2, 1, -2)] == pytest.approx([2, math.sqrt(2), 0.5])


def test_a_recipe_whose_rate_diverges_is_climbed_down_from() -> None:
    losses = climb(lambda x: math.inf if x > -2.5 else (x + 3) ** 2)
    assert min(losses, key=lambda rung: losses[rung]) == -6
    assert climb(lambda x: math.inf).keys() == {0, -2, -4, -6, -8, -10}


def test_short_runs_take_whole_octaves_and_long_ones_begin_where_those_were_lowest() -> None:
    short = climb(lambda x: (x - 2) ** 2, is_fine=False)
    assert all(rung % 2 == 0 for rung in short)
    assert next(iter(climb(lambda x: (x - 1) ** 2, start=4))) == 4


def test_the_least_of_a_parabola_is_found_and_a_steep_far_end_does_not_move_it() -> None:
    points = [(x, 2.0 + 0.05 * (x - 0.3) ** 2) for x in (-2, -1, -0.5, 0, 0.5, 1)]
    fit = fit_parabola([*points, (2, 9.0), (3, 11.0)])
    assert fit is not None
    assert (fit.x, fit.loss) == pytest.approx((0.3, 2.0))
    assert fit.flat(0.05 * 0.2**2) == pytest.approx((0.1, 0.5))
    assert fit.flat(100.0) == (-1, 1)  # never beyond what was fitted


def test_points_off_the_curve_widen_what_is_flat() -> None:
    # What no parabola follows: orthogonal to 1, x and x^2.
    wave = dict(zip((-1, -0.5, 0, 0.5, 1), (-1, 2, 0, -2, 1), strict=True))
    points = [(x, 2.0 + 0.05 * x * x + 0.001 * off) for x, off in wave.items()]
    fit = fit_parabola(points)
    assert fit is not None
    assert fit.x == pytest.approx(0.0)
    assert fit.residual == pytest.approx(0.001 * math.sqrt(10 / 2))
    found = propose([trial(round(2 * x), loss, 50) for x, loss in points], 1, (50,), 50)
    assert found is not None
    assert found.noise == fit.residual
    assert found.flat == pytest.approx([2**x for x in fit.flat(fit.residual)])


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 1.0), (1, 2.0), (2, 3.0)], [(-1, 1.0), (0, 0.9)]])
def test_without_a_minimum_inside_there_is_no_fit(points: list[tuple[float, float]]) -> None:
    assert fit_parabola(points) is None


def test_what_a_seed_does_to_all_rates_is_no_noise_between_them() -> None:
    assert comparison_noise([(1.0, 1.2), (2.0, 2.2), (3.0, 3.2)]) == pytest.approx(0.0)
    assert comparison_noise([(1.0, 1.2), (2.0, 2.0)]) == pytest.approx(0.1)
    assert comparison_noise([(1.0, 1.2)]) is None


def trial(rung: int, loss: float | None, num_steps: int, seed: int = 1) -> Trial:
    return Trial(factor_of(rung), seed, num_steps, (), loss, None, 1.0, None if loss else "stopped")


def test_a_longer_run_gets_the_rate_that_the_least_moves_to() -> None:
    trials = [trial(rung, (rung / 2 - 1.0) ** 2 + 2, 100) for rung in (-2, 0, 2, 4)]
    trials += [trial(rung, (rung / 2 - 0.5) ** 2 + 1, 400) for rung in (-2, -1, 0, 1, 2)]
    found = propose(trials, 1, (100, 400), 1600)
    assert found is not None
    assert found.shift_per_fourfold == pytest.approx(-0.5)
    assert math.log2(found.factor_here) == pytest.approx(0.5)
    assert math.log2(found.factor) == pytest.approx(0.0)
    whole = propose(trials, 1, (100, 400), 400)
    assert whole is not None
    assert whole.factor == whole.factor_here


def test_the_rate_of_longer_runs_never_rises() -> None:
    trials = [trial(rung, (rung / 2) ** 2 + 2, 100) for rung in (-2, 0, 2)]
    trials += [trial(rung, (rung / 2 - 0.5) ** 2 + 1, 400) for rung in (-2, -1, 0, 1, 2)]
    found = propose(trials, 1, (100, 400), 1600)
    assert found is not None
    assert found.shift_per_fourfold == 0
    assert found.factor == found.factor_here


def test_where_runs_show_no_bottom_the_best_of_them_is_taken() -> None:
    found = propose([trial(0, 2.0, 50), trial(-2, 2.5, 50), trial(2, None, 50)], 1, (50,), 50)
    assert found is not None
    assert found.fit is None
    assert found.factor == 1
    assert propose([trial(0, None, 50)], 1, (50,), 50) is None
