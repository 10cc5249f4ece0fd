"""Deep compiled models from shallow ones: the compiler takes some 2.5 s of a core for every layer it is shown.

    layers      3     4  ·  ·  ·  ·  ·  ·  ·  ·  ·  24
    bytes       ■■■   ■■■■                           ■■■■■■■■■■■■■■■■■■■■■■■■   of each phase: on a straight line
    slack       ▪▪    ▪                              ▪▪   of the allocator: about the same at every depth

Decoder layers are alike, so what a compiled step holds in each phase, and computes, grows by the same with each layer
(exactly so from 3 to 12 layers of a Qwen3, with checkpointing and without). What the allocator holds beyond tensors
does not: there the two depths tell the size, not the value. Whatever is not compiled (update, evaluation) is that of
the whole model's eager step.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecard.model.build import count_parameters, make_config
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.planner.recorder import Work
from onecard.planner.replay import Peak, replay
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import is_traced, trace_cached
from onecard.spec import Plan

# Up to this depth all layers are traced: with the start of the compiler some 35 s of a core.
_NUM_WHOLE_LAYERS = 12
# The first and the last layer differ from those between them.
_DEPTHS = (3, 4)
_NEGLIGIBLE_BYTES = 4096
_COMPILED_PHASES = ("forward", "backward")
_PHASES_OF_STEP = ("batch", "forward", "loss", "backward", "update")
# Holds what the compiled forward pass keeps.
_PHASES_OF_COMPILED = (*_COMPILED_PHASES, "loss")


@dataclass(frozen=True)
class TracedPlan:
    """What a step takes: its trace, or those of two shallower models for one of `num_layers`.

    `trace` has the work of the whole model; the storages in it are those of the eager step where `shallow` is given.
    """

    trace: Trace
    shallow: tuple[Trace, Trace] | None = None
    num_layers: int = 0

    @property
    def note(self) -> str | None:
        """Says what stands for the plan's own trace, if anything."""
        if self.shallow is None:
            return None
        return f"interpolated from {_DEPTHS[0]} and {_DEPTHS[1]} of its {self.num_layers} layers"

    def replay(
        self, workspace_bytes: int, settings: AllocatorSettings | None = None, cap_bytes: int | None = None
    ) -> Peak:
        """Runs the step through the allocator as `replay.replay` does; the peak of a deep model ignores the cap."""
        if self.shallow is None:
            return replay(self.trace, workspace_bytes, settings, cap_bytes)
        low, high = (replay(trace, workspace_bytes, settings) for trace in self.shallow)
        peak = self._extend_peak(low, high, replay(self.trace, workspace_bytes, settings))
        return replace(peak, fits=cap_bytes is None or peak.reserved_bytes <= cap_bytes)

    def _extend_peak(self, low: Peak, high: Peak, eager: Peak) -> Peak:
        extended = _extend_all(low.phase_bytes, high.phase_bytes, self.num_layers)
        phase_bytes = eager.phase_bytes | {name: extended[name] for name in _PHASES_OF_COMPILED if name in extended}
        phase = max(phase_bytes, key=phase_bytes.__getitem__)
        parts = eager.parts_of_phases[phase]
        if phase in _PHASES_OF_COMPILED:
            parts = _extend_all(low.parts_of_phases[phase], high.parts_of_phases[phase], self.num_layers)
        # Rounding and workspaces; the fullest phases of the two may be others.
        less, more = (peak.allocated_bytes - max(peak.phase_bytes.values()) for peak in (low, high))
        allocated_bytes = phase_bytes[phase] + _extend(less, more, self.num_layers)
        slack = sum(peak.reserved_bytes - peak.allocated_bytes for peak in (low, high)) // 2
        return Peak(
            reserved_bytes=allocated_bytes + slack,
            allocated_bytes=allocated_bytes,
            phase=phase,
            parts=parts,
            phase_bytes=phase_bytes,
            parts_of_phases={phase: parts},
            fits=True,
        )


def trace_any_depth(plan: Plan, compute_capability: tuple[int, int]) -> TracedPlan:
    """Traces a plan, a deep compiled one from two shallower models, or reads what earlier calls have traced.

    Raises:
        CannotTraceCompiled: this PyTorch's compiler fails or is unknown.
        CannotTrace: the step does not run on tensors without values.
    """
    shallow = shallow_plans(plan)
    if shallow is None or is_traced(plan, compute_capability):
        return TracedPlan(trace_cached(plan, compute_capability))
    low, high = (trace_cached(one, compute_capability) for one in shallow)
    num_layers = _num_layers(plan.model.settings)
    compiled = _extend_work(low.record.work, high.record.work, num_layers, _COMPILED_PHASES)
    if compiled is None:
        return TracedPlan(trace_cached(plan, compute_capability))
    eager = trace_cached(plan.model_copy(update={"torch_compile": False}), compute_capability)
    others = [work for work in eager.record.work if work.phase not in _COMPILED_PHASES]
    trace = replace(eager, record=replace(eager.record, work=[*compiled, *others]))
    return TracedPlan(trace, (low, high), num_layers)


