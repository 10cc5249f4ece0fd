"""What a rank holds of a run that several share: the trace of its micro-batches, with the state that is really there.

ddp    weights, moments, gradients as on one card; in fp32 gradients rest in buckets that are never given back, in 16
       bits these lie beside them
fsdp   1/N of fp32 weights, moments and gradients; layers gathered for a while, in 16 bits where these are computed
       in, and their gradients whole until they are summed and cut, in every micro-batch
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.model.build import build_shape
from onecard.planner.depth import TracedPlan
from onecard.planner.recorder import Record
from onecard.planner.trace import Trace
from onecard.spec import ModelPlan, Plan
from onecard.training.spread import BUCKET_BYTES
from onecard.units import MIB

_SINGLE_BYTES, _HALF_BYTES = 4, 2
# Layers that are whole at once: the one that computes, the next one, and a flat copy that one of them came in.
_WHOLE_LAYERS = 3
# Muon's, for matrices that it makes whole (`training/muon.py`).
_MUON_SCRATCH_BYTES = 64 * MIB


@dataclass(frozen=True)
class ModelParts:
    """Numbers of values in what FSDP2 gathers at a time: each layer, and the root that holds all else."""

    root: int
    layers: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.root + sum(self.layers)

    @property
    def largest_layer(self) -> int:
        return max(self.layers, default=0)


def find_parts(model: ModelPlan) -> ModelParts:
    """Counts the values of each layer of a model, by its shape alone."""
    return _count(json.dumps(model.settings))


@lru_cache(maxsize=8)
def _count(settings_json: str) -> ModelParts:
    with torch.device("meta"):
        model = build_shape(json.loads(settings_json))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    return ModelParts(max(0, sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)), sizes)


def share_of(plan: Plan, num_ranks: int) -> Plan:
    """The plan as the rank with the most to do computes it: its micro-batches of a step, and no others."""
    if num_ranks == 1:
        return plan
    rows, size = plan.rows_per_step, plan.micro_batch_size
    sizes = [min(size, rows - start) for start in range(0, rows, size)]
    most = max(sum(sizes[rank::num_ranks]) for rank in range(num_ranks))
    return plan.model_copy(update={"total_batch_size": max(1, plan.total_batch_size * most // rows)})


def held_by_rank(traced: TracedPlan, share: Plan, num_ranks: int) -> TracedPlan:
    """What one of so many ranks holds, from what one process alone would with the same micro-batches."""
    if num_ranks == 1:
        return traced
    if share.strategy == "fsdp":
        return _change(traced, lambda trace: _in_parts(trace, share, num_ranks))
    return _change(traced, _in_buckets if share.precision == "fp32" else _beside_buckets)


def update_in_parts(trace: Trace, num_ranks: int) -> Trace:
    """The work of a rank that updates its part alone."""
    work = [
        # What multiplies matrices there is Muon, which does so on every rank.
        replace(each, num_bytes=each.num_bytes // num_ranks) if each.phase == "update" and not each.flops else each
        for each in trace.record.work
    ]
    return replace(trace, record=replace(trace.record, work=work))


def _change(traced: TracedPlan, change: Callable[[Trace], Trace]) -> TracedPlan:
    shallow, ends = traced.shallow, traced.ends
    return replace(
        traced,
        trace=change(traced.trace),
        shallow=None if shallow is None else (change(shallow[0]), change(shallow[1])),
        ends=None if ends is None else (_change(ends[0], change), _change(ends[1], change)),
    )


def _in_buckets(trace: Trace) -> Trace:
    """Gradients that stay: they are views of buckets."""
    record = trace.record
    gradients = [number for number, label in record.labels.items() if label == "gradients"]
    own = {*gradients, *(~number for number in gradients)}
    step, once = (
        [number for number in part if number not in own]
        for part in (record.order[trace.resident_end : trace.step_end], record.order[trace.step_end :])
    )
    return _Editor(record).finish(trace, [*record.order[: trace.resident_end], *gradients], step, once)


def _beside_buckets(trace: Trace) -> Trace:
    """Buckets of 16 bits that nothing is in, and the copy of fp32 gradients that one of them sums."""
    record = trace.record
    sizes = [record.sizes[number] for number, label in record.labels.items() if label == "gradients"]
    editor = _Editor(record)
    buckets = editor.add(sum(sizes) * _HALF_BYTES // _SINGLE_BYTES, "resident", "gradients")
    copy = editor.add(max([BUCKET_BYTES, *sizes]), "backward", "gradients")
    step = record.order[trace.resident_end : trace.step_end]
    # The embedding's is the largest as a rule, and the last.
    end = 1 + max((place for place, n in enumerate(step) if n >= 0 and record.phases[n] == "backward"), default=-1)
    resident = [*record.order[: trace.resident_end], buckets]
    return editor.finish(trace, resident, [*step[:end], copy, ~copy, *step[end:]], record.order[trace.step_end :])


def _in_parts(trace: Trace, share: Plan, num_ranks: int) -> Trace:
    record, parts = trace.record, find_parts(share.model)
    is_mixed = share.precision != "fp32"
    width = _HALF_BYTES if is_mixed else _SINGLE_BYTES
    # Masters alone are in parts, and there are no weights in 16 bits beside them.
    of_weights = _SINGLE_BYTES / (_SINGLE_BYTES + _HALF_BYTES) if is_mixed else 1.0
    editor = _Editor(record)
    for number, size in enumerate(record.sizes):
        label = record.labels.get(number)
        if label in ("optimizer", "gradients") or (label is None and record.phases[number] == "update"):
            editor.sizes[number] = -(-size // num_ranks)
        elif label == "weights":
            editor.sizes[number] = math.ceil(of_weights * size / num_ranks)
    gathered = width * (parts.root + _WHOLE_LAYERS * parts.largest_layer)
    # Of the layer that computes and, in a flat fp32 copy, of the one that is being summed; the embedding's stays.
    gradients_bytes = (width + _SINGLE_BYTES) * parts.largest_layer + _SINGLE_BYTES * parts.root
    step = record.order[trace.resident_end : trace.step_end]
    allocated = [place for place, number in enumerate(step) if number >= 0]
    backward = [place for place in allocated if record.phases[step[place]] == "backward"]
    first = next((place for place in allocated if record.phases[step[place]] == "forward"), 0)
    start, end = (backward[0], backward[-1] + 1) if backward else (len(step), len(step))
    weights = editor.add(gathered, "forward", "gathered")
    gradients = editor.add(gradients_bytes, "backward", "gathered")
    # The embedding's gradient is summed last, from a flat copy, with no layer whole.
    copy = editor.add(_SINGLE_BYTES * parts.root, "backward", "gathered")
    before = [*step[:first], weights, *step[first:start], gradients, *step[start:end]]
    resident = record.order[: trace.resident_end]
    if share.optimizer.name == "muon":
        resident = [*resident, editor.add(_MUON_SCRATCH_BYTES, "resident", "optimizer")]
    # Evaluation and samples gather, too.
    aside = editor.add(gathered, "evaluation", "gathered")
    once = [aside, *record.order[trace.step_end :], ~aside]
    return editor.finish(trace, resident, [*before, ~weights, copy, ~copy, ~gradients, *step[end:]], once)


class _Editor:
    """A copy of a record that storages are added to."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.sizes, self._phases, self._labels = list(record.sizes), list(record.phases), dict(record.labels)

    def add(self, num_bytes: int, phase: str, label: str) -> int:
        self.sizes.append(num_bytes)
        self._phases.append(phase)
        self._labels[len(self.sizes) - 1] = label
        return len(self.sizes) - 1

    def finish(self, trace: Trace, resident: list[int], step: list[int], once: list[int]) -> Trace:
        record = replace(
            self._record,
            sizes=self.sizes,
            phases=self._phases,
            labels=self._labels,
            order=[*resident, *step, *once],
        )
        step_end = len(resident) + len(step)
        return Trace(record, len(resident), step_end, trace.num_micro_batches)
