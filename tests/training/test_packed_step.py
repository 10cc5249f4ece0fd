"""One update on packed conversations equals one on each alone, whatever is packed and whatever moves."""

from collections.abc import Callable, Sequence

import pytest
import torch

from onecard.data import Batch
from onecard.spec import AdaptPlan
from onecard.training.state import TrainState
from onecard.training.step import StepStats, place, train_step

StateFactory = Callable[..., TrainState]
Chat = tuple[torch.Tensor, torch.Tensor]
# (tokens, of them without a target at the start): one has no target at all.
CHATS = ((9, 3), (5, 4), (16, 2), (7, 7), (12, 6), (3, 1), (11, 0))


@pytest.fixture
def chats() -> list[Chat]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, num_masked in CHATS:
        ids, targets = torch.randint(1, 97, (2, length), generator=generator)
        targets[:num_masked] = -100
        made.append((ids, targets))
    return made


def rows_of(packed: Sequence[Sequence[Chat]]) -> Batch:
    """One row per list of chats; shorter rows end in padding, which is a document of its own."""
    length = max(sum(len(ids) for ids, _ in row) for row in packed)
    ids, documents = torch.zeros(2, len(packed), length, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for index, row in enumerate(packed):
        start = 0
        documents[index] = len(row)
        for number, (chat_ids, chat_targets) in enumerate(row):
            span = slice(start, start := start + len(chat_ids))
            ids[index, span], targets[index, span], documents[index, span] = chat_ids, chat_targets, number
    return Batch(ids, targets, documents.to(torch.int32), int((targets != -100).sum()))


def alone(chat: Chat) -> Batch:
    ids, targets = (tensor[None] for tensor in chat)
    return Batch(ids, targets, None, int((targets != -100).sum()))


def sharpen(state: TrainState) -> None:
    """Makes attention look somewhere: at the usual start it averages, and a wrong mask would hardly show."""
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
            if "lora_B" in name:  # zero at the start: the other half would have no gradient
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))


def update(state: TrainState, batches: Sequence[Batch], gradients: dict[str, torch.Tensor]) -> StepStats:
    """One update, with the gradients it is made from."""
    step = state.optimizer.step

    def keep(learning_rate: float, is_finite: torch.Tensor) -> None:
        gradients.update({n: m.grad.clone() for n, m in state.optimizer.masters.items() if m.grad is not None})
        step(learning_rate, is_finite)

    state.optimizer.step = keep  # type: ignore[method-assign]
    return train_step(state, [place(batch, state) for batch in batches], 1e-3, max_grad_norm=None)


def pack(form: str, chats: list[Chat]) -> list[Batch]:
    return {
        "flat": [rows_of([chats])],
        "flat micro-batches": [rows_of([chats[:2]]), rows_of([chats[2:3]]), rows_of([chats[3:]])],
        "rows": [rows_of([chats[:3], chats[3:5], chats[5:]])],
        "rows in micro-batches": [rows_of([chats[:3], chats[3:5]]), rows_of([chats[5:6], chats[6:]])],
    }[form]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("form", ["flat", "flat micro-batches", "rows", "rows in micro-batches"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_packed_chats_equal_separate_ones(
    name: str, form: str, method: str, chats: list[Chat], tiny_state: StateFactory
) -> None:
    adapt = None if method == "full" else AdaptPlan(method="lora", r=4)
    packed, separate = (tiny_state(name, optimizer="adamw", adapt=adapt, max_grad_norm=None) for _ in range(2))
    found: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for state in (packed, separate):
        sharpen(state)
    one = update(packed, pack(form, chats), found)
    other = update(separate, [alone(chat) for chat in chats], expected)

    assert one.num_targets.item() == other.num_targets.item() == sum(length - masked for length, masked in CHATS)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.gradient_norm, other.gradient_norm, rtol=1e-4, atol=0)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max(), msg=key)


def test_the_loss_is_the_mean_over_all_targets_of_a_step(chats: list[Chat], tiny_state: StateFactory) -> None:
    state = tiny_state("llama", optimizer="adamw")
    losses = []
    for ids, targets in chats:
        logits = state.model(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none"))
    expected = torch.cat(losses).sum() / sum(length - masked for length, masked in CHATS)
    stats = update(state, pack("flat micro-batches", chats), {})
    torch.testing.assert_close(stats.loss, expected.detach(), rtol=1e-5, atol=0)


def test_a_micro_batch_without_a_target_changes_nothing(chats: list[Chat], tiny_state: StateFactory) -> None:
    without = rows_of([[chats[3]]])
    assert without.num_targets == 0
    found: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    rest = [chat for index, chat in enumerate(chats) if index != 3]
    stats = update(tiny_state("qwen3"), [without, rows_of([rest]), without], found)
    other = update(tiny_state("qwen3"), [rows_of([rest])], expected)
    assert torch.equal(stats.loss, other.loss)
    assert {key for key, gradient in expected.items() if not torch.equal(found[key], gradient)} == set()
