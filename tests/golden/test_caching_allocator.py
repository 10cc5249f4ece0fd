"""PyTorch's own caching allocator on one random trace, in numbers it gave itself (`source` in the file says how)."""

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.planner.allocator import Allocator, SimulatedOutOfMemory
from onecard.planner.allocator_settings import AllocatorSettings

RECORDED = json.loads(Path(__file__).with_name("caching_allocator.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: f"{run['settings']} {run['cap_bytes']}")
def test_simulation_reserves_what_pytorch_reserved(run: dict[str, Any]) -> None:
    environ = {"PYTORCH_ALLOC_CONF": run["settings"]}
    allocator = Allocator(AllocatorSettings.from_environment(environ, "linux"), run["cap_bytes"])
    handles: dict[int, int] = {}
    reserved = []
    num_failures = 0
    for kind, *values in RECORDED["events"]:
        if kind == "allocate":
            number, num_bytes, stream = values
            try:
                handles[number] = allocator.allocate(num_bytes, stream)
            except SimulatedOutOfMemory:
                num_failures += 1
        elif kind == "empty":
            allocator.empty_cache()
        elif values[0] in handles:
            allocator.free(handles.pop(values[0]))
        reserved.append(allocator.reserved_bytes)
    assert reserved[9::10] == run["reserved_bytes"]
    assert allocator.peak_reserved_bytes == run["peak_reserved_bytes"]
    assert allocator.peak_allocated_bytes == run["peak_allocated_bytes"]
    assert num_failures == run["num_failures"]
