"""A trace through the allocator: what stays, what a step adds, and what it was at the fullest moment."""

import pytest

from onecard.planner.recorder import Record
from onecard.planner.replay import replay
from onecard.planner.trace import Trace

MIB = 2**20


def trace_of(*, resident: list[int], step: list[tuple[int, str]], evaluation: int = 0) -> Trace:
    """Storages in MiB: those that stay, those of a step, released in turn, and one of an evaluation."""
    record = Record(sizes=[size * MIB for size in resident], phases=["start"] * len(resident))
    record.order = list(range(len(resident)))
    record.labels = dict.fromkeys(record.order, "weights")
    step_start = len(record.order)

    def add(size: int, phase: str) -> int:
        record.sizes.append(size * MIB)
        record.phases.append(phase)
        record.order.append(len(record.sizes) - 1)
        return record.order[-1]

    alive = [add(size, phase) for size, phase in step]
    record.order += [~number for number in reversed(alive)]
    step_end = len(record.order)
    if evaluation:
        record.order.append(~add(evaluation, "evaluation"))
    return Trace(record, step_start, step_end, 1)


def test_the_peak_is_that_of_the_fullest_moment() -> None:
    peak = replay(trace_of(resident=[64, 32], step=[(40, "forward"), (24, "loss"), (50, "backward")]), 8 * MIB)
    assert peak.fits
    assert peak.phase == "backward"
    assert {part: size // MIB for part, size in peak.parts.items()} == {
        "weights": 96,
        "activations": 40,
        "loss": 24,
        "backward": 50,
        "workspaces": 16,
    }
    assert peak.allocated_bytes == (96 + 114 + 16) * MIB
    # Two workspaces share a segment of 20 MiB.
    assert peak.reserved_bytes == (96 + 114 + 20) * MIB
    assert {phase: size // MIB for phase, size in peak.phase_bytes.items()} == {
        "resident": 96,
        "forward": 136,
        "loss": 160,
        "backward": 210,
    }


def test_evaluation_may_be_the_fullest() -> None:
    peak = replay(trace_of(resident=[64], step=[(40, "forward")], evaluation=200), 0)
    assert (peak.phase, peak.parts["evaluation"]) == ("evaluation", 200 * MIB)


def test_steps_reuse_what_earlier_ones_freed() -> None:
    peak = replay(trace_of(resident=[64], step=[(40, "forward"), (30, "backward")]), 0)
    assert peak.reserved_bytes == (64 + 70) * MIB


@pytest.mark.parametrize(("cap", "fits"), [(134, True), (133, False)])
def test_a_cap_decides(cap: int, fits: bool) -> None:
    trace = trace_of(resident=[64], step=[(40, "forward"), (30, "backward")])
    assert replay(trace, 0, cap_bytes=cap * MIB).fits is fits
