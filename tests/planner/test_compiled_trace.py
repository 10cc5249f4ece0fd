"""A compiled plan is traced without a card: the compiler's own program, seen allocation by allocation."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from onecard.planner import compiled
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.trace import Trace, trace_plan
from onecard.spec import AdaptPlan, Plan

AMPERE = (8, 0)
# The compiler's modules warn of each other when they are imported first.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(scope="module")
def trace_of() -> Callable[[str], Trace]:
    return cache(lambda plan: trace_plan(Plan.model_validate_json(plan), AMPERE))


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan], settings_of: Callable[..., dict[str, Any]]) -> Plan:
    """One layer whose activations weigh more than its vocabulary and the scratch of its attention."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 128}
    plan = tiny_plan("llama", optimizer="adamw", precision="bf16", micro_batch_size=16, total_batch_size=32)
    model = plan.model.model_copy(update={"settings": settings_of("llama", **sizes), "dropout": 0.1})
    return plan.model_copy(update={"model": model, "max_seq_length": 128})


@pytest.fixture
def traces(plan: Plan, trace_of: Callable[[str], Trace]) -> tuple[Trace, Trace]:
    """The same step, eager and compiled."""
    eager, compiled = (plan.model_copy(update={"torch_compile": value}) for value in (False, True))
    return trace_of(eager.model_dump_json()), trace_of(compiled.model_dump_json())


def test_resident_part_and_batch_are_those_of_the_eager_trace(traces: tuple[Trace, Trace]) -> None:
    eager, compiled = traces
    assert compiled.resident_end == eager.resident_end
    assert compiled.num_micro_batches == eager.num_micro_batches == 2
    assert _resident_sizes(compiled) == _resident_sizes(eager)


def test_fusion_needs_less_memory_than_eager(traces: tuple[Trace, Trace]) -> None:
    eager, compiled = traces
    assert _peak_bytes(compiled, "forward", "backward") < 0.9 * _peak_bytes(eager, "forward", "backward")


def test_nothing_but_the_answer_of_a_step_stays(traces: tuple[Trace, Trace]) -> None:
    eager, compiled = traces
    assert _kept_bytes(compiled) == _kept_bytes(eager) <= 16


def test_gradients_are_labelled(traces: tuple[Trace, Trace]) -> None:
    eager, compiled = traces
    assert _labelled_bytes(compiled, "gradients") == _labelled_bytes(eager, "gradients") > 0


def test_matrix_products_are_counted_as_eager_and_the_rest_is_fused(traces: tuple[Trace, Trace]) -> None:
    eager, compiled = traces
    assert _flops(compiled) == _flops(eager) > 0
    kernels = {(work.phase, work.num_calls > 0, work.num_bytes > 0) for work in _fused(compiled)}
    assert kernels == {("forward", True, True), ("backward", True, True)}
    assert not _fused(eager)


def test_a_mask_is_not_written_out_for_every_head(plan: Plan, traces: tuple[Trace, Trace]) -> None:
    num_scores = plan.micro_batch_size * plan.max_seq_length**2
    record = traces[1].record
    largest_bytes = max(record.sizes[number] for number in record.order[traces[1].resident_end : traces[1].step_end])
    assert largest_bytes < 4 * num_scores * 2


def test_checkpointing_keeps_less_for_the_backward_pass(plan: Plan, trace_of: Callable[[str], Trace]) -> None:
    plan = plan.model_copy(update={"torch_compile": True})
    kept, recomputed = (
        trace_of(plan.model_copy(update={"gradient_checkpointing": value}).model_dump_json()) for value in (False, True)
    )
    assert _peak_bytes(recomputed, "loss") < 0.9 * _peak_bytes(kept, "loss")
    assert _kept_bytes(recomputed) == _kept_bytes(kept)


@pytest.mark.parametrize("learned_tokens", [(), (3, 5)], ids=["adapters alone", "tokens beside"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_traced_compiled(method: str, learned_tokens: tuple[int, ...], plan: Plan) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = plan.model.model_copy(update={"learned_tokens": learned_tokens})
    adapt = AdaptPlan(method=method, r=8)  # narrower ones would be padded to 8
    eager, compiled = (
        trace_plan(plan.model_copy(update={"model": model, "adapt": adapt, "torch_compile": value}), AMPERE)
        for value in (False, True)
    )
    assert _resident_sizes(compiled) == _resident_sizes(eager)
    assert _flops(compiled) == _flops(eager) > 0
    assert _kept_bytes(compiled) == _kept_bytes(eager)


@pytest.mark.parametrize("missing", ["torch.utils._triton.triton_hash_with_backend", "version"])
def test_an_unknown_compiler_is_refused(missing: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "version":
        monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    else:
        monkeypatch.delattr(missing)
    with pytest.raises(CannotTraceCompiled, match="the compiler of PyTorch"):
        trace_plan(plan.model_copy(update={"torch_compile": True}), AMPERE)


def test_a_failing_compiler_is_a_result(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("buf0")

    monkeypatch.setattr(compiled, "_load", fail)
    with pytest.raises(CannotTraceCompiled, match="failed"):
        trace_plan(plan.model_copy(update={"torch_compile": True}), AMPERE)


def _resident_sizes(trace: Trace) -> list[int]:
    return [trace.record.sizes[number] for number in trace.record.order[: trace.resident_end]]


def _peak_bytes(trace: Trace, *phases: str) -> int:
    record, live_bytes, peak_bytes = trace.record, 0, 0
    for number in record.order[trace.resident_end : trace.step_end]:
        live_bytes += record.sizes[number] if number >= 0 else -record.sizes[~number]
        if number >= 0 and record.phases[number] in phases:
            peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def _kept_bytes(trace: Trace) -> int:
    step = trace.record.order[trace.resident_end : trace.step_end]
    return sum(trace.record.sizes[number] if number >= 0 else -trace.record.sizes[~number] for number in step)


def _labelled_bytes(trace: Trace, label: str) -> int:
    return sum(trace.record.sizes[number] for number, value in trace.record.labels.items() if value == label)


def _flops(trace: Trace) -> int:
    return sum(work.flops for work in trace.record.work)


def _fused(trace: Trace) -> list:
    return [work for work in trace.record.work if work.name == "fused"]


def test_work_is_counted_for_the_micro_batches_of_the_step_alone(traces: tuple[Trace, Trace]) -> None:
    for trace in traces:
        numbers = {work.micro_batch for work in trace.record.work if work.phase in ("forward", "backward")}
        assert numbers == {1, 2}
    calls = {(work.micro_batch, work.phase): 0 for work in traces[1].record.work if work.name == "fused"}
    assert set(calls) == {(1, "forward"), (2, "forward"), (1, "backward"), (2, "backward")}
