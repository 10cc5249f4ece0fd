"""The fullest moments of a run, tried before its first step: out of memory comes in the first second or not at all."""

import torch

from onecard.data import NO_TARGET, Batch
from onecard.evaluation.heldout import sum_rows
from onecard.model.decoder import Decoder
from onecard.run.stepping import make_step
from onecard.spec import Plan
from onecard.training.state import LossScale, TrainState
from onecard.training.step import place


def probe_worst_case(state: TrainState) -> int | None:
    """Runs a step over full micro-batches and an evaluation batch; gives the bytes reserved on a GPU, None on a CPU.

    The step is the run's own and is refused at its end as a non-finite one would be: weights and moments stay as they
    are, bit for bit. Of a state in parts all ranks have to try it together.
    """
    probe_step(state)
    probe_evaluation(state)
    if state.device.type != "cuda":
        return None
    torch.cuda.synchronize(state.device)
    return torch.cuda.max_memory_reserved(state.device)


def probe_step(state: TrainState) -> None:
    """Runs a step over full micro-batches, which is refused at its end."""
    plan = state.plan
    num_micro_batches = min(2, -(-plan.num_micro_batches // state.ranks.num))
    batches = [place(_full_step_batch(plan), state) for _ in range(num_micro_batches)]
    scale, state.loss_scale = state.loss_scale, _not_a_number(state.device)
    try:
        make_step(state, batches, plan.optimizer.learning_rate)
    finally:
        state.loss_scale = scale


def probe_evaluation(state: TrainState) -> None:
    """Runs a full batch of an evaluation."""
    plan, decoder = state.plan, Decoder(state.model, compiled=False)
    state.model.eval()
    try:
        state.inside(lambda: sum_rows(decoder, state.head, _full_heldout_batch(plan), plan.attn_implementation))
    finally:
        state.model.train()


def _full_step_batch(plan: Plan) -> Batch:
    rows, tokens = plan.micro_batch_size, plan.max_seq_length
    shape = (1, rows * tokens) if plan.packing == "flat" else (rows, tokens)
    return _full_batch(plan, shape, has_borders=plan.has_borders)


def _full_heldout_batch(plan: Plan) -> Batch:
    """Held-out chats are never packed."""
    has_borders = plan.has_borders and plan.task == "pretrain"
    return _full_batch(plan, (plan.eval_batch_size, plan.max_seq_length), has_borders=has_borders)


def _full_batch(plan: Plan, shape: tuple[int, int], *, has_borders: bool) -> Batch:
    """A batch in which documents end inside the rows where there are borders: their masks take memory.

    Of chats nearly all tokens count: where all did, none would have to be picked out, which takes memory too.
    """
    ids = torch.zeros(shape, dtype=torch.int64)
    targets, documents = ids.clone(), None
    if plan.task == "sft":
        targets[0, 0] = NO_TARGET
    if has_borders:
        half = max(1, plan.max_seq_length // 2)
        documents = (torch.arange(shape[1], dtype=torch.int32) // half).expand(shape)
    return Batch(ids, targets, documents, int((targets != NO_TARGET).sum()))


def _not_a_number(device: torch.device) -> LossScale:
    return LossScale(torch.full((), float("nan"), device=device), torch.zeros((), dtype=torch.int32), is_dynamic=False)
