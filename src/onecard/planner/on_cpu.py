"""A plan on this machine's CPU: what its own step holds beside the process, and a step that was timed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from onecard.errors import DoesNotFitError
from onecard.hardware import Machine
from onecard.planner.depth import TracedPlan
from onecard.planner.host_memory import HostMemory, copy_bytes, disk_bytes
from onecard.planner.measure import measure_step
from onecard.planner.parts import held_by_rank, share_of
from onecard.planner.replay import replay
from onecard.planner.rests import stretched_s, with_rests
from onecard.planner.roofline import (
    SAVE_BYTES_PER_S,
    count_milestones,
    evaluation_share,
    num_eval_batches,
    resident_bytes,
)
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import CannotTrace, trace_cached
from onecard.spec import CardGroup, Forecast, MemoryForecast, Plan, TimeForecast
from onecard.units import GIB, KIB, format_bytes

# Tensors are known to the byte; what malloc and the kernels hold beside them is not: 39 to 47 % in three runs (LOG.md).
_BESIDE_TENSORS = 0.4
# Of a rank with its part of the state: what gathers and sums leave in malloc's arenas, one of them for each thread of
# gloo, grows with the whole weights: 3.1 to 4.8 times their bytes, 65M and 100M parameters on two and four ranks
# (LOG.md). The first one gathers checkpoints, 3 times those bytes at most, into it.
_BESIDE_PARTS = 4.0
_MEMORY_BAND = (0.15, 0.2)
# In 16 bits kernels are made for every shape, and chats are of many lengths: 430 MiB after 200 steps (LOG.md).
_KERNELS_OF_SHAPES_BYTES = GIB // 2
# Share of a large matrix product's speed that a step reaches: guess and range, for steps that take too long to try.
_SHARE_OF_PEAK = 0.4
_SHARES_OF_PEAK = (0.15, 0.8)
_SINGLE_BYTES = 4
# A step that is expected to take longer than this is not tried.
_LONGEST_TRIED_S = 1.0
_TRIAL_BUDGET_S = 1.5
# Of a step that was tried: clocks, neighbours, lengths of rows.
_TIME_BAND = (0.8, 1.4)
# What compiling gains on a CPU at most, by what was measured (1.1 to 1.3).
_COMPILED_SHARE = 0.7
# A step is a forward pass and a backward pass of twice its arithmetic.
_EVALUATION_SHARE = 1 / 3


def loaded_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_process_bytes() -> int:
    """The most memory this process has held so far, preparation included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    from resource import RUSAGE_SELF, getrusage

    # In KiB on Linux, in bytes on macOS.
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)


def forecast_on_cpu(plan: Plan, machine: Machine, process_bytes: int, group: CardGroup | None = None) -> Plan:
    """Adds memory and time to a plan for this machine's CPU; a plan whose step cannot be traced stays as it is.

    Of a `group` of processes memory is that of the one that leads, which writes checkpoints, and its limit what the
    others of its machine leave it; they share its cores, too. What they take to tell one another is not known, so time
    is without it.

    `process_bytes` are those of `loaded_bytes` when the machine's free memory was read. Takes about three seconds: a
    trace, and a few steps if they are short.

    Raises:
        DoesNotFitError: it needs more memory than is free; says which micro-batch would not.
    """
    num_ranks = 1 if group is None else group.num
    num_local = 1 if group is None else min(num_ranks, group.per_machine or num_ranks)
    # What this process holds is not free any more, and is in the peak.
    total_bytes = machine.free_ram_bytes + process_bytes
    share = share_of(plan, num_ranks)
    try:
        trace = _trace(share)
    except CannotTrace as error:
        reason = f"the step cannot be traced ({error}), so memory and time are not known"
        return plan.model_copy(update={"reasons": plan.reasons | {"forecast": reason}})
    # What the trace and the text brought along stays for the run.
    here = _Here(total_bytes, max(process_bytes, loaded_bytes()), num_ranks, num_local)
    memory = _memory(plan, trace, here)
    with _fewer_threads(num_local):
        time = _time(share, trace)
    if group is not None:
        time = _of_group(time, plan, share, num_ranks)
    forecast = Forecast(card="CPU", memory=memory, time=time, group=group)
    made = plan.model_copy(update={"forecast": forecast})
    if not memory.fits:
        raise _does_not_fit(made, here)
    return made


@dataclass(frozen=True)
class _Here:
    """What the `num_local` processes of this machine may take together, and what each takes before it holds a model."""

    total_bytes: int
    process_bytes: int
    num_ranks: int
    num_local: int


