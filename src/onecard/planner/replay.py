"""From a trace to the memory a card must offer: its storages through the allocator, and what they were at the peak.

resident ─► cuBLAS workspaces ─► step, step, step ─► evaluation ─► step
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from onecard.planner.allocator import Allocator, SimulatedOutOfMemory
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.planner.recorder import Record
from onecard.planner.trace import Trace

# Fragments settle after the first steps; later ones find the segments of earlier ones.
_NUM_STEPS = 3
# What has no other name is called by the phase that made it: what a backward pass makes is recomputed activations and
# gradients on their way to others.
_PART_OF_PHASE = {"forward": "activations"}
# Autograd runs the backward pass on a thread of its own, with a cuBLAS handle of its own.
_NUM_WORKSPACES = 2


@dataclass(frozen=True)
class Peak:
    """The most a run takes from the allocator. `phase` is where; `parts` are bytes of each kind at the fullest moment.

    `reserved_bytes` is what the allocator holds of the card, `allocated_bytes` what tensors hold of that, and
    `phase_bytes` and `parts_of_phases` the fullest moment of each phase. `fits` is false where the cap was reached.
    """

    reserved_bytes: int
    allocated_bytes: int
    phase: str
    parts: dict[str, int]
    phase_bytes: dict[str, int]
    parts_of_phases: dict[str, dict[str, int]]
    fits: bool


def replay(
    trace: Trace, workspace_bytes: int, settings: AllocatorSettings | None = None, cap_bytes: int | None = None
) -> Peak:
    """Runs a trace through the allocator of a card that offers `cap_bytes`; `workspace_bytes` are per cuBLAS handle."""
    allocator = Allocator(settings, cap_bytes)
    moments = _fullest_moments(trace)
    phase_bytes = {phase: live_bytes for phase, (live_bytes, _) in moments.items()}
    phase = max(phase_bytes, key=phase_bytes.__getitem__)
    workspaces = {"workspaces": _NUM_WORKSPACES * workspace_bytes}
    parts = {name: _parts_at(trace.record, moment) | workspaces for name, (_, moment) in moments.items()}
    fits = True
    try:
        _run(trace, allocator, workspace_bytes)
    except SimulatedOutOfMemory:
        fits = False
    return Peak(
        reserved_bytes=allocator.peak_reserved_bytes,
        allocated_bytes=allocator.peak_allocated_bytes,
        phase=phase,
        parts=parts[phase],
        phase_bytes=phase_bytes,
        parts_of_phases=parts,
        fits=fits,
    )


def _run(trace: Trace, allocator: Allocator, workspace_bytes: int) -> None:
    record, handles = trace.record, dict[int, int]()

    def follow(order: Iterable[int]) -> None:
        for number in order:
            if number >= 0:
                handles[number] = allocator.allocate(record.sizes[number])
            else:
                allocator.free(handles.pop(~number))

    step = record.order[trace.resident_end : trace.step_end]
    follow(record.order[: trace.resident_end])
    for _ in range(_NUM_WORKSPACES):
        allocator.allocate(workspace_bytes)
    for _ in range(_NUM_STEPS):
        follow(step)
    follow(record.order[trace.step_end :])
    follow(step)


def _fullest_moments(trace: Trace) -> dict[str, tuple[int, int]]:
    """Bytes of tensors at the fullest moment of each phase, and the last place in the order where that is."""
    record, live_bytes = trace.record, 0
    found: dict[str, tuple[int, int]] = {}
    for moment, number in enumerate(record.order):
        if number < 0:
            live_bytes -= record.sizes[~number]
            continue
        live_bytes += record.sizes[number]
        phase = record.phases[number] if moment >= trace.resident_end else "resident"
        if live_bytes >= found.get(phase, (0, 0))[0]:
            found[phase] = (live_bytes, moment)
    return found


def _parts_at(record: Record, moment: int) -> dict[str, int]:
    """Bytes of each kind of tensor that is there at a place in the order."""
    live = set[int]()
    for number in record.order[: moment + 1]:
        live.add(number) if number >= 0 else live.remove(~number)
    parts: Counter[str] = Counter()
    for number in live:
        label = record.labels.get(number) or _PART_OF_PHASE.get(record.phases[number], record.phases[number])
        parts[label] += record.sizes[number]
    return dict(parts)
