"""Preparation says how far it is, how fast, and how long it will take."""

import io

import pytest

from onecard.cli.preparation import PreparationProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("onecard.cli.preparation.time", clock)
    return clock


def test_lines_are_few_and_tell_count_rate_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with PreparationProgress(stream) as progress:
        for tenth in range(301):
            clock.now_s = 100.0 + tenth / 10
            progress("preparing chats", 1000 * tenth, 600_000)
        progress("tokenizing", 0, None)
        clock.now_s += 20
        progress("tokenizing", 40 << 20, 80 << 20)
        clock.now_s += 20
        progress("tokenizing", 60 << 20, None)
    assert stream.getvalue().splitlines() == [
        "preparing chats ...",
        "preparing chats: 100.0K of about 600.0K conversations, 10.0K/s, 0:50 left",
        "preparing chats: 200.0K of about 600.0K conversations, 10.0K/s, 0:40 left",
        "preparing chats: 300.0K of about 600.0K conversations, 10.0K/s, 0:30 left",
        "tokenizing ...",
        "tokenizing: 40.0 MiB of 80.0 MiB, 2.0 MiB/s, 0:20 left",
        "tokenizing: 60.0 MiB, 1.5 MiB/s",
    ]


def test_a_terminal_gets_a_bar_with_the_same_words(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    with PreparationProgress(stream) as progress:
        progress("preparing chats", 0, 2000)
        clock.now_s += 1
        progress("preparing chats", 500, 2000)
    assert "500 of about 2.00K conversations, 500/s, 0:03 left" in stream.getvalue()
