"""The head and the loss: from hidden states to the sum over targets, a chunk of tokens at a time.

Shapes: N tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from onecard.errors import InputError
from onecard.model.new_tokens import GrownHead, write_rows
from onecard.model.target import device_kind

IGNORE = -100  # target of a token that is not in the loss, as in torch.nn.functional.cross_entropy

# Logits of one chunk in fp32: on a CPU near the last-level cache, on a GPU enough to fill the card.
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}

# Gemma, RecurrentGemma, xLSTM.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

ChunkSize = int | Literal["full"] | None


@dataclass(frozen=True)
class Head:
    """The output projection and what some do to its logits: `scale` (Granite, Cohere), `softcap` (Gemma 2).

    `rows_ND`: the rows of `tokens_N`, where these move and the rest of the weight is frozen (`new_tokens.py`).
    `chunk_size`: tokens whose logits exist at once; None is `usual_chunk_size`.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    rows_ND: Tensor | None = None
    tokens_N: Tensor | None = None
    chunk_size: ChunkSize = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the dtype of `hidden_ND`, before `finish`."""
        return F.linear(hidden_ND, self.weight_VD, self.bias_V)

    def finish(self, logits_NV: Tensor) -> Tensor:
        """Logits as the architecture defines them, in fp32."""
        logits_NV = logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def find_head(model: PreTrainedModel, chunk_size: ChunkSize = None) -> Head:
    """Finds the head of a causal language model from its config and output embedding."""
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        raise InputError(
            f"{type(model).__name__} has no linear output head, so its loss cannot be computed in chunks: "
            "choose a causal language model of transformers"
        )
    config = model.config
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    rows_ND, tokens_N = (projection.rows, projection.tokens_N) if isinstance(projection, GrownHead) else (None, None)
    return Head(projection.weight, projection.bias, scale, softcap, rows_ND, tokens_N, chunk_size)


def usual_chunk_size(vocab_size: int, width: int, device_kind: str) -> int:
    """Tokens whose logits a device works on best at once: `device_kind` is cpu or cuda."""
    # Each chunk adds to the whole gradient of the head: on a CPU that takes longer than the product of a few rows, 2.0
    # against 0.9 s for 1,123 tokens at 49,152 x 576 in bf16 (LOG.md).
    least = width // 2 if device_kind == "cpu" else 0
    return max(64, least, _CHUNK_BYTES[device_kind] // (4 * vocab_size))


def find_targets(targets_BT: Tensor, num_targets: int, device: torch.device) -> Tensor | None:
    """Finds which of the flattened tokens have a target, [n] int64 on `device`; None where all have.

    On the host, where targets and their number are known: the device need not be asked. Of fake targets, which have no
    values, the first stand for any.
    """
    if num_targets == targets_BT.numel():
        return None
    if isinstance(targets_BT, FakeTensor):
        index_n = torch.arange(num_targets)
    else:
        index_n = (targets_BT.flatten() != IGNORE).nonzero().flatten()
    return (index_n.pin_memory() if device.type == "cuda" else index_n).to(device, non_blocking=True)


def sum_loss(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    factor: Tensor | None = None,
    weight_gradient_VD: Tensor | None = None,
) -> Tensor:
    """Sums the cross entropy over all targets that are not `IGNORE`, as a 0-d fp32 tensor.

    Its gradient is that of the sum times `factor` (0-d), which is applied before the gradients of the logits are
    rounded to 16 bits: in fp16 those of unlikely words would otherwise vanish before any loss scale reached them.

    With gradients enabled, the gradients of hidden states and head are computed chunk by chunk in the forward pass,
    so that memory holds the logits of one chunk and nothing is computed twice (the idea of Liger's fused linear loss,
    arXiv 2410.10989). Where the fp32 `weight_gradient_VD` is given, the gradient of the head's weight is added to it at
    once instead of going through autograd, which would hold two more copies and round it to the type of the weight;
    the result may then be differentiated once, and only as it is.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head.weight_VD.requires_grad):
        factor = torch.ones((), device=hidden_ND.device) if factor is None else factor
        write_rows(head.weight_VD, head.rows_ND, head.tokens_N)
        weight_VD = head.weight_VD if weight_gradient_VD is None else head.weight_VD.detach()
        of = _Sum(targets_N, factor, head, weight_gradient_VD)
        loss: Tensor = _SumLoss.apply(hidden_ND, weight_VD, head.bias_V, head.rows_ND, of)
        return loss
    return token_losses(hidden_ND, head, targets_N).sum()


