"""A deep compiled model from two shallow ones: equal to its own trace where only layers are added."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.planner import depth
from onecard.planner.depth import TracedPlan, shallow_plans, trace_any_depth, trace_work
from onecard.planner.recorder import Record, Work
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import trace_cached
from onecard.spec import Plan

AMPERE = (8, 0)
MIB = 2**20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plan_of(tiny_plan: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Plan]:
    def make(name: str = "llama", num_layers: int = 20, **changes: Any) -> Plan:
        settings = settings_of(name, num_hidden_layers=num_layers, max_position_embeddings=64)
        plan = tiny_plan(
            name, optimizer="muon", precision="bf16", max_seq_length=64, micro_batch_size=4, total_batch_size=8
        )
        total, matrices = depth.count_parameters(settings)
        counts = {"settings": settings, "num_parameters": total, "num_matrix_parameters": matrices, "dropout": 0.1}
        model = plan.model.model_copy(update=counts)
        return plan.model_copy(update={"model": model, "torch_compile": True} | changes)

    return make


def make_trace(num_layers: int, *, is_compiled: bool, share: float = 0.0) -> Trace:
    """A step in which each layer has a weight, keeps something for its backward pass and updates the weight.

    The first layers, this share of all, keep little and compute it again.
    """
    record = Record()
    num_recomputed = round(share * num_layers)

    def add(num_bytes: int, phase: str, label: str | None = None) -> int:
        record.sizes.append(num_bytes)
        record.phases.append(phase)
        record.order.append(len(record.sizes) - 1)
        if label:
            record.labels[record.order[-1]] = label
        return record.order[-1]

    kept_bytes = 30 * MIB if is_compiled else 100 * MIB
    add(50 * MIB, "start", "weights")
    for _ in range(num_layers):
        add(10 * MIB, "start", "weights")
    resident_end = len(record.order)
    kept = [add(2 * MIB if number < num_recomputed else kept_bytes, "forward") for number in range(num_layers)]
    record.order.append(~add(70 * MIB, "loss"))
    for number in reversed(kept):
        record.order += [~add(5 * MIB, "backward"), ~number]
    # Muon's products are of all layers at once, so their shape tells the depth.
    record.order.append(~add(20 * MIB * num_layers, "update"))
    step_end = len(record.order)
    record.order.append(~add(15 * MIB, "evaluation"))
    name = "fused" if is_compiled else "gelu"
    record.work = [
        Work(name, "forward", (8, 8), "bfloat16", num_layers, 7 * num_layers, MIB * (2 + num_layers), 1),
        # Grows past what may be neglected between the two depths that are traced.
        Work("add_", "backward", (64,), "float32", num_layers, 0, 1200 * num_layers, 1),
        Work("randint", "forward", (2 * num_layers,), "int64", 1, 0, 16 * num_layers, 1),
        Work("bmm", "update", (num_layers, 8, 8, 8), "bfloat16", 3, 5 * num_layers, MIB * num_layers, 1),
    ]
    if num_recomputed:
        record.work.append(Work("again", "backward", (8, 8), "bfloat16", num_recomputed, 3 * num_recomputed, MIB, 1))
    return Trace(record, resident_end, step_end, 1)


@pytest.fixture
def traced_depths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Depths that were traced, and whether compiled; traces are those of `make_trace`."""
    seen: list[tuple[int, bool]] = []

    def trace(plan: Plan, _: tuple[int, int]) -> Trace:
        seen.append((depth.num_layers_of(plan.model.settings), plan.torch_compile))
        return make_trace(seen[-1][0], is_compiled=plan.torch_compile, share=plan.gradient_checkpointing)

    monkeypatch.setattr(depth, "trace_cached", trace)
    return seen


def test_every_phase_and_all_work_are_those_of_the_whole_trace(
    plan_of: Callable[..., Plan], traced_depths: list[tuple[int, bool]]
) -> None:
    found = trace_any_depth(plan_of(), AMPERE)
    assert traced_depths == [(3, True), (4, True), (20, False)]
    assert found.note == "interpolated from 3 and 4 of its 20 layers"
    whole = make_trace(20, is_compiled=True)
    deep, own = found.replay(MIB), TracedPlan(whole).replay(MIB)
    # What the allocator holds beyond tensors is no line.
    assert deep == replace(own, reserved_bytes=deep.reserved_bytes)
    assert deep.reserved_bytes >= deep.allocated_bytes
    assert found.replay(MIB, cap_bytes=deep.reserved_bytes).fits
    assert not found.replay(MIB, cap_bytes=deep.reserved_bytes - 1).fits
    expected = [work for work in whole.record.work if work.name != "randint"]
    assert found.trace.record.work == expected


