"""Held-out loss: exact over the blocks it is given, whatever their batch size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.data import Batch
from onecard.evaluation.paired import Items
from onecard.model.attention import find_borders
from onecard.model.decoder import Decoder
from onecard.model.loss import IGNORE, Head, find_targets, token_losses


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss per target token in nats; the standard error treats blocks as independent."""

    loss: float
    standard_error: float
    num_target_tokens: int

    def bits_per_byte(self, num_tokens: int, num_bytes: int) -> float:
        """Loss in bits per byte of text, for a held-out text of so many tokens and UTF-8 bytes."""
        return self.loss / math.log(2) * num_tokens / num_bytes


def measure_heldout_loss(model: PreTrainedModel, head: Head, batches: Iterable[Batch], backend: str) -> HeldoutLoss:
    """Measures the loss over all targets of `batches`, without dropout, in the model's own precision."""
    return summarize(measure_blocks(model, head, batches, backend))


@torch.no_grad()
def measure_blocks(model: PreTrainedModel, head: Head, batches: Iterable[Batch], backend: str) -> Items:
    """Sums the loss of each row of `batches` and counts its targets, without dropout, in the model's own precision.

    Sums run in float64 on the host, so that neither order nor batch size shows in their ratio beyond kernel rounding.
    """
    # Not compiled: another mode and another batch size would each cost a compilation, for a short pass.
    decoder = Decoder(model, compiled=False)
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    try:
        for batch in batches:
            sum_B, count_B = sum_rows(decoder, head, batch, backend)
            sums.append(sum_B)
            counts.append(count_B)
    finally:
        model.train(was_training)
    return Items(_on_host(sums), _on_host(counts))


@torch.no_grad()
def sum_rows(decoder: Decoder, head: Head, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    """Sums the loss of each row in float64 and counts its targets, both [B] on the device."""
    like, (rows, tokens) = head.weight_VD, batch.ids.shape
    ids, targets = (tensor.to(like.device, non_blocking=True) for tensor in (batch.ids, batch.targets))
    hidden = decoder(ids, find_borders(batch.documents, (rows, tokens), like, backend))
    index_n = find_targets(batch.targets, batch.num_targets, like.device)
    if index_n is None:
        losses = token_losses(hidden, head, targets.flatten())
    else:  # of chats often half of the tokens, and the head may be a fifth of the work
        chosen = token_losses(hidden.index_select(0, index_n), head, targets.flatten().index_select(0, index_n))
        losses = chosen.new_zeros(rows * tokens).index_copy_(0, index_n, chosen)
    return losses.view(rows, tokens).double().sum(1), (targets != IGNORE).sum(1)


def summarize(blocks: Items) -> HeldoutLoss:
    """Gives the mean loss per target token over blocks."""
    return HeldoutLoss(*blocks.ratio(), int(blocks.counts.sum()))


def _on_host(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0)  # of few batches a rank may have none
