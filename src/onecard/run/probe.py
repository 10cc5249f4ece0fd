"""The fullest moments of a run, tried before its first step: out of memory comes in the first second or not at all."""

import torch

from onecard.data import Batch
from onecard.evaluation.heldout import sum_rows
from onecard.model.decoder import CompilerError, Decoder
from onecard.training.state import LossScale, TrainState
from onecard.training.step import place, train_step


def probe_worst_case(state: TrainState) -> int | None:
    """Runs a step over full micro-batches and an evaluation batch; gives the bytes reserved on a GPU, None on a CPU.

    The step is the run's own and is refused at its end as a non-finite one would be: weights and moments stay as they
    are, bit for bit.
    """
    plan = state.plan
    num_micro_batches = min(2, plan.num_micro_batches)
    batches = [place(_full_batch(state, plan.micro_batch_size), state) for _ in range(num_micro_batches)]
    scale, state.loss_scale = state.loss_scale, _not_a_number(state.device)
    try:
        train_step(state, batches, plan.optimizer.learning_rate, max_grad_norm=plan.optimizer.max_grad_norm)
    except CompilerError:
        state.optimizer.zero_grad()  # the loop meets it again at its first step, says so, and goes on without
    finally:
        state.loss_scale = scale
    state.model.eval()
    decoder = Decoder(state.model, compiled=False)
    sum_rows(decoder, state.head, _full_batch(state, plan.eval_batch_size), plan.attn_implementation)
    state.model.train()
    if state.device.type != "cuda":
        return None
    torch.cuda.synchronize(state.device)
    return torch.cuda.max_memory_reserved(state.device)


def _full_batch(state: TrainState, rows: int) -> Batch:
    """A batch in which documents end inside the rows where the text has more than one: their masks take memory."""
    shape = (rows, state.plan.max_seq_length)
    ids = torch.zeros(shape, dtype=torch.int64)
    documents = None
    if state.plan.has_borders:
        documents = torch.zeros(shape, dtype=torch.int32)
        documents[:, shape[1] // 2 :] = 1
    return Batch(ids, ids.clone(), documents, ids.numel())


def _not_a_number(device: torch.device) -> LossScale:
    return LossScale(torch.full((), float("nan"), device=device), torch.zeros((), dtype=torch.int32), is_dynamic=False)
