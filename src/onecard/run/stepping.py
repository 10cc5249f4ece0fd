"""One step of a run, with the compiler or without."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from onecard.errors import InputError
from onecard.model.decoder import CompilerError
from onecard.model.shortage import is_out_of_memory
from onecard.training.micro_batch import MicroBatch
from onecard.training.state import TrainState
from onecard.training.step import StepStats, train_step


def make_step(state: TrainState, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepStats:
    """Makes the update of the step that a state stands before.

    Where torch.compile fails, the step is made without it, and so are all that follow: the plan of the state and
    `state.decoder.failure` tell.
    """
    try:
        return _train(state, micro_batches, learning_rate)
    except (CompilerError, TorchDynamoException) as error:  # the backward pass is compiled when it first runs
        if is_out_of_memory(error):
            raise
        if state.ranks.is_several:  # the others may have compiled, and would go on with other kernels
            raise InputError(
                f"torch.compile failed on {state.ranks.place} ({str(error).splitlines()[0]}): set torch_compile false"
            ) from error
        state.decoder.to_eager(str(error))
    state.optimizer.forget_gradients()
    reasons = state.plan.reasons | {"torch_compile": "the compiler failed in the run"}
    state.plan = state.plan.model_copy(update={"torch_compile": False, "reasons": reasons})
    return _train(state, micro_batches, learning_rate)


def _train(state: TrainState, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepStats:
    plan, step = state.plan, state.progress.step
    if plan.seeds_micro_batches or state.ranks.is_several:
        micro_batches = [
            replace(batch, seed=_seed_of(plan.seed, step, state.ranks.index_of(own)))
            for own, batch in enumerate(micro_batches)
        ]
    seed_step(plan.seed, step)
    return train_step(state, micro_batches, learning_rate, max_grad_norm=state.plan.optimizer.max_grad_norm)


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout of one step from (seed, step), so that a resumed run draws what an uninterrupted one would."""
    torch.manual_seed(_seed_of(seed, step))


def _seed_of(seed: int, step: int, micro_batch: int = 0) -> int:
    # The odd number keeps micro-batches apart from steps: 2**64 divided by the golden ratio.
    return (seed * 1_000_003 + step + micro_batch * 0x9E37_79B9_7F4A_7C15) & 0x7FFF_FFFF_FFFF_FFFF


def to_host(stats: StepStats) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts one copy of all statistics; the event tells when it has arrived."""
    finite = (stats.is_finite.float(), stats.own_is_finite.float())
    values = torch.stack([stats.loss, stats.gradient_norm, stats.num_targets.float(), *finite])
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