def test_a_share_of_recomputing_layers_lies_between_none_and_all(
    plan_of: Callable[..., Plan], traced_depths: list[tuple[int, bool]]
) -> None:
    found = trace_any_depth(plan_of(gradient_checkpointing=0.25), AMPERE)
    assert sorted(traced_depths) == [(3, True), (3, True), (4, True), (4, True), (20, False), (20, False)]
    assert found.note == "interpolated from 3 and 4 of its 20 layers, none and all of them recomputing"
    whole = make_trace(20, is_compiled=True, share=0.25)
    deep, own = found.replay(MIB), TracedPlan(whole).replay(MIB)
    assert deep.phase_bytes == own.phase_bytes
    assert deep.phase == own.phase
    assert {name: size for name, size in deep.parts.items() if size} == own.parts
    assert not found.replay(MIB, cap_bytes=deep.reserved_bytes - 1).fits
    for name in ("num_calls", "flops"):
        totals = [
            sum(getattr(work, name) for work in one.record.work if work.name != "randint")
            for one in (found.trace, whole)
        ]
        assert totals[0] == totals[1]


def test_the_fullest_phase_may_be_one_that_is_not_compiled(
    plan_of: Callable[..., Plan], traced_depths: list[tuple[int, bool]]
) -> None:
    # 20 MiB for each layer at once outweigh 30 that are kept, once there are enough of them and a bigger update.
    found = trace_any_depth(plan_of(num_layers=20), AMPERE)
    peak = found.replay(MIB)
    assert peak.phase_bytes["update"] == (50 + 20 * 10 + 20 * 20) * MIB
    assert peak.phase_bytes["evaluation"] == (50 + 20 * 10 + 15) * MIB
    assert traced_depths


def test_kernels_of_other_shapes_ask_for_the_whole_trace(
    plan_of: Callable[..., Plan], traced_depths: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "_NEGLIGIBLE_BYTES", 0)
    assert trace_any_depth(plan_of(), AMPERE).note is None
    assert traced_depths[-1] == (20, True)


@pytest.mark.parametrize(
    "changes",
    [{"torch_compile": False}, {"num_layers": 12}, {"has_windows": True}, {"is_uneven": True}],
    ids=["eager", "shallow", "several kinds of layers", "layers of other sizes"],
)
def test_what_is_not_on_a_line_is_traced_whole(plan_of: Callable[..., Plan], changes: dict[str, Any]) -> None:
    is_uneven = changes.pop("is_uneven", False)
    if changes.pop("has_windows", False):
        plan = plan_of("qwen3")
        kinds = ["full_attention", "sliding_attention"] * 10
        settings = plan.model.settings | {"layer_types": kinds, "sliding_window": 8}
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"settings": settings})})
    else:
        plan = plan_of(**changes)
    if is_uneven:
        more = plan.model.num_parameters + 1
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"num_parameters": more})})
    assert shallow_plans(plan) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_shallow_plans_have_fewer_layers_and_are_shared_by_all_depths(plan_of: Callable[..., Plan], name: str) -> None:
    pairs = [shallow_plans(plan_of(name, num_layers)) for num_layers in (15, 19)]
    assert pairs[0] is not None
    assert pairs[0] == pairs[1]
    assert [depth.num_layers_of(plan.model.settings) for plan in pairs[0]] == [3, 4]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_deep_step_computes_is_known_from_shallow_ones(
    name: str, gradient_checkpointing: bool, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(name, 14, torch_compile=False, gradient_checkpointing=gradient_checkpointing)
    plan = plan.model_copy(update={"optimizer": plan.optimizer.model_copy(update={"name": "adamw"})})
    traced: list[int] = []

    def watch(one: Plan, capability: tuple[int, int]) -> Trace:
        traced.append(depth.num_layers_of(one.model.settings))
        return trace_cached(one, capability)

    monkeypatch.setattr(depth, "trace_cached", watch)
    found, whole = trace_work(plan, AMPERE), trace_cached(plan, AMPERE)
    assert traced == [3, 4]

    def amounts(trace: Trace) -> dict[Any, Any]:
        work = [one for one in trace.record.work if one.phase in depth._PHASES_OF_STEP]
        # What is one number for each parameter is of another length at each depth, and next to nothing.
        return {depth._key(one): (one.num_calls, one.flops, one.num_bytes) for one in work if one.num_bytes > 4096}

    assert amounts(found) == amounts(whole)
    # What has been traced is taken as it is, and Muon's step is.
    trace_cached(plan.model_copy(update={"sample_prompts": ()}), AMPERE)
    traced.clear()
    trace_work(plan, AMPERE)
    trace_work(plan_of(name, 14, torch_compile=False), AMPERE)
    assert traced == [14, 14]
