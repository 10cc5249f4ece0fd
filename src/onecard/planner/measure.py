"""Short measurements on the device of a run."""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException

from onecard.data import NO_TARGET, Batch
from onecard.data.chats.batches import BatchShape, lay_out
from onecard.model.decoder import CompilerError
from onecard.model.loss import sum_loss
from onecard.spec import Plan
from onecard.training.assemble import DTYPES, assemble
from onecard.training.micro_batch import MicroBatch
from onecard.training.state import TrainState
from onecard.training.step import place, train_step

_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
_PEAK_REPEATS = 5
# The first steps of a process are slow, so only the second half of the measured ones counts.
_STEP_REPEATS = 12
_STEP_BUDGET_S = 4.0
_STEP_TOKENS = 4096
# Rounds over the sizes that are tried, besides the first one, which makes kernels.
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 6


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
    batches, share = (_random_chats if plan.task == "sft" else _random_rows)(plan, state.device.type == "cpu")
    micro_batches = [place(batch, state) for batch in batches]
    times: list[float] = []
    while len(times) < 2 or (len(times) < _STEP_REPEATS and sum(times) < budget_s):
        started = time.perf_counter()
        _step(state, micro_batches)
        synchronize(plan.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[len(times) // 2 :]) / share


def measure_micro_batches(plan: Plan, sizes: Sequence[int], budget_s: float) -> dict[int, float]:
    """Seconds that a step takes for all its forward and backward passes, by the size of its micro-batches.

    Sizes grow, and those that the budget does not reach are left out; nothing is told of a single one. They take turns
    and the least of each counts, because whatever else the machine does only adds.
    """
    state = assemble(plan.model_copy(update={"torch_compile": False}))
    tried: dict[int, tuple[list[MicroBatch], float]] = {}
    times: dict[int, list[float]] = {}
    spent_s = last_s = 0.0
    for size in sizes:
        round_s = sum(seconds[0] for seconds in times.values())
        # Twice the size takes about twice the time.
        if spent_s + 2 * last_s + _LEAST_ROUNDS * (round_s + 2 * last_s) > budget_s:
            break
        of_size = plan.model_copy(update={"micro_batch_size": size})
        batches, share = (_random_chats if plan.task == "sft" else _random_rows)(of_size, False)
        placed = [place(batch, state) for batch in batches]
        tried[size], last_s = (placed, share), _time_passes(state, placed)
        times[size], spent_s = [last_s], spent_s + last_s
    if len(tried) < 2:
        return {}
    for number in range(_MOST_ROUNDS):
        for size, (placed, _) in tried.items():
            times[size].append(_time_passes(state, placed))
            spent_s += times[size][-1]
        if number + 1 >= _LEAST_ROUNDS and spent_s > budget_s / 2:
            break
    return {size: min(times[size][1:]) / share for size, (_, share) in tried.items()}


def _time_passes(state: TrainState, micro_batches: list[MicroBatch]) -> float:
    started = time.perf_counter()
    for batch in micro_batches:
        hidden, targets = state.decoder(batch.ids, batch.borders), batch.targets.flatten()
        if batch.target_index is not None:
            hidden, targets = hidden.index_select(0, batch.target_index), targets.index_select(0, batch.target_index)
        weight_gradient = state.optimizer.gradient_of(state.head.weight_VD)
        sum_loss(hidden, state.head, targets, state.loss_scale.value / targets.numel(), weight_gradient).backward()
    return time.perf_counter() - started


def random_step(plan: Plan) -> list[Batch]:
    """A whole step of random tokens in the shape that the text or the chats of a plan give it."""
    if plan.task == "sft":
        return _chats(plan, plan.total_batch_size)
    sizes = [min(plan.micro_batch_size, plan.total_batch_size - at) for at in _starts(plan)]
    return [_rows(plan, size, plan.seed + number) for number, size in enumerate(sizes)]


def _starts(plan: Plan) -> range:
    return range(0, plan.total_batch_size, plan.micro_batch_size)


def _random_rows(plan: Plan, is_cpu: bool) -> tuple[list[Batch], float]:
    """A micro-batch of running text, and its share of a step."""
    rows = max(1, min(plan.micro_batch_size, _STEP_TOKENS // plan.max_seq_length if is_cpu else plan.micro_batch_size))
    return [_rows(plan, rows, plan.seed)], rows / plan.rows_per_step


def _rows(plan: Plan, rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(plan.corpus.vocab_size, (rows, plan.max_seq_length + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, rows * plan.max_seq_length)


def _random_chats(plan: Plan, is_cpu: bool) -> tuple[list[Batch], float]:
    """So many chats as one micro-batch holds, or as few thousand tokens are, and their share of a step."""
    most_tokens = _STEP_TOKENS if is_cpu else plan.micro_batch_size * plan.max_seq_length
    count = max(1, min(plan.total_batch_size, most_tokens // _mean_length(plan)))
    return _chats(plan, count), count / plan.total_batch_size


def _mean_length(plan: Plan) -> int:
    facts = plan.corpus
    assert facts.num_train_rows
    return min(plan.max_seq_length, max(2, round(facts.num_train_tokens / facts.num_train_rows)))


def _chats(plan: Plan, count: int) -> list[Batch]:
    """Chats around the mean length of those there are, with as many targets, laid out as the run will."""
    facts, mean = plan.corpus, _mean_length(plan)
    spread = min(mean - 2, plan.max_seq_length - mean)
    target_share = (facts.num_target_tokens or facts.num_train_tokens) / facts.num_train_tokens
    generator = np.random.default_rng(plan.seed)
    pairs = []
    for length in generator.permutation(np.linspace(mean - spread, mean + spread, count).round().astype(int)).tolist():
        ids = generator.integers(0, facts.vocab_size, length)
        num_prompt = min(length - 2, int((1 - target_share) * length))
        pairs.append((ids[:-1], np.where(np.arange(1, length) > num_prompt, ids[1:], NO_TARGET)))
    shape = BatchShape(plan.max_seq_length, plan.micro_batch_size, plan.packing, plan.has_static_shapes)
    return lay_out(pairs, shape, facts.separator_id)


def _step(state: TrainState, micro_batches: list[MicroBatch]) -> None:
    settings = state.plan.optimizer
    try:
        train_step(state, micro_batches, settings.learning_rate, max_grad_norm=settings.max_grad_norm)
    except (CompilerError, TorchDynamoException):  # the run itself will say so and go on without it, too
        state.decoder.to_eager()
        state.optimizer.zero_grad()
        train_step(state, micro_batches, settings.learning_rate, max_grad_norm=settings.max_grad_norm)


def synchronize(device: str) -> None:
    """Waits for the GPU; a CPU is never ahead."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
