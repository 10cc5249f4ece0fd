"""A plan to what it takes on a card."""

import os
from dataclasses import dataclass

from onecard.hardware import context_bytes, workspace_bytes
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.planner.communication import find_fabric
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.corrections import correct_memory, join, tell_correction, tell_left_out
from onecard.planner.depth import TracedPlan, trace_any_depth, trace_work
from onecard.planner.device import Target
from onecard.planner.efficiency import Efficiencies, default_efficiencies
from onecard.planner.group_time import GroupTime, predict_group_time
from onecard.planner.host_memory import disk_bytes, host_memory
from onecard.planner.outcomes import corrected_efficiencies, count_left_out, memory_factor
from onecard.planner.parts import held_by_rank, share_of
from onecard.planner.replay import Peak
from onecard.planner.rests import stretched_s, with_rests
from onecard.planner.roofline import StepTime, count_milestones, predict_time
from onecard.planner.state_size import least_state
from onecard.planner.trace import Trace
from onecard.spec import Forecast, MemoryForecast, Plan, TimeForecast
from onecard.units import GIB

# How far the reserved peak of a card may lie from the replayed one, down and up. Eager rows published for an A100 came
# out within 1 %, compiled ones 3 to 8 % low; fragments differ from run to run.
_EAGER_BAND = (0.03, 0.04)
_COMPILED_BAND = (0.03, 0.10)
# From two shallow models: within 1.9 % of the whole trace of 30 layers, besides its own band.
_INTERPOLATED_BAND = (0.05, 0.12)
# A compiled step keeps less than an eager one, rarely less than half; with checkpointing it may keep a little more.
_UNCOMPILED_BAND = (0.5, 0.15)
# Beside its own band, where CUDA's own code decides what is held; below, down to what tensors take.
_CLOSED_ALLOCATOR_BAND = 0.15
# Beside its own band, of a rank: never compared with a run. Gathers and sums run in streams of their own, whose blocks
# the allocator keeps apart.
_GROUP_BAND = {"ddp": 0.02, "fsdp": 0.15}
_NOT_COMPILED = "traced without the compiler, so the band is wide"
# cuBLAS on a card the catalogue does not know: the larger of the two sizes.
_UNKNOWN_WORKSPACE_BYTES = 33_554_432
_UNKNOWN_CONTEXT_BYTES = int(0.45 * GIB)
# Kinds that a breakdown tells of even where there is nothing of them at the peak.
_PARTS = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "loss", "workspaces"), 0)


@dataclass(frozen=True)
class Outlook:
    """A forecast with the trace it was made from."""

    forecast: Forecast
    trace: Trace


def forecast(plan: Plan, target: Target, *, may_compile: bool = True) -> Outlook:
    """Predicts memory and time of a plan on a GPU, from a trace of its own step; of several, by what each has of it.

    Seconds for a plan that was not traced before, up to a minute for a compiled one, an instant otherwise. Without
    `may_compile`, and where the compiler cannot be traced, the eager step stands in, with a wider band.
    """
    assert target.capability is not None
    note = _NOT_COMPILED if plan.torch_compile and not may_compile else None
    share = share_of(plan, target.num_ranks)
    eager = share.model_copy(update={"torch_compile": False})
    try:
        found = trace_any_depth(share if may_compile else eager, target.capability)
    except CannotTraceCompiled as error:
        note = f"{_NOT_COMPILED} ({error}); the first seconds of the run will tell"
        found = trace_any_depth(eager, target.capability)
    memory = _memory(plan, target, held_by_rank(found, share, target.num_ranks), note)
    if target.card is not None:
        memory = correct_memory(memory, memory_factor(target.card), count_left_out(target.card)[0])
    time = _time(plan, target, found.trace) if target.card else None
    told = Forecast(
        card=target.name,
        memory=memory,
        time=time,
        is_refined=note is None,
        is_interpolated=found.note is not None,
        group=target.group,
    )
    return Outlook(told, found.trace)


def predict_eager_step_s(plan: Plan, target: Target) -> float | None:
    """Predicts the seconds of a step as `forecast` does without the compiler, for less: it leaves memory aside."""
    assert target.capability is not None
    if target.card is None:
        return None
    share = share_of(plan, target.num_ranks)
    trace = trace_work(share.model_copy(update={"torch_compile": False}), target.capability)
    found, _ = _predict(plan, target, trace, corrected_efficiencies(target.card))
    return stretched_s(found.step_s, plan)


def forecast_state(plan: Plan, target: Target) -> Forecast:
    """Tells of a plan whose weights, gradients and optimizer state alone are too much how much they are, untraced."""
    assert plan.memory_limit_bytes is not None
    parts = least_state(plan, target.num_ranks)
    total, context = sum(parts.values()), _context_bytes(target)
    memory = MemoryForecast(
        fits=total <= plan.memory_limit_bytes,
        limit_bytes=plan.memory_limit_bytes,
        peak_bytes=total,
        peak_low_bytes=total,
        peak_high_bytes=total,
        allocated_bytes=total,
        context_bytes=context,
        breakdown=_PARTS | parts | {"CUDA context": context},
        peak_phase="update",
        phase_bytes={"update": total},
        **host_memory(plan, target.group).told(),
        disk_bytes=disk_bytes(plan),
        note="weights, gradients and optimizer state alone: the step takes more and was not traced",
    )
    return Forecast(card=target.name, memory=memory, time=None, group=target.group)


