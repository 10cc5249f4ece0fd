"""Short measurements on the device of a run."""

import statistics
import time

import torch
from torch._dynamo.exc import TorchDynamoException

from onecard.data import Batch
from onecard.model.decoder import CompilerError
from onecard.spec import Plan
from onecard.training.assemble import DTYPES, assemble
from onecard.training.state import TrainState
from onecard.training.step import MicroBatch, place, train_step

_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
_PEAK_REPEATS = 5
# The first steps of a process are slow, so only the second half of the measured ones counts.
_STEP_REPEATS = 12
_STEP_BUDGET_S = 4.0
_STEP_TOKENS = 4096


def measure_peak(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product on random data: the best of a few, for the share of peak."""
    size = _PEAK_SIZE[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    times = []
    for _ in range(_PEAK_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def measure_step(plan: Plan, budget_s: float = _STEP_BUDGET_S) -> float:
    """Seconds of one optimizer update, from a few on random tokens with a model of its own that is thrown away.

    On a CPU, where time is proportional to tokens, a step is cut to a few thousand of them and scaled up.
    """
    state = assemble(plan)
    is_cpu = state.device.type == "cpu"
    rows = max(1, min(plan.micro_batch_size, _STEP_TOKENS // plan.max_seq_length if is_cpu else plan.micro_batch_size))
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(plan.corpus.vocab_size, (rows, plan.max_seq_length + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, rows * plan.max_seq_length)
    micro_batch = place(batch, state)
    times: list[float] = []
    while len(times) < 2 or (len(times) < _STEP_REPEATS and sum(times) < budget_s):
        started = time.perf_counter()
        _step(state, micro_batch)
        synchronize(plan.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[len(times) // 2 :]) * plan.rows_per_step / rows


def _step(state: TrainState, micro_batch: MicroBatch) -> None:
    settings = state.plan.optimizer
    try:
        train_step(state, [micro_batch], settings.learning_rate, max_grad_norm=settings.max_grad_norm)
    except (CompilerError, TorchDynamoException):  # the run itself will say so and go on without it, too
        state.decoder.to_eager()
        state.optimizer.zero_grad()
        train_step(state, [micro_batch], settings.learning_rate, max_grad_norm=settings.max_grad_norm)


def synchronize(device: str) -> None:
    """Waits for the GPU; a CPU is never ahead."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
