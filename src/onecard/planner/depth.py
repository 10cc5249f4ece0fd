"""Deep compiled models from shallow ones: the compiler takes 1.5 to 2.5 s of a core for every layer it is shown.

    layers      3     4  ·  ·  ·  ·  ·  ·  ·  ·  ·  24
    bytes       ■■■   ■■■■                           ■■■■■■■■■■■■■■■■■■■■■■■■   of each phase: on a straight line
    slack       ▪▪    ▪                              ▪▪▪▪▪▪  of the allocator: on no line

Decoder layers are alike, so what a compiled step holds in each phase, and computes, grows by the same with each layer
(exactly so from 3 to 12 layers of a Qwen3, with checkpointing and without). What the allocator holds beyond tensors
does not: it is taken from the eager step of the whole model, whose tensors are as many, or from the two depths where
they have more. Whatever is not compiled (update, evaluation) is that of the whole model's eager step.

A share of recomputing layers lies between none and all of them: each phase is the fullest of several moments, which are
on straight lines over the share, so a line between the two ends is hardly ever below it (0.57 % once, for slack).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecard.model.build import count_parameters, make_config
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.planner.looping import explain_shortening, num_layers_of
from onecard.planner.recorder import Work
from onecard.planner.replay import Peak, replay
from onecard.planner.trace import Trace
from onecard.planner.trace_cache import is_traced, trace_cached
from onecard.spec import Plan

# Seconds of a core that a compiled trace takes to begin with, and for every layer.
_START_S, _LAYER_S = 3.0, 1.5
# Up to this depth all layers are traced.
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
    `ends` are none and all layers recomputing where a `share` does; `shortened` says how rows were cut (`looping.py`).
    """

    trace: Trace
    shallow: tuple[Trace, Trace] | None = None
    num_layers: int = 0
    ends: "tuple[TracedPlan, TracedPlan] | None" = None
    share: float = 0.0
    shortened: str | None = None

    @property
    def note(self) -> str | None:
        """Says what stands for the plan's own trace, if anything."""
        if self.ends is not None:
            return f"{self.ends[0].note}, none and all of them recomputing"
        if self.shallow is None:
            return self.shortened
        return f"interpolated from {_DEPTHS[0]} and {_DEPTHS[1]} of its {self.num_layers} layers"

    def replay(
        self, workspace_bytes: int, settings: AllocatorSettings | None = None, cap_bytes: int | None = None
    ) -> Peak:
        """Runs the step through the allocator as `replay.replay` does; the peak of a deep model ignores the cap."""
        if self.ends is not None:
            kept, recomputed = (end.replay(workspace_bytes, settings) for end in self.ends)
            peak = _mix_peaks(kept, recomputed, self.share)
        elif self.shallow is not None:
            low, high = (replay(trace, workspace_bytes, settings) for trace in self.shallow)
            peak = self._extend_peak(low, high, replay(self.trace, workspace_bytes, settings))
        else:
            return replay(self.trace, workspace_bytes, settings, cap_bytes)
        return replace(peak, fits=cap_bytes is None or peak.reserved_bytes <= cap_bytes)

    def _extend_peak(self, low: Peak, high: Peak, eager: Peak) -> Peak:
        extended = _extend_all(low.phase_bytes, high.phase_bytes, self.num_layers)
        phase_bytes = eager.phase_bytes | {name: extended[name] for name in _PHASES_OF_COMPILED if name in extended}
        phase = max(phase_bytes, key=phase_bytes.__getitem__)
        parts_of_phases = eager.parts_of_phases | {
            name: _extend_all(low.parts_of_phases[name], high.parts_of_phases[name], self.num_layers)
            for name in _PHASES_OF_COMPILED
            if name in extended
        }
        # What blocks are larger than their tensors, and workspaces: of as many tensors as the whole model has.
        allocated_bytes = phase_bytes[phase] + eager.allocated_bytes - max(eager.phase_bytes.values())
        # Fragments of many layers are not seen with few of them, those of the compiler's program not in the eager step.
        fragments = sum(peak.reserved_bytes - peak.allocated_bytes for peak in (low, high)) // 2
        slack = max(fragments, eager.reserved_bytes - eager.allocated_bytes)
        return Peak(
            reserved_bytes=allocated_bytes + slack,
            allocated_bytes=allocated_bytes,
            phase=phase,
            parts=parts_of_phases[phase],
            phase_bytes=phase_bytes,
            parts_of_phases=parts_of_phases,
            fits=True,
        )


def trace_any_depth(plan: Plan, compute_capability: tuple[int, int]) -> TracedPlan:
    """Traces a plan, a deep compiled one from two shallower models, or reads what earlier calls have traced.

    Raises:
        CannotTraceCompiled: this PyTorch's compiler fails or is unknown.
        CannotTrace: the step does not run on tensors without values.
    """
    if not is_traced(plan, compute_capability) and (found := interpolate(plan, compute_capability)) is not None:
        return found
    return TracedPlan(trace_cached(plan, compute_capability), shortened=explain_shortening(plan))