def token_losses(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Cross entropy of each token, [N] fp32, zero where the target is `IGNORE`; keeps no gradient."""
    losses = []
    write_rows(head.weight_VD, head.rows_ND, head.tokens_N)
    with torch.no_grad():
        for rows in _chunks(len(targets_N), head):
            logits = head.finish(head.logits(hidden_ND[rows]))
            losses.append(F.cross_entropy(logits, targets_N[rows], ignore_index=IGNORE, reduction="none"))
            del logits  # otherwise it outlives its chunk beside the logits of the next
    # A batch that fills a place beside those of other ranks has no targets.
    return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def score_tokens(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, [N] fp32, and whether it is the likeliest, [N]; logits of a chunk at a time."""
    write_rows(head.weight_VD, head.rows_ND, head.tokens_N)
    scores, verdicts = [], []
    for rows in _chunks(len(targets_N), head):
        logits = head.finish(head.logits(hidden_ND[rows]))
        scores.append(-F.cross_entropy(logits, targets_N[rows], reduction="none"))
        verdicts.append(logits.argmax(1) == targets_N[rows])
        del logits
    return torch.cat(scores), torch.cat(verdicts)


def _chunks(num_tokens: int, head: Head) -> list[slice]:
    if head.chunk_size == "full":
        return [slice(0, num_tokens)]
    vocab_size, width = head.weight_VD.shape
    size = head.chunk_size or usual_chunk_size(vocab_size, width, device_kind(head.weight_VD.device))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _loss_and_gradient(logits_NV: Tensor, targets_N: Tensor, head: Head, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the loss of one chunk and gives `factor` times its gradient by the raw logits, in the memory of `logits_NV`.

    One fp32 copy of the logits becomes scores, exponentials and gradient in turn: the chunk decides the peak of a step
    with a large vocabulary.
    """
    scores_NV = head.finish(logits_NV)
    is_target_N1 = (targets_N != IGNORE)[:, None]
    index_N1 = targets_N.clamp(min=0)[:, None]
    target_score_N1 = scores_NV.gather(1, index_N1)
    highest_N1 = scores_NV.amax(1, keepdim=True)
    slack_NV = None if head.softcap is None else 1 - (scores_NV / head.softcap) ** 2
    slope_NV = scores_NV.sub_(highest_N1).exp_()
    total_N1 = slope_NV.sum(1, keepdim=True)
    loss = torch.where(is_target_N1, highest_N1 + total_N1.log() - target_score_N1, 0.0).sum()
    weight_N1 = is_target_N1 * (head.scale * factor)
    slope_NV.mul_(weight_N1 / total_N1).scatter_add_(1, index_N1, -weight_N1)
    if slack_NV is not None:
        slope_NV *= slack_NV
    return loss, logits_NV.copy_(slope_NV)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _Sum(NamedTuple):
    targets_N: Tensor
    factor: Tensor
    head: Head
    weight_gradient_VD: Tensor | None


class _SumLoss(torch.autograd.Function):
    """Cross entropy of a linear head whose backward pass only multiplies."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, rows_ND, of):  # type: ignore[no-untyped-def]
        targets_N, factor, head, given_VD = of
        needs_hidden, needs_weight, needs_bias, needs_rows = ctx.needs_input_grad[:4]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # Chunks add up in fp32: 16-bit sums would lose the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else given_VD
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        grad_rows = torch.zeros_like(rows_ND, dtype=torch.float32) if needs_rows else None
        for rows in _chunks(len(targets_N), head):
            hidden = hidden_ND[rows]
            chunk_loss, slope_NV = _loss_and_gradient(head.logits(hidden), targets_N[rows], head, factor)
            loss += chunk_loss
            if grad_hidden is not None:
                torch.mm(slope_NV, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, slope_NV.T, hidden)
            if grad_bias is not None:
                grad_bias += slope_NV.sum(0, dtype=torch.float32)
            if grad_rows is not None:
                _add_product(grad_rows, slope_NV[:, head.tokens_N].T, hidden)
            del slope_NV  # as in `token_losses`
        ctx.save_for_backward(grad_hidden, grad_weight if needs_weight else None, grad_bias, grad_rows)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, grad_bias, grad_rows = ctx.saved_tensors
        # In place: beside all activations, a second fp32 copy of the head's gradient would often be the peak.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(grad_loss).to(ctx.weight_dtype)
        if grad_rows is not None:
            grad_rows = grad_rows.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, grad_rows, None
