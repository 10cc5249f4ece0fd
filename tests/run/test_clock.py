"""Seconds of training go on while the machine is awake, and across resumes."""

import ctypes
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from onecard.run.clock import Clock


def test_it_goes_on_from_where_it_stood_and_can_be_stopped() -> None:
    clock = Clock(100.0)
    with clock.stopped():
        time.sleep(0.2)
    assert 100.0 <= clock() < 100.2


def test_a_night_asleep_does_not_count_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    awake_s = 1000.0

    def ask(ticks: Any) -> int:
        ticks._obj.value = int(awake_s * 1e7)
        return 1

    monkeypatch.setattr(sys, "platform", "win32")
    kernel = SimpleNamespace(QueryUnbiasedInterruptTime=ask)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    clock = Clock(5.0)
    awake_s += 2.0
    # What Windows' own counter says after eight hours of sleep.
    monkeypatch.setattr(time, "perf_counter", lambda: 30_000.0)
    assert clock() == pytest.approx(7.0)
