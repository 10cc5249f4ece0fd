"""How long a plan takes on a card that need not be there.

    trace of two micro-batches ──► all of a step ──► seconds on the card ─┐
                                        └──────────► seconds of Python ───┴──► the larger is a step's time

The card works off what Python queues, and nothing in a step waits for it, so the slower of both decides.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onecard.hardware import Card
from onecard.planner.aside import PHASES
from onecard.planner.efficiency import Efficiencies, default_efficiencies
from onecard.planner.kernels import class_of, is_fused, time_kernel
from onecard.planner.looping import launches_of
from onecard.planner.recorder import Work
from onecard.planner.trace import Trace
from onecard.spec import Plan

# Writing and hashing a checkpoint, assumed: one core hashes about 1 GB/s, a disk takes 0.2 (hard disk) to 3 (NVMe).
SAVE_BYTES_PER_S = 0.5e9
# Tokens that one loader process gives, assumed: the measured runs of data_path.json wait 0.1 % of their time for it.
_DATA_TOKENS_PER_S = 5e6
# What compiling gains where the trace is of the eager step: 250 against 135 ms (nanoGPT's README, A100).
_COMPILED_SHARE = 0.54
_PER_MICRO_BATCH = ("forward", "loss", "backward")
_Limit = Literal["arithmetic", "bandwidth", "launches", "data", "communication"]


@dataclass(frozen=True)
class StepTime:
    """Predicted times in seconds; `low_s` and `high_s` bound a step.

    `seconds` tells how long each kind of operator takes in a step; "launches" is what Python takes beyond them. For
    `limit_s` of a step what limits it is waited for.
    `total_s` is the whole run with evaluations and checkpoints, without samples, compiling and start.
    `share_of_peak` is the model's arithmetic by that of the card. `energy_wh` is a range, None where the card's power
    is not known.
    """

    step_s: float
    low_s: float
    high_s: float
    tokens_per_s: float
    share_of_peak: float
    limited_by: _Limit
    limit_s: float
    seconds: dict[str, float]
    evaluation_s: float
    save_s: float
    total_s: float
    energy_wh: tuple[float, float] | None


@dataclass(frozen=True)
class _Passed:
    """What some work takes: on the card, by kind and by limit, and in Python."""

    seconds: Mapping[str, float]
    limits: Mapping[str, float]
    host_s: float

    @property
    def card_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def all_s(self) -> float:
        return max(self.card_s, self.host_s)


def predict_time(trace: Trace, plan: Plan, card: Card, efficiencies: Efficiencies | None = None) -> StepTime:
    """Predicts a step and the run of `plan` on `card` from a trace of two of its micro-batches.

    Takes milliseconds. Before `calibrate` has seen the card, the errors are those of benchmarks/planner_time.py.
    """
    efficiencies = efficiencies or default_efficiencies(card)
    step = _pass(list(_of_step(trace, plan)), card, efficiencies, plan)
    data_s = plan.tokens_per_step / (_DATA_TOKENS_PER_S * max(1, plan.dataloader_num_workers))
    step_s = max(step.all_s, data_s)
    slow, fast = (_band(trace, plan, _at_power_limit(card, place), efficiencies) for place in (0, 1))
    low_s, high_s = fast[0], slow[1]
    evaluation_s = _evaluation_s(trace, plan, card, efficiencies)
    save_s = resident_bytes(trace) / SAVE_BYTES_PER_S
    num_evaluations, num_saves = count_milestones(plan)
    aside_s = num_evaluations * evaluation_s + num_saves * save_s
    total_s = plan.schedule.num_steps * step_s + aside_s
    seconds = dict(step.seconds) | {"launches": max(0.0, step.host_s - step.card_s)}
    limited_by, limit_s = _limit(step, data_s)
    return StepTime(
        step_s=step_s,
        low_s=min(step_s, max(low_s, data_s)),
        high_s=max(high_s, step_s),
        tokens_per_s=plan.tokens_per_step / step_s,
        share_of_peak=plan.flops_per_token * plan.tokens_per_step / (step_s * _peak_of(plan, card)),
        limited_by=limited_by,
        limit_s=limit_s,
        seconds=seconds,
        evaluation_s=evaluation_s,
        save_s=save_s,
        total_s=total_s,
        energy_wh=_energy(card, [[total_s * bound_s / step_s for bound_s in band] for band in (slow, fast)]),
    )


def time_phase(trace: Trace, plan: Plan, card: Card, efficiencies: Efficiencies, phase: str) -> float:
    """Seconds of one micro-batch's forward or backward pass, or of the update."""
    of_phase = [work for work in trace.record.work if work.phase == phase]
    first = [(work, 1.0) for work in of_phase if phase == "update" or work.micro_batch == 1]
    return _pass(first, card, efficiencies, plan).all_s


def _of_step(trace: Trace, plan: Plan) -> Iterator[tuple[Work, float]]:
    """The work of a step, and how often it is done in each: the second micro-batch stands for all but the first."""
    num_micro_batches = plan.rows_per_step / plan.micro_batch_size
    for work in trace.record.work:
        if work.phase in PHASES:
            continue
        if trace.num_micro_batches == 1:
            yield work, 1.0
        elif work.micro_batch == 0:
            share = num_micro_batches / trace.num_micro_batches
            yield work, 1.0 if work.phase == "update" else share
        elif (work.micro_batch == 1) == (work.phase in _PER_MICRO_BATCH):
            # The first micro-batch itself, or the update at the end of the last.
            yield work, 1.0
        else:
            # Those after the first, or what follows each backward pass but the last.
            yield work, num_micro_batches - 1