def interpolate(plan: Plan, compute_capability: tuple[int, int]) -> TracedPlan | None:
    """Makes a deep compiled plan of shallower models; None for a plan that has to be traced whole.

    Raises:
        CannotTraceCompiled, CannotTrace: as `trace_any_depth`.
    """
    if 0 < plan.gradient_checkpointing < 1:
        return _interpolate_share(plan, compute_capability)
    if (shallow := shallow_plans(plan)) is None:
        return None
    low, high = (trace_cached(one, compute_capability) for one in shallow)
    num_layers = num_layers_of(plan.model.settings)
    compiled = _extend_work(low.record.work, high.record.work, num_layers, _COMPILED_PHASES)
    if compiled is None:
        return None
    eager = trace_cached(plan.model_copy(update={"torch_compile": False}), compute_capability)
    others = [work for work in eager.record.work if work.phase not in _COMPILED_PHASES]
    trace = replace(eager, record=replace(eager.record, work=[*compiled, *others]))
    return TracedPlan(trace, (low, high), num_layers)


def _interpolate_share(plan: Plan, compute_capability: tuple[int, int]) -> TracedPlan | None:
    kept, recomputed = (interpolate(end, compute_capability) for end in _ends(plan))
    if kept is None or recomputed is None:
        return None
    # As many layers as really recompute.
    share = max(1, round(plan.gradient_checkpointing * kept.num_layers)) / kept.num_layers
    work = _mix_work(kept.trace.record.work, recomputed.trace.record.work, share)
    trace = replace(kept.trace, record=replace(kept.trace.record, work=work))
    return TracedPlan(trace, num_layers=kept.num_layers, ends=(kept, recomputed), share=share)


def _ends(plan: Plan) -> tuple[Plan, Plan]:
    kept, recomputed = (plan.model_copy(update={"gradient_checkpointing": value}) for value in (False, True))
    return kept, recomputed


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
        work = _extend_work(low.record.work, high.record.work, num_layers_of(plan.model.settings), _PHASES_OF_STEP)
        if work is not None:
            return replace(low, record=replace(low.record, work=work))
    return trace_cached(plan, compute_capability)


def is_known(plan: Plan, compute_capability: tuple[int, int]) -> bool:
    """Whether earlier calls have left all that `trace_any_depth` needs."""
    shallow = shallow_plans(plan)
    if is_traced(plan, compute_capability):
        return True
    return shallow is not None and all(is_traced(one, compute_capability) for one in shallow)


def expect_trace_s(plan: Plan, compute_capability: tuple[int, int]) -> float:
    """Seconds that the compiler is expected to take with a compiled plan; none for what is remembered."""
    if is_known(plan, compute_capability):
        return 0.0
    plans = [one for one in shallow_plans(plan) or (plan,) if not is_traced(one, compute_capability)]
    return sum(_START_S + _LAYER_S * num_layers_of(one.model.settings) for one in plans)


def shallow_plans(plan: Plan) -> tuple[Plan, ...] | None:
    """The plan with a model of fewer layers, twice; None where all layers are traced, or are not alike.

    For a share of recomputing layers these are twice as many: of none and of all.
    """
    if not plan.torch_compile:
        return None
    if 0 < plan.gradient_checkpointing < 1:
        kept, recomputed = (shallow_plans(end) for end in _ends(plan))
        return kept + recomputed if kept and recomputed else None
    return _shallow_plans(plan)


def _shallow_plans(plan: Plan) -> tuple[Plan, Plan] | None:
    config = make_config(plan.model.settings)
    num_layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ()
    if num_layers <= _NUM_WHOLE_LAYERS or len(set(kinds)) > 1 or 0 < plan.gradient_checkpointing < 1:
        return None
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    low, high = (_with_layers(plan, name, depth) for depth in _DEPTHS)
    # Layers with parameters of other sizes (a first dense one among those of experts) lie on no line.
    counted = _extend(low.model.num_parameters, high.model.num_parameters, num_layers)
    return (low, high) if counted == plan.model.num_parameters else None


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


def _mix(kept: float, recomputed: float, share: float) -> int:
    return round((1 - share) * kept + share * recomputed)


def _mix_all(kept: Mapping[str, int], recomputed: Mapping[str, int], share: float) -> dict[str, int]:
    return {
        name: _mix(kept.get(name, 0), recomputed.get(name, 0), share) for name in dict.fromkeys([*kept, *recomputed])
    }


def _mix_peaks(kept: Peak, recomputed: Peak, share: float) -> Peak:
    phase_bytes = _mix_all(kept.phase_bytes, recomputed.phase_bytes, share)
    phase = max(phase_bytes, key=phase_bytes.__getitem__)
    parts_of_phases = {
        name: _mix_all(kept.parts_of_phases[name], recomputed.parts_of_phases[name], share) for name in phase_bytes
    }
    return Peak(
        reserved_bytes=_mix(kept.reserved_bytes, recomputed.reserved_bytes, share),
        allocated_bytes=_mix(kept.allocated_bytes, recomputed.allocated_bytes, share),
        phase=phase,
        parts=parts_of_phases[phase],
        phase_bytes=phase_bytes,
        parts_of_phases=parts_of_phases,
        fits=True,
    )


def _mix_work(kept: list[Work], recomputed: list[Work], share: float) -> list[Work]:
    """Work of both kinds of layers, each by its share; what both do alike comes out as it is."""
    before, after = ({_key(work): work for work in part} for part in (kept, recomputed))
    mixed = []
    for key, work in (before | after).items():
        one, other = (part.get(key, replace(work, num_calls=0, flops=0, num_bytes=0)) for part in (before, after))
        mixed.append(
            replace(
                work,
                num_calls=max(1, _mix(one.num_calls, other.num_calls, share)),
                flops=_mix(one.flops, other.flops, share),
                num_bytes=_mix(one.num_bytes, other.num_bytes, share),
            )
        )
    return mixed


def _key(work: Work) -> tuple[Any, ...]:
    return (work.name, work.phase, work.shape, work.dtype, work.micro_batch)