def uncorrected_memory(plan: Plan, target: Target) -> MemoryForecast:
    """The memory of a plan by its trace alone, without what earlier runs on the card have taught."""
    assert target.capability is not None
    share = share_of(plan, target.num_ranks)
    found = trace_any_depth(share, target.capability)
    return _memory(plan, target, held_by_rank(found, share, target.num_ranks), None)


def _predict(plan: Plan, target: Target, trace: Trace, known: Efficiencies) -> tuple[StepTime, GroupTime | None]:
    """The time of a plan on a card, or on all of a group, from the trace of what one computes."""
    assert target.card is not None
    if target.group is None or target.num_ranks == 1:
        return predict_time(trace, plan, target.card, known), None
    found = predict_group_time(trace, plan, target.card, find_fabric(target.group, target.card), known)
    return found.time, found


def _time(plan: Plan, target: Target, trace: Trace) -> TimeForecast:
    card = target.card
    assert card is not None
    found, of_group = _predict(plan, target, trace, corrected_efficiencies(card))
    num_evaluations, num_saves = count_milestones(plan)
    before, _ = _predict(plan, target, trace, default_efficiencies(card))
    time = TimeForecast(
        step_s=found.step_s,
        step_low_s=found.low_s,
        step_high_s=found.high_s,
        tokens_per_s=found.tokens_per_s,
        total_s=found.total_s,
        evaluation_s=found.evaluation_s,
        num_evaluations=num_evaluations,
        save_s=found.save_s,
        num_saves=num_saves,
        limited_by=found.limited_by,
        share_of_peak=found.share_of_peak,
        energy_wh=found.energy_wh,
        note=join(tell_correction(found.step_s / before.step_s), tell_left_out(count_left_out(card)[1])),
    )
    return with_rests(time if of_group is None else _with_communication(time, target, of_group), plan)


def _with_communication(time: TimeForecast, target: Target, found: GroupTime) -> TimeForecast:
    assert target.group is not None
    assert target.card is not None
    fabric = find_fabric(target.group, target.card)
    return time.model_copy(
        update={
            "communication_s": found.exchange.all_s,
            "exposed_communication_s": found.exchange.exposed_s,
            "efficiency": found.efficiency,
            "note": join(*fabric.remarks, "no run on several GPUs was measured", time.note),
        }
    )


def _memory(plan: Plan, target: Target, traced: TracedPlan, note: str | None) -> MemoryForecast:
    settings = AllocatorSettings.from_environment(os.environ, target.allocator_platform)
    limit = plan.memory_limit_bytes
    assert limit is not None
    workspace = workspace_bytes(target.card) if target.card else _UNKNOWN_WORKSPACE_BYTES
    # Without the cap first: what the run would take if it could.
    peak = traced.replay(workspace, settings)
    fits = peak.reserved_bytes <= limit
    may_collect = settings.garbage_collection_threshold > 0
    if (may_collect or not fits) and (capped := traced.replay(workspace, settings, limit)).fits:
        # Near its limit the allocator gives back what it has cached.
        peak, fits = capped, True
    below, above = (edge + _GROUP_BAND[plan.strategy] * (target.num_ranks > 1) for edge in _band_of(plan, traced, note))
    least_bytes = peak.reserved_bytes
    if settings.is_closed:
        least_bytes, above = peak.allocated_bytes, above + _CLOSED_ALLOCATOR_BAND
    remarks = [note or traced.note, *traced.trace.record.notes, *settings.remarks, target.problem]
    if may_collect and traced.shallow is not None:
        remarks.insert(1, "garbage_collection_threshold is not followed in an interpolated plan")
    return MemoryForecast(
        fits=fits,
        limit_bytes=limit,
        peak_bytes=peak.reserved_bytes,
        peak_low_bytes=int(least_bytes * (1 - below)),
        peak_high_bytes=int(peak.reserved_bytes * (1 + above)),
        allocated_bytes=peak.allocated_bytes,
        context_bytes=_context_bytes(target),
        breakdown=_breakdown(peak) | {"CUDA context": _context_bytes(target)},
        peak_phase=peak.phase,
        phase_bytes=peak.phase_bytes,
        **host_memory(plan, target.group, traced.trace.record.host_bytes).told(),
        disk_bytes=disk_bytes(plan),
        note=join(*remarks),
    )


def _context_bytes(target: Target) -> int:
    return context_bytes(target.card, target.host) if target.card else _UNKNOWN_CONTEXT_BYTES


def _band_of(plan: Plan, traced: TracedPlan, note: str | None) -> tuple[float, float]:
    if not plan.torch_compile:
        return _EAGER_BAND if traced.note is None else _INTERPOLATED_BAND
    if note is not None:
        return _UNCOMPILED_BAND
    return _COMPILED_BAND if traced.note is None else _INTERPOLATED_BAND


def _breakdown(peak: Peak) -> dict[str, int]:
    """Parts of the reserved peak, largest kinds first; what the allocator holds beyond tensors is its slack."""
    parts = dict(sorted((_PARTS | peak.parts).items(), key=lambda part: -part[1]))
    return parts | {"allocator slack": max(0, peak.reserved_bytes - sum(parts.values()))}
