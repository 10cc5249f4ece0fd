"""Curves over a common axis, and their picture in characters."""

import pytest

from onecard.report.curves import find_curves
from onecard.report.plot import draw, frame_of
from onecard.report.record import read_runs


@pytest.mark.parametrize(("over", "last"), [("tokens", 2560), ("steps", 20), ("time", 10.0)])
def test_each_axis_has_its_unit(write_run, over, last) -> None:
    runs = read_runs([write_run("a", [3.0, 2.5]), write_run("b", [2.0, 1.5])])
    curves = find_curves(runs, over, "loss")
    assert (curves.of, curves.points[1][-1]) == ("held-out loss", (last, 1.5))
    assert find_curves(runs, over, "bits_per_byte").points[1][-1] == (last, 0.75)


def test_without_evaluations_the_training_loss_is_shown(write_run) -> None:
    runs = read_runs([write_run("a", [3.0]), write_run("b", [2.0])])
    assert find_curves(runs, "steps", "loss").of == "training loss"
    curves = find_curves(runs, "steps", "loss", "heldout")
    assert (curves.of, curves.points) == ("held-out loss", (((10, 3.0),), ((10, 2.0),)))


def test_a_long_training_loss_is_averaged(write_run) -> None:
    runs = read_runs([write_run("a", [3.0] * 100)])
    (points,) = find_curves(runs, "steps", "loss", "train").points
    assert (len(points), points[0]) == (100, (5.5, pytest.approx(3.945)))


def picture(curves, width=20, height=5, *, dots=False) -> list[str]:
    frame = frame_of(curves)
    return ["".join(text for text, _ in line) for line in draw(curves, "ABC", frame, (width, height), dots=dots)]


def test_curves_are_drawn_by_their_letters() -> None:
    falling, level = [(10, 4.0), (100, 0.0)], [(10, 0.0), (100, 0.0)]
    lines = picture([falling, level])
    assert [len(line) for line in lines] == [20] * 5
    columns = [column for line in lines for column, character in enumerate(line) if character == "A"]
    assert columns == sorted(columns)
    assert ("A" in lines[0], "A" in lines[3], "B" * 10 in lines[4]) == (True, True, True)
    assert not any("B" in line for line in lines[:4])


def test_curves_that_lie_on_each_other_take_turns() -> None:
    curve = [(0, 1.0), (100, 1.0)]
    (line,) = [line for line in picture([curve, curve]) if line.strip()]
    assert line == "AB" * 10


def test_dots_hold_eight_in_a_character() -> None:
    lines = picture([[(0, 1.0), (100, 0.0)]], dots=True)
    assert all(character == " " or 0x2800 < ord(character) < 0x2900 for line in lines for character in line)
    assert sum(character != " " for line in lines for character in line) <= 2 * 20


def test_the_fall_at_the_start_does_not_flatten_the_rest() -> None:
    curve = [(0.0, 1000.0), *((float(x), 2 - x / 100) for x in range(10, 101))]
    assert frame_of([curve]).top < 3


def test_a_run_that_diverges_does_not_flatten_the_others() -> None:
    good = [(float(x), 3 - x / 100) for x in range(1, 101)]
    frame = frame_of([good, [*good[:50], *((float(x), 1e30) for x in range(51, 54))]])
    assert frame.top < 4
    assert any("A" in line for line in picture([good]))
    assert draw([[(1.0, 2.0), (2.0, 1e30)]], "A", frame, (20, 5), dots=True)  # and does not take 1e30 dots


@pytest.mark.parametrize("curve", [[], [(0.0, 1.0)], [(5.0, 1.0)]])
def test_little_to_draw_is_drawn(curve) -> None:
    frame = frame_of([curve])
    assert (frame is None) == (not curve)
    if frame is not None:
        assert sum(line.count("A") for line in picture([curve])) >= 1
