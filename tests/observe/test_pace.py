import pytest

from onecard.observe.pace import Pace


def paced(events, num_steps: int = 10, **settings) -> Pace:
    pace = Pace(num_steps, **settings)
    for event in events:
        pace.add(event)
    return pace


def test_nothing_is_promised_before_the_second_step(step_event) -> None:
    assert paced([step_event(1)]).seconds_left is None


def test_the_first_step_of_a_process_does_not_count(step_event) -> None:
    # It compiles for a minute; the others take two seconds each.
    events = [step_event(step, elapsed_s=60.0 + 2 * (step - 1)) for step in range(1, 6)]
    assert paced(events).seconds_left == pytest.approx(5 * 2.0)


def test_a_resumed_run_counts_from_where_it_stands(step_event) -> None:
    events = [step_event(step, elapsed_s=1000.0 + step) for step in (7, 8)]
    assert paced(events).seconds_left == pytest.approx(2.0)


def test_the_time_limit_counts_where_it_comes_first(step_event) -> None:
    events = [step_event(step, elapsed_s=step * 100.0) for step in (1, 2)]
    assert paced(events, max_hours=0.1).seconds_left == pytest.approx(360.0 - 200.0)
    assert paced(events, max_hours=0.01).seconds_left == 0.0


def test_loss_and_speed_are_means_of_the_last_steps(step_event) -> None:
    losses = [9.0, 4.0, 3.0]
    events = [step_event(step, loss=loss, step_s=float(step)) for step, loss in enumerate(losses, start=1)]
    pace = paced(events, window=2)
    assert pace.loss == pytest.approx(3.5)
    assert pace.tokens_per_s == pytest.approx(2000.0)


def test_speed_is_tokens_by_time_not_a_mean_of_rates(step_event) -> None:
    events = [step_event(1, step_s=1.0, tokens_per_s=1000.0), step_event(2, step_s=9.0, tokens_per_s=100.0)]
    assert paced(events).tokens_per_s == pytest.approx(190.0)


def test_the_share_of_the_peak_is_a_mean_over_time_too(step_event) -> None:
    # A step whose time was counted to its neighbour seems impossibly fast.
    events = [step_event(1, step_s=0.9, share_of_peak=0.4), step_event(2, step_s=0.1, share_of_peak=3.4)]
    assert paced(events).share_of_peak == pytest.approx(0.7)
    assert paced([step_event(1)]).share_of_peak is None


def test_refused_updates_are_counted(step_event) -> None:
    assert paced([step_event(1, is_finite=False), step_event(2)]).num_refused == 1