@contextmanager
def _fewer_threads(num_local: int) -> Iterator[None]:
    """Lets this process compute with its share of the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_local))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_group(time: TimeForecast, plan: Plan, share: Plan, num_ranks: int) -> TimeForecast:
    """The time of all processes together, from that of the one with the most to do."""
    more = plan.tokens_per_step / share.tokens_per_step
    alone_s = time.evaluation_s or 0.0
    evaluation_s = alone_s * evaluation_share(plan, num_ranks)
    saved_s = (time.num_evaluations or 0) * (alone_s - evaluation_s)
    notes = (time.note, "without what gloo takes between processes, which is not known")
    return time.model_copy(
        update={
            "tokens_per_s": more * time.tokens_per_s,
            "evaluation_s": evaluation_s,
            "total_s": time.total_s - stretched_s(saved_s, plan),
            "share_of_peak": time.share_of_peak * more / num_ranks,
            "note": "; ".join(text for text in notes if text),
        }
    )


def _trace(plan: Plan) -> Trace:
    return trace_cached(plan.model_copy(update={"torch_compile": False}), None)


def _memory(plan: Plan, trace: Trace, here: _Here) -> MemoryForecast:
    """The memory of the process that leads, from the trace of what a rank computes."""
    held = held_by_rank(TracedPlan(trace), share_of(plan, here.num_ranks), here.num_ranks).trace
    found = replay(held, workspace_bytes=0)
    parts = {part: size for part, size in found.parts.items() if part != "workspaces"}
    breakdown = {"process": here.process_bytes} | dict(sorted(parts.items(), key=lambda part: -part[1]))
    tensor_bytes = sum(parts.values())
    malloc, copy = int(_BESIDE_TENSORS * tensor_bytes), copy_bytes(plan)
    if here.num_ranks > 1 and plan.strategy == "fsdp":
        malloc, copy = int(_BESIDE_PARTS * _SINGLE_BYTES * plan.model.num_parameters), 0
    if copy:
        breakdown["checkpoint being written"] = copy
    breakdown["malloc"] = malloc
    peak = sum(breakdown.values())
    of_host = HostMemory(peak, peak - copy, here.num_local)
    limit_bytes = max(0, here.total_bytes - (of_host.machine - of_host.leader))
    below, above = _MEMORY_BAND
    remarks = ["the eager step stands in for the compiled one"] if plan.torch_compile else []
    has_many_shapes = plan.task == "sft" and not plan.has_static_shapes and plan.precision != "fp32"
    if has_many_shapes:
        remarks.append(
            "chats of many lengths: a run of hundreds of steps takes up to "
            f"{format_bytes(_KERNELS_OF_SHAPES_BYTES)} more for kernels"
        )
    return MemoryForecast(
        fits=peak <= limit_bytes,
        limit_bytes=limit_bytes,
        peak_bytes=peak,
        peak_low_bytes=int(peak * (1 - below)),
        peak_high_bytes=int(peak * (1 + above)) + (_KERNELS_OF_SHAPES_BYTES if has_many_shapes else 0),
        allocated_bytes=tensor_bytes,
        context_bytes=0,
        breakdown=breakdown,
        peak_phase=found.phase,
        phase_bytes=found.phase_bytes,
        **of_host.told(),
        disk_bytes=disk_bytes(plan),
        note="; ".join([*remarks, *held.record.notes]) or None,
    )


def _time(plan: Plan, trace: Trace) -> TimeForecast:
    flops = plan.flops_per_token * plan.tokens_per_step
    step_s = flops / (_SHARE_OF_PEAK * plan.peak_flops)
    least, most = _SHARES_OF_PEAK
    low_s, high_s = flops / (most * plan.peak_flops), flops / (least * plan.peak_flops)
    if step_s * plan.micro_batch_size / plan.rows_per_step <= _LONGEST_TRIED_S:
        step_s = measure_step(plan.model_copy(update={"torch_compile": False}), _TRIAL_BUDGET_S)
        if plan.max_hours is not None:
            # Its steps come from such a trial, too: together they take no longer than the hours.
            step_s = min(step_s, 3600 * plan.max_hours * (plan.max_power_share or 1.0) / plan.schedule.num_steps)
        low_s, high_s = (share * step_s for share in _TIME_BAND)
    if plan.torch_compile:
        low_s *= _COMPILED_SHARE
    num_evaluations, num_saves = count_milestones(plan)
    evaluation_tokens = num_eval_batches(plan) * plan.eval_batch_size * plan.max_seq_length
    evaluation_s = _EVALUATION_SHARE * step_s * evaluation_tokens / plan.tokens_per_step
    save_s = resident_bytes(trace) / SAVE_BYTES_PER_S
    time = TimeForecast(
        step_s=step_s,
        step_low_s=low_s,
        step_high_s=high_s,
        tokens_per_s=plan.tokens_per_step / step_s,
        total_s=plan.schedule.num_steps * step_s + num_evaluations * evaluation_s + num_saves * save_s,
        evaluation_s=evaluation_s,
        num_evaluations=num_evaluations,
        save_s=save_s,
        num_saves=num_saves,
        limited_by="arithmetic",
        share_of_peak=flops / (step_s * plan.peak_flops),
        energy_wh=None,
    )
    return with_rests(time, plan)


def _does_not_fit(made: Plan, here: _Here) -> DoesNotFitError:
    assert made.forecast is not None
    memory = made.forecast.memory
    what = (
        f"this does not fit the memory of this machine: it needs {format_bytes(memory.peak_bytes)}, and "
        f"{format_bytes(memory.limit_bytes)} can be had"
    )
    if memory.host_other_bytes is not None:
        what += f" beside {here.num_local - 1} other processes that need {format_bytes(memory.host_other_bytes)} each"
    size = made.micro_batch_size
    while size > 1:
        size //= 2
        evaluation = min(size, made.eval_batch_size)
        less = made.model_copy(update={"micro_batch_size": size, "eval_batch_size": evaluation})
        found = _memory(less, _trace(share_of(less, here.num_ranks)), here)
        if found.fits:
            flags = (
                f"--per_device_train_batch_size {size} --total_batch_size {made.total_batch_size} "
                f"--per_device_eval_batch_size {evaluation}"
            )
            remedy = f"{flags} takes {format_bytes(found.peak_bytes)}"
            return DoesNotFitError(f"{what}. {remedy}", made)
    return DoesNotFitError(f"{what}; a single sequence at a time does not fit either: choose a smaller model", made)
