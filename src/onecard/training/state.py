"""Exactly what a checkpoint holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.distributed.ranks import SOLO, Ranks
from onecard.model.decoder import Decoder
from onecard.model.loss import Head
from onecard.spec import Plan
from onecard.training.micro_batch import MicroBatch
from onecard.training.optimizer import Optimizer

Found = TypeVar("Found")

# Growth and backoff of the fp16 loss scale, as in torch.amp.GradScaler.
_SCALE_GROWTH = 2.0
_SCALE_BACKOFF = 0.5
_SCALE_INTERVAL = 2000


@dataclass
class Progress:
    """Where a run stands, in plain numbers. `best_loss` and what follows belong to early stopping.

    The random state needs no place here: dropout of step s is seeded by (seed, s), and the order of samples is a
    function of (seed, position).

    `rate_factor` multiplies the learning rate. A run that had to go back `num_retreats` times in a row did so from
    `failed_step` to `retreat_step` the last time.
    """

    step: int = 0
    position: int = 0
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    heldout_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    num_evaluations_without_gain: int = 0
    num_refused_in_a_row: int = 0
    rate_factor: float = 1.0
    num_retreats: int = 0
    retreat_step: int = 0
    failed_step: int = 0


@dataclass
class LossScale:
    """Scale of the loss in fp16, on the device; one and constant in other precisions."""

    value: Tensor
    num_good_steps: Tensor
    is_dynamic: bool

    @classmethod
    def make(cls, precision: str, device: torch.device) -> "LossScale":
        is_dynamic = precision == "fp16"
        return cls(
            torch.full((), 65536.0 if is_dynamic else 1.0, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
            is_dynamic,
        )

    def update(self, is_finite: Tensor) -> None:
        """Halves the scale after a refused update and doubles it after a long row of good ones."""
        if self.is_dynamic:
            torch._amp_update_scale_(
                self.value, self.num_good_steps, (~is_finite).float(), _SCALE_GROWTH, _SCALE_BACKOFF, _SCALE_INTERVAL
            )


class Spread(Protocol):
    """How the gradients of several ranks become one; `is_whole`: whether each rank has the whole model."""

    is_whole: bool

    def backward(self, batch: MicroBatch, factor: Tensor, *, is_last: bool) -> Tensor:
        """Adds the gradients of a micro-batch and gives its loss; at the last one at the latest they cross."""

    def norm_of_all(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from that of those which this rank has."""

    def inside(self, run: Callable[[], Found]) -> Found:
        """Runs what needs whole weights and no gradients."""

    def gather(self) -> dict[str, dict[str, Tensor]] | None:
        """Masters and moments that the ranks have in parts, whole; None where each has them whole."""


@dataclass
class TrainState:
    """A model in training: its weights, optimizer, scale, progress and the plan it follows.

    `is_updating` is true while an update is applied: an error then leaves weights and moments torn. `ranks` are the
    processes that train it together; `spread` sums their gradients and knows who has what of the state.
    """

    plan: Plan
    model: PreTrainedModel
    decoder: Decoder
    head: Head
    optimizer: Optimizer
    loss_scale: LossScale
    progress: Progress
    is_updating: bool = False
    ranks: Ranks = SOLO
    spread: Spread | None = None

    @property
    def device(self) -> torch.device:
        return self.head.weight_VD.device

    @property
    def is_in_parts(self) -> bool:
        """Whether no rank has the whole model: what uses its weights is then done by all ranks, in step."""
        return self.spread is not None and not self.spread.is_whole

    def inside(self, run: Callable[[], Found]) -> Found:
        """Runs what uses the weights, such as an evaluation."""
        return run() if self.spread is None else self.spread.inside(run)

    def gather(self) -> dict[str, dict[str, Tensor]] | None:
        """Masters and moments, whole, where the ranks have them in parts; None where they are there."""
        return None if self.spread is None else self.spread.gather()
