"""The learning rate over a run."""

import math
from pathlib import Path

import pytest

from onecard.errors import InputError
from onecard.spec import SchedulePlan
from onecard.training.schedule import find_shape, rate_at


def rates(name: str, *, steps: int = 100, warmup: int = 10, decay: int = 90, minimum: float = 0.0) -> list[float]:
    plan = SchedulePlan(
        name=name, num_steps=steps, num_warmup_steps=warmup, num_decay_steps=decay, min_lr_ratio=minimum
    )
    return [rate_at(plan, step) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_evenly_to_the_peak(name: str) -> None:
    found = rates(name, minimum=0.3)
    assert found[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert found[10] == pytest.approx(1.0)
    assert max(found) <= 1.0


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert rates("cosine", warmup=0, decay=100)[0] == 1.0


def test_cosine_and_linear_end_near_the_minimum() -> None:
    cosine, linear = rates("cosine", minimum=0.1), rates("linear", minimum=0.1)
    assert cosine[55] == pytest.approx(0.55)
    assert linear[55] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert linear[-1] == pytest.approx(0.1 + 0.9 / 90)
    assert cosine[10:] == sorted(cosine[10:], reverse=True)


def test_wsd_is_flat_and_then_falls_over_its_last_part() -> None:
    found = rates("wsd", decay=40, minimum=0.2)
    assert found[10:61] == pytest.approx([1.0] * 51)
    assert found[61:] == pytest.approx([0.2 + 0.8 * (40 - fallen) / 40 for fallen in range(1, 40)])


def test_constant_stays() -> None:
    assert set(rates("constant")[10:]) == {1.0}


def test_a_warmup_as_long_as_the_run_is_all_of_it() -> None:
    assert rates("wsd", steps=10, warmup=10, decay=0)[-1] == 1.0


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def square(progress):\n    return (1 - progress) ** 2\n\nvalue = 3\n\ndef lost(progress):\n    pass\n"
    (tmp_path / "own_schedule.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert rates("own_schedule:square")[55] == pytest.approx(0.25)
    for name in ("own_schedule:circle", "own_schedule:value", "own_schedule:lost", "own_schedule"):
        with pytest.raises(InputError, match=f"lr_scheduler_type '{name}' cannot be used"):
            find_shape(name)


@pytest.mark.parametrize("name", ["cosin", "no.such.module:function", ":square", ""])
def test_an_unknown_schedule_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"Give wsd, constant, linear, cosine, or module:function"):
        find_shape(name)
