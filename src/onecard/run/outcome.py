"""A finished run beside its plan."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from onecard.hardware import Machine
from onecard.observe.events import StepEvent
from onecard.planner.compiled import CannotTraceCompiled
from onecard.planner.depth import trace_any_depth
from onecard.planner.device import Target, find_target
from onecard.planner.efficiency import default_efficiencies
from onecard.planner.forecast import uncorrected_memory
from onecard.planner.on_cpu import peak_process_bytes
from onecard.planner.outcomes import Outcome, remember
from onecard.planner.roofline import predict_time
from onecard.planner.trace_cache import CannotTrace
from onecard.run.folder import RunFolder
from onecard.spec import Plan

log = logging.getLogger("onecard.run")

# Steps that say how fast a run is: not the first ones, in which libraries load and compilers work.
_LEAST_STEPS = 20
_WARM_UP = 10
# On a CPU nothing is learned from a run, only told.
_LEAST_STEPS_ON_CPU = 3
_SETTINGS = (
    *("precision", "torch_compile", "attn_implementation", "gradient_checkpointing", "max_seq_length"),
    *("micro_batch_size", "total_batch_size", "eval_batch_size", "loss_chunk_size"),
)


def compare(folder: RunFolder, machine: Machine, steps: Sequence[StepEvent]) -> None:
    """Sets what a run took beside its plan: in its folder, and of a GPU for the next plan on this card.

    What a disk refuses is a warning: the run itself is done.
    """
    decided = folder.plan()
    if decided.forecast is None:
        return
    if decided.device == "cpu":
        outcome = make_outcome_on_cpu(decided, machine, steps, peak_process_bytes())
    else:
        outcome = make_outcome(decided, find_target(decided.device, machine), machine, steps)
    if outcome is None:
        return
    try:
        folder.write_outcome(outcome)
        if decided.device != "cpu":
            remember(outcome)
    except OSError as error:
        log.warning("what the run took beside its plan could not be written down: %s", error)


def make_outcome(plan: Plan, target: Target, machine: Machine, steps: Sequence[StepEvent]) -> Outcome | None:
    """Sets what a run on a known card took beside what was predicted; None where there is too little to tell."""
    peaks = [step.memory_bytes for step in steps if step.memory_bytes is not None]
    if target.card is None or target.capability is None or len(steps) < _LEAST_STEPS or not peaks:
        return None
    if target.num_ranks > 1:
        return None  # steps that wait for others teach nothing of the card
    try:
        trace = trace_any_depth(plan, target.capability).trace
    except (CannotTrace, CannotTraceCompiled):
        return None  # its forecast was no trace of its own step, so it teaches nothing
    predicted = predict_time(trace, plan, target.card, default_efficiencies(target.card))
    return Outcome(
        card=target.card.key,
        driver=machine.driver,
        **_circumstances(plan, machine),
        predicted_peak_bytes=uncorrected_memory(plan, target).peak_bytes,
        measured_peak_bytes=max(peaks),
        predicted_step_s=predicted.step_s,
        # What the card teaches is how fast it computes.
        measured_step_s=_typical_s(steps) * (plan.max_power_share or 1.0),
        seconds=dict(predicted.seconds),
    )


def make_outcome_on_cpu(plan: Plan, machine: Machine, steps: Sequence[StepEvent], peak_bytes: int) -> Outcome | None:
    """Sets what a run on a CPU took beside what was predicted; None where there is too little to tell."""
    if plan.forecast is None or plan.forecast.time is None or len(steps) < _LEAST_STEPS_ON_CPU:
        return None
    return Outcome(
        card=plan.forecast.card,
        driver=None,
        **_circumstances(plan, machine),
        predicted_peak_bytes=plan.forecast.memory.peak_bytes,
        measured_peak_bytes=peak_bytes,
        predicted_step_s=plan.forecast.time.step_s,
        measured_step_s=_typical_s(steps),
        seconds={},
    )


def _circumstances(plan: Plan, machine: Machine) -> dict[str, Any]:
    settings = {name: getattr(plan, name) for name in _SETTINGS}
    settings |= {"optimizer": plan.optimizer.name, "num_parameters": plan.model.num_parameters}
    settings["model_type"] = plan.model.settings.get("model_type")
    date = datetime.now(UTC).date().isoformat()
    return {"platform": machine.platform, "torch": version("torch"), "date": date, "settings": settings}


def _typical_s(steps: Sequence[StepEvent]) -> float:
    return statistics.median(step.step_s for step in steps[min(_WARM_UP, len(steps) // 2) :])
