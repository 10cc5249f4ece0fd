"""One update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.data import Batch
from onecard.model.attention import find_borders
from onecard.model.loss import IGNORE, find_targets, sum_loss
from onecard.training.micro_batch import MicroBatch
from onecard.training.state import TrainState


@dataclass(frozen=True)
class StepStats:
    """What one update gives back, as 0-d tensors on the device; the loss is a mean over target tokens.

    `own_is_finite` is about the part of the loss that this rank has computed.
    """

    loss: Tensor
    gradient_norm: Tensor
    num_targets: Tensor
    is_finite: Tensor
    own_is_finite: Tensor


def place(batch: Batch, state: TrainState) -> MicroBatch:
    """Moves a batch to the device of the state without waiting for the copy."""
    rows, tokens = batch.ids.shape
    # Document by document, dropout is drawn in another order: the last row of a step, when it is alone, keeps its own.
    borders = find_borders(
        batch.documents,
        (rows, tokens),
        state.head.weight_VD,
        state.plan.attn_implementation,
        by_mask=state.decoder.is_compiled or (state.plan.model.dropout > 0 and tokens <= state.plan.max_seq_length),
    )
    ids, targets = (tensor.to(state.device, non_blocking=True) for tensor in (batch.ids, batch.targets))
    return MicroBatch(ids, targets, borders, find_targets(batch.targets, batch.num_targets, state.device))


def train_step(
    state: TrainState, micro_batches: Sequence[MicroBatch], learning_rate: float, *, max_grad_norm: float | None
) -> StepStats:
    """Makes one optimizer update: the loss is summed over targets and divided once by their number.

    The result does not depend on how the samples are cut into micro-batches. A non-finite loss or gradient leaves
    weights and moments as they are, decided on the device: nothing here reads a tensor's value, writes or prints.
    An error before the update is applied leaves them, too; `state.is_updating` says whether it came later. Of several
    ranks each gives its share of the micro-batches, at least one, and all make the same update.
    """
    num_targets = torch.stack([(batch.targets != IGNORE).sum() for batch in micro_batches]).sum()
    num_targets = state.ranks.sum(num_targets)
    factor = state.loss_scale.value / num_targets.clamp(min=1)
    loss_sum = torch.zeros((), device=state.device)
    for number, batch in enumerate(micro_batches, 1):
        if batch.seed is not None:
            torch.manual_seed(batch.seed)
        loss_sum += _backward(state, batch, factor, is_last=number == len(micro_batches))
    own_is_finite = torch.isfinite(loss_sum)
    loss_sum = state.ranks.sum(loss_sum)
    gradient_norm = state.optimizer.gradient_norm()
    if state.spread is not None:
        gradient_norm = state.spread.norm_of_all(gradient_norm)
    gradient_norm = gradient_norm / state.loss_scale.value
    is_finite = torch.isfinite(loss_sum) & torch.isfinite(gradient_norm)
    if max_grad_norm is not None or state.loss_scale.is_dynamic:
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        state.optimizer.scale_gradients((limit / (gradient_norm + 1e-6)).clamp(max=1.0) / state.loss_scale.value)
    stats = StepStats(loss_sum / num_targets.clamp(min=1), gradient_norm, num_targets, is_finite, own_is_finite)
    state.optimizer.claim_scratch()
    state.is_updating = True
    state.optimizer.step(learning_rate, is_finite)
    state.loss_scale.update(is_finite)
    state.is_updating = False
    state.optimizer.zero_grad()
    return stats


def sum_micro_batch(state: TrainState, batch: MicroBatch, factor: Tensor, *, adds_head: bool = True) -> Tensor:
    """Sums the loss of a micro-batch over its targets, 0-d; its gradient is that of the sum times `factor`.

    The gradient of the head's weight is added in this forward pass; without `adds_head` it goes through autograd.
    """
    hidden, targets = state.decoder(batch.ids, batch.borders), batch.targets.flatten()
    if batch.target_index is not None:
        # In chats often half of the tokens are no target, and the head may be a fifth of the work.
        hidden, targets = hidden.index_select(0, batch.target_index), targets.index_select(0, batch.target_index)
    head_gradient = state.optimizer.gradient_of(state.head.weight_VD) if adds_head else None
    return sum_loss(hidden, state.head, targets, factor, head_gradient)


def _backward(state: TrainState, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
    if state.spread is not None:
        return state.spread.backward(batch, factor, is_last=is_last)
    loss = sum_micro_batch(state, batch, factor)
    loss.backward()
    return loss.detach()
