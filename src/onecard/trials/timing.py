"""One setting, timed in this process: warm-up, then steps for some seconds."""

import gc
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onecard.data import TrainingData
from onecard.model.shortage import Shortage, attempt
from onecard.planner.measure import measure_peak
from onecard.planner.on_cpu import peak_process_bytes
from onecard.run.feed import Feed
from onecard.run.start import assemble_run
from onecard.spec import Plan
from onecard.training.schedule import rate_at
from onecard.trials.steps import Batches, Step, make_steps
from onecard.trials.synthetic import RandomBatches

# Kernels are chosen, memory is taken and code is compiled in the first steps.
_WARMUP_STEPS, _WARMUP_S = 3, 2.0
_LEAST_STEPS, _MOST_STEPS = 3, 2000


@dataclass(frozen=True)
class Timing:
    """Steps of one process, and what it had for them.

    `steps` holds seconds, tokens and seconds of waiting for data of each measured step. `peak_bytes` is what PyTorch's
    allocator reserved on a GPU, on a CPU the most the process held. `peak_flops` is a large matrix product in
    `peak_precision`, the better of before and after. `shortage` says how memory ran out, None where it did not.
    """

    first_step_s: float
    warmup_s: float
    steps: tuple[tuple[float, int, float], ...]
    peak_bytes: int
    peak_flops: float
    peak_precision: str
    is_compiled: bool
    shortage: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_setting(plan: Plan, corpus: TrainingData | None, seconds: float) -> Timing:
    """Trains as the plan says for a while; without a corpus on random tokens. The process is spent afterwards.

    Memory that runs out is no error here but an answer.
    """
    precision = _peak_precision(plan)
    before = measure_peak(plan.device, precision)
    _forget(plan.device)
    found = attempt(lambda: _time(plan, corpus, seconds), torch.device(plan.device))
    peak_bytes = _peak_bytes(plan.device)
    if isinstance(found, Shortage):
        return Timing(0.0, 0.0, (), peak_bytes, before, precision, plan.torch_compile, found.evidence)
    warmup, steps, is_compiled = found
    _forget(plan.device)
    return Timing(
        first_step_s=warmup[0].seconds,
        warmup_s=sum(step.seconds for step in warmup),
        steps=tuple((step.seconds, step.num_tokens, step.wait_s) for step in steps),
        peak_bytes=peak_bytes,
        peak_flops=max(before, measure_peak(plan.device, precision)),
        peak_precision=precision,
        is_compiled=is_compiled,
    )


def _time(plan: Plan, corpus: TrainingData | None, seconds: float) -> tuple[list[Step], list[Step], bool]:
    with ExitStack() as stack:
        state = assemble_run(plan, corpus, None)
        batches: Batches = RandomBatches(plan) if corpus is None else stack.enter_context(Feed(state, corpus))
        made = make_steps(state, batches, lambda step: plan.optimizer.learning_rate * rate_at(plan.schedule, step))
        warmup = [next(made)]
        while len(warmup) < _WARMUP_STEPS or sum(step.seconds for step in warmup[1:]) < min(_WARMUP_S, seconds):
            warmup.append(next(made))
        steps: list[Step] = []
        until = time.perf_counter() + seconds
        while len(steps) < _LEAST_STEPS or (time.perf_counter() < until and len(steps) < _MOST_STEPS):
            steps.append(next(made))
        return warmup, steps, state.decoder.is_compiled


def _peak_precision(plan: Plan) -> str:
    """What share of peak is told of: bf16 wherever a GPU has it, so that shares can be compared."""
    if plan.device.startswith("cuda") and torch.cuda.get_device_capability(plan.device) >= (8, 0):
        return "bf16"
    return plan.precision


def _forget(device: str) -> None:
    """Lets go of what came before, so that the peak is that of training."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else peak_process_bytes()