def trace_work(plan: Plan, compute_capability: tuple[int, int]) -> Trace:
    """Traces what an eager step computes; of a deep model from two shallower ones, where the storages are the lower's.

    Raises:
        CannotTrace: the step does not run on tensors without values.
    """
    # No part of a step.
    plan = plan.model_copy(update={"sample_prompts": ()})
    # Muon multiplies the matrices of all layers at once: products of another shape at each depth.
    shallow = None if plan.optimizer.name == "muon" else _shallow_plans(plan)
    if shallow is not None and not is_traced(plan, compute_capability):
        low, high = (trace_cached(one, compute_capability) for one in shallow)
        work = _extend_work(low.record.work, high.record.work, _num_layers(plan.model.settings), _PHASES_OF_STEP)
        if work is not None:
            return replace(low, record=replace(low.record, work=work))
    return trace_cached(plan, compute_capability)


def is_known(plan: Plan, compute_capability: tuple[int, int]) -> bool:
    """Whether earlier calls have left all that `trace_any_depth` needs."""
    shallow = shallow_plans(plan)
    if is_traced(plan, compute_capability):
        return True
    return shallow is not None and all(is_traced(one, compute_capability) for one in shallow)


def shallow_plans(plan: Plan) -> tuple[Plan, Plan] | None:
    """The plan with a model of fewer layers, twice; None where all layers are traced, or are not alike."""
    return _shallow_plans(plan) if plan.torch_compile else None


def _shallow_plans(plan: Plan) -> tuple[Plan, Plan] | None:
    if 0 < plan.gradient_checkpointing < 1:
        return None
    config = make_config(plan.model.settings)
    num_layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ()
    if num_layers <= _NUM_WHOLE_LAYERS or len(set(kinds)) > 1:
        return None
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    low, high = (_with_layers(plan, name, depth) for depth in _DEPTHS)
    # Layers with parameters of other sizes (a first dense one among those of experts) lie on no line.
    counted = _extend(low.model.num_parameters, high.model.num_parameters, num_layers)
    return (low, high) if counted == plan.model.num_parameters else None


def _num_layers(settings: dict[str, Any]) -> int:
    return int(make_config(settings).num_hidden_layers)


def _with_layers(plan: Plan, name: str, num_layers: int) -> Plan:
    kept = {key: value for key, value in plan.model.settings.items() if key not in (name, "num_hidden_layers")}
    settings = kept | {name: num_layers}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:num_layers]
    total, matrices = count_parameters(settings)
    changes = {"settings": settings, "num_parameters": total, "num_matrix_parameters": matrices}
    return plan.model_copy(update={"model": plan.model.model_copy(update=changes)})


def _extend(low: int, high: int, num_layers: int) -> int:
    """What something is at `num_layers` that is `low` and `high` at the two depths."""
    first, second = _DEPTHS
    return low + (high - low) * (num_layers - first) // (second - first)


def _extend_all(low: Mapping[str, int], high: Mapping[str, int], num_layers: int) -> dict[str, int]:
    return {name: max(0, _extend(low.get(name, 0), high.get(name, 0), num_layers)) for name in high}


def _extend_work(low: list[Work], high: list[Work], num_layers: int, phases: Collection[str]) -> list[Work] | None:
    """The work of a deep model in these phases; None where the two depths have kernels of other shapes."""
    before, after = ({_key(work): work for work in part if work.phase in phases} for part in (low, high))
    # Random seeds are one tensor, longer with every layer: too small to matter, of another shape at each depth.
    one_sided = before.keys() ^ after.keys()
    if any((before | after)[key].num_bytes > _NEGLIGIBLE_BYTES for key in one_sided):
        return None
    return [
        replace(
            work,
            num_calls=_extend(before[key].num_calls, work.num_calls, num_layers),
            flops=_extend(before[key].flops, work.flops, num_layers),
            num_bytes=_extend(before[key].num_bytes, work.num_bytes, num_layers),
        )
        for key, work in after.items()
        if key in before
    ]


def _key(work: Work) -> tuple[Any, ...]:
    return (work.name, work.phase, work.shape, work.dtype, work.micro_batch)
