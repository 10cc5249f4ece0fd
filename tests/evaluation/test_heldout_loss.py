"""The held-out loss is exact, whatever the batches."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onecard.data import NO_TARGET, Batch
from onecard.data.chats.batches import BatchShape, lay_out
from onecard.evaluation.heldout import HeldoutLoss, measure_heldout_loss, summarize
from onecard.evaluation.paired import Items
from onecard.model.loss import Head
from onecard.training.state import TrainState


def blocks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 97, (7, 17), generator=generator)
    targets = ids[:, 1:].clone()
    targets[6, 5:] = -100
    documents = torch.zeros(7, 16, dtype=torch.int32)
    documents[2, 9:] = 1
    return ids[:, :-1].contiguous(), targets, documents


def batches(size: int) -> list[Batch]:
    ids, targets, documents = blocks()
    return [
        Batch(a, b, c, int((b != -100).sum()))
        for a, b, c in zip(ids.split(size), targets.split(size), documents.split(size), strict=True)
    ]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_the_loss_is_exact_and_without_dropout(name: str, tiny_state: Callable[..., TrainState]) -> None:
    state = tiny_state(name, dropout=0.5)
    state.model.train()
    results = [measure_heldout_loss(state.model, state.head, batches(size), "sdpa") for size in (1, 3, 7)]
    assert state.model.training
    assert {result.num_target_tokens for result in results} == {7 * 16 - 11}
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.standard_error == pytest.approx(results[0].standard_error, rel=1e-4)

    ids, targets, _ = blocks()
    pieces = [(row, slice(0, 16)) for row in range(7) if row != 2] + [(2, slice(0, 9)), (2, slice(9, 16))]
    total = 0.0
    with torch.no_grad():
        state.model.eval()
        for row, span in pieces:
            logits = state.model(input_ids=ids[row, span][None]).logits[0]
            total += float(F.cross_entropy(logits, targets[row, span], ignore_index=-100, reduction="sum"))
    assert results[0].loss == pytest.approx(total / (7 * 16 - 11), rel=1e-5)


def test_the_standard_error_is_that_of_a_mean_over_blocks() -> None:
    losses = np.array([30.0, 34.0, 38.0, 26.0])
    result = summarize(Items(losses, np.full(4, 10)))
    means = losses / 10
    assert result.loss == pytest.approx(3.2)
    assert result.standard_error == pytest.approx(float(means.std(ddof=1) / 2))
    # One block says nothing about the spread.
    assert summarize(Items(losses[:1], np.array([10]))).standard_error == 0.0


def test_bits_per_byte() -> None:
    assert HeldoutLoss(2 * math.log(2), 0.0, 10).bits_per_byte(num_tokens=30, num_bytes=120) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_the_loss_over_conversations_depends_on_neither_batch_size_nor_packing(
    name: str, tiny_state: Callable[..., TrainState]
) -> None:
    state = tiny_state(name)
    generator = np.random.default_rng(0)
    pairs = []
    for length in generator.integers(2, 16, 12).tolist():
        ids = generator.integers(1, 97, length + 1)
        pairs.append((ids[:-1], np.where(np.arange(length) % 3 == 1, ids[1:], NO_TARGET)))
    losses = [
        measure_heldout_loss(state.model, state.head, lay_out(pairs, BatchShape(16, size, packing), 0), "sdpa").loss
        for size, packing in ((1, "off"), (5, "off"), (2, "rows"), (4, "rows"), (2, "flat"))
    ]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


def test_the_head_runs_on_targets_alone(tiny_state: Callable[..., TrainState], monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.evaluation import heldout

    state, seen = tiny_state(), list[int]()
    losses_of = heldout.token_losses

    def watch(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return losses_of(hidden, head, targets)

    monkeypatch.setattr(heldout, "token_losses", watch)
    result = measure_heldout_loss(state.model, state.head, batches(3), "sdpa")
    assert sum(seen) == result.num_target_tokens == 7 * 16 - 11