def _pass(work_and_times: list[tuple[Work, float]], card: Card, efficiencies: Efficiencies, plan: Plan) -> _Passed:
    seconds: dict[str, float] = defaultdict(float)
    limits: dict[str, float] = defaultdict(float)
    host_s = 0.0
    is_compiled = any(is_fused(work) for work, _ in work_and_times)
    for work, times in work_and_times:
        kernel = time_kernel(work, card, efficiencies, plan.max_seq_length)
        seconds[class_of(work, efficiencies)] += times * kernel.seconds
        limits[kernel.limit] += times * kernel.seconds
        is_graph = is_compiled and work.phase in ("forward", "backward")
        dispatch_s = efficiencies.fused_dispatch_s if is_graph else efficiencies.dispatch_s
        host_s += times * _num_launches(work, plan) * dispatch_s
    return _Passed(seconds, limits, host_s)


def _num_launches(work: Work, plan: Plan) -> int:
    """How often Python launches an operation: documents of text that run apart are at least one a row."""
    num_calls = work.num_calls
    if work.phase in ("forward", "backward", "evaluation"):
        num_calls = launches_of(num_calls, plan)
    if plan.attn_implementation != "apart" or plan.task != "pretrain" or plan.corpus.num_train_documents == 1:
        return num_calls
    if work.phase == "evaluation":
        return num_calls * plan.eval_batch_size
    return num_calls * (plan.micro_batch_size if work.phase in ("forward", "backward") else 1)


def _limit(step: _Passed, data_s: float) -> tuple[_Limit, float]:
    if data_s > step.all_s:
        return "data", data_s
    if step.host_s > step.card_s:
        return "launches", step.host_s
    names: tuple[_Limit, ...] = ("arithmetic", "bandwidth", "launches")
    name = max(names, key=lambda name: step.limits[name])
    return name, step.limits[name]


def _band(trace: Trace, plan: Plan, card: Card, efficiencies: Efficiencies) -> tuple[float, float]:
    """Seconds of a step if everything uncertain but the card's power goes well, or badly."""
    work = list(_of_step(trace, plan))
    bounds = []
    for factor, dispatch in zip((efficiencies.low, efficiencies.high), efficiencies.dispatch_range, strict=True):
        hosts = replace(efficiencies, dispatch_s=efficiencies.dispatch_s * dispatch)
        passed = _pass(work, card, hosts, plan)
        bounds.append(max(passed.card_s * factor, passed.host_s))
    low, high = bounds
    if plan.torch_compile and not any(is_fused(each) for each, _ in work):
        low *= _COMPILED_SHARE
    return low, high


def _at_power_limit(card: Card, place: int) -> Card:
    """A laptop's card at its lowest (0) or highest (1) power limit."""
    if card.flops_16bit_range is None or card.boost_clock_range_hz is None or not card.boost_clock_hz:
        return card
    clock = card.boost_clock_range_hz[place] / card.boost_clock_hz
    bandwidth = card.bandwidth_range_bytes_per_s
    return replace(
        card,
        flops_16bit=card.flops_16bit_range[place],
        tf32_flops=card.tf32_flops * clock if card.tf32_flops else None,
        fp32_flops=card.fp32_flops * clock,
        bandwidth_bytes_per_s=bandwidth[place] if bandwidth else card.bandwidth_bytes_per_s,
    )


def _evaluation_s(trace: Trace, plan: Plan, card: Card, efficiencies: Efficiencies) -> float:
    work = [(work, 1.0) for work in trace.record.work if work.phase == "evaluation"]
    return num_eval_batches(plan) * _pass(work, card, efficiencies, plan).all_s


def num_eval_batches(plan: Plan) -> float:
    """Batches of one evaluation."""
    whole = plan.corpus.num_heldout_tokens / (plan.max_seq_length * plan.eval_batch_size)
    return whole if plan.eval_batches is None else min(whole, plan.eval_batches)


def evaluation_share(plan: Plan, num_ranks: int) -> float:
    """What of the batches of an evaluation the rank with the most of them measures."""
    num_batches = max(1, math.ceil(num_eval_batches(plan)))
    return math.ceil(num_batches / num_ranks) / num_batches


def resident_bytes(trace: Trace) -> int:
    """Bytes of a checkpoint: weights and moments, which are there before the first step."""
    record = trace.record
    return sum(record.sizes[number] for number in record.order[: trace.resident_end] if number in record.labels)


def count_milestones(plan: Plan) -> tuple[int, int]:
    """Evaluations and checkpoints of a run; a new best is saved too, and every evaluation may be one."""
    num_steps = plan.schedule.num_steps
    last = {num_steps}
    evaluations = set(range(plan.eval_steps, num_steps + 1, plan.eval_steps)) | last
    if not plan.corpus.num_heldout_tokens:
        evaluations = set()
    saves = set(range(plan.save_steps, num_steps + 1, plan.save_steps)) | last
    return len(evaluations), len(saves | evaluations)


def _peak_of(plan: Plan, card: Card) -> float:
    if plan.precision == "fp32":
        return card.fp32_flops
    return card.flops_16bit or card.fp16_flops or card.fp32_flops


def _energy(card: Card, run_s: list[list[float]]) -> tuple[float, float] | None:
    """Watt-hours of the card alone, at full power from start to end.

    `run_s` bounds the seconds of a run at the card's lowest power limit, and at its highest, where it takes less.
    """
    power_w = card.power_limits_w or ((card.tdp_w, card.tdp_w) if card.tdp_w else None)
    if power_w is None:
        return None
    spent_wh = [watts * seconds / 3600 for watts, bounds in zip(power_w, run_s, strict=True) for seconds in bounds]
    return min(spent_wh), max(spent_wh)
