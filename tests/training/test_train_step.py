"""One update: the same whatever the micro-batches, without a look at a tensor's value, and refused when not finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.data import Batch
from onecard.errors import InputError
from onecard.spec import Plan
from onecard.training.assemble import assemble
from onecard.training.micro_batch import MicroBatch
from onecard.training.optimizer import Optimizer
from onecard.training.state import LossScale, TrainState
from onecard.training.step import StepStats, place, train_step

StateFactory = Callable[..., TrainState]
BatchFactory = Callable[..., MicroBatch]
CPU = torch.device("cpu")


def cut(batch: MicroBatch, sizes: tuple[int, ...]) -> list[MicroBatch]:
    parts = zip(batch.ids.split(sizes), batch.targets.split(sizes), strict=True)
    return [MicroBatch(ids, targets, None) for ids, targets in parts]


def step(state: TrainState, *batches: MicroBatch) -> StepStats:
    optimizer = state.plan.optimizer
    return train_step(state, batches, optimizer.learning_rate, max_grad_norm=optimizer.max_grad_norm)


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of everything an update may change."""
    model = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    masters = {f"master.{name}": tensor for name, tensor in state.optimizer.masters.items()}
    gradients = {f"gradient.{name}": m.grad for name, m in state.optimizer.masters.items() if m.grad is not None}
    return {
        key: tensor.detach().clone()
        for key, tensor in (model | masters | gradients | state.optimizer.state_tensors()).items()
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [(1,) * 8, (3, 3, 2)], ids=str)
def test_micro_batches_do_not_show(
    sizes: tuple[int, ...], optimizer: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    # An epsilon above rounding: Adam's first step would otherwise turn the noise of a zero gradient into a full step.
    whole, parts = (tiny_state(optimizer=optimizer, adam_epsilon=1e-4, dropout=0.0) for _ in range(2))
    for seed in range(2):
        batch = random_micro_batch(8, seed)
        one, many = step(whole, batch), step(parts, *cut(batch, sizes))
        assert one.num_targets.item() == many.num_targets.item() == 8 * 16 - 28
        torch.testing.assert_close(one.loss, many.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.gradient_norm, many.gradient_norm, rtol=1e-4, atol=0)
    for name, master in whole.optimizer.masters.items():
        torch.testing.assert_close(parts.optimizer.masters[name], master, rtol=0, atol=2e-5)


def test_the_loss_is_the_mean_over_targets(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    state, batch = tiny_state(), random_micro_batch(8)
    logits = state.model(input_ids=batch.ids).logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(step(state, *cut(batch, (5, 3))).loss, expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_step_runs_on_tensors_without_values(
    optimizer: str,
    precision: str,
    gradient_checkpointing: bool,
    tiny_plan: Callable[..., Plan],
    random_micro_batch: BatchFactory,
) -> None:
    plan = tiny_plan(
        optimizer=optimizer, precision=precision, gradient_checkpointing=gradient_checkpointing, dropout=0.1
    )
    with FakeTensorMode():
        state = assemble(plan)
        batch = random_micro_batch(4)
        stats = step(state, *cut(batch, (3, 1)))
    assert stats.loss.shape == stats.is_finite.shape == ()
    assert {type(tensor).__name__ for tensor in state.optimizer.masters.values()} <= {"FakeTensor", "Parameter"}


class NoLook(TorchDispatchMode):
    """Refuses to hand a tensor's value to Python, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_borders", [True, False], ids=["borders", "plain"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_step_reads_no_value(name: str, has_borders: bool, tiny_state: StateFactory) -> None:
    # Not seen on tensors without values: transformers takes other ways there.
    state = tiny_state(name, optimizer="muon", dropout=0.1)
    documents = torch.tensor([[0] * 9 + [1] * 7], dtype=torch.int32) if has_borders else None
    ids = torch.arange(16)[None]
    batch = place(Batch(ids, ids, documents, 16), state)
    with NoLook():
        step(state, batch)
    with NoLook(), pytest.raises(AssertionError, match="a value was read"):
        torch.zeros(()).item()


def test_a_look_at_a_value_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match=r"_local_scalar_dense"):
        torch.zeros(()).item()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_recomputed_activations_give_the_same_update(
    name: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    kept, half, recomputed = (tiny_state(name, dropout=0.2, gradient_checkpointing=flag) for flag in (False, 0.5, True))
    for state in (kept, half, recomputed):
        torch.manual_seed(0)
        step(state, random_micro_batch(4))
    for state in (half, recomputed):
        assert differing(all_tensors(kept), all_tensors(state)) == []


@pytest.mark.parametrize("share", [False, 0.1, 0.5, 0.75, True])
def test_the_first_layers_recompute(
    share: float, settings_of: Callable[..., dict[str, Any]], tiny_state: StateFactory
) -> None:
    state = tiny_state(settings=settings_of("llama", num_hidden_layers=4), gradient_checkpointing=share)
    num_recomputed = {False: 0, 0.1: 1, 0.5: 2, 0.75: 3, True: 4}[share]
    flags = [layer.gradient_checkpointing for layer in state.model.base_model.layers]
    assert flags == [True] * num_recomputed + [False] * (4 - num_recomputed)


def test_a_share_of_layers_without_flags_of_their_own_is_refused(
    tiny_state: StateFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unused(nn.Module):
        pass

    monkeypatch.setattr("onecard.training.assemble.GradientCheckpointingLayer", Unused)
    tiny_state(gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"gradient_checkpointing 0\.5: qwen3 recomputes all of its layers or none"):
        tiny_state(gradient_checkpointing=0.5)


@contextmanager
def poisoned(state: TrainState, poison: str) -> Iterator[None]:
    """Makes the forward or the backward pass produce what is not finite, once."""

    def spoil(_: nn.Module, __: object, output: Tensor) -> Tensor:
        if poison == "gradient":
            output.register_hook(lambda gradient: gradient * float("inf"))
            return output
        return output * float(poison)

    handle = state.model.get_input_embeddings().register_forward_hook(spoil)
    yield
    handle.remove()


@pytest.mark.parametrize("poison", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_update_changes_nothing(
    optimizer: str, precision: str, poison: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, twin = (tiny_state(optimizer=optimizer, precision=precision) for _ in range(2))
    good = [random_micro_batch(4, seed) for seed in range(2)]
    for other in (state, twin):
        assert step(other, good[0]).is_finite.item()
    before = all_tensors(state)
    with poisoned(state, poison):
        stats = step(state, good[0], good[1])
    assert not stats.is_finite.item()
    assert differing(before, all_tensors(state)) == []

    for other in (state, twin):
        assert step(other, good[1]).is_finite.item()
    assert differing(all_tensors(state), all_tensors(twin)) == []
    changed = differing(before, all_tensors(state))
    moved = {key for key in changed if key.startswith("master.")}
    assert moved == {f"master.{name}" for name in state.optimizer.masters}


def test_a_batch_without_targets_has_loss_zero(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    state, batch = tiny_state(weight_decay=0.0), random_micro_batch(4)
    before = all_tensors(state)
    stats = step(state, MicroBatch(batch.ids, torch.full_like(batch.targets, -100), None))
    assert (stats.loss.item(), stats.num_targets.item(), stats.is_finite.item()) == (0.0, 0, True)
    assert [key for key in differing(before, all_tensors(state)) if not key.endswith(".step")] == []


def gradient_norm_at_update(
    state: TrainState, batch: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, float]:
    """The norm that the step reports, and that of the gradients which the optimizer gets."""
    seen: list[float] = []
    update = Optimizer.step

    def spy(self: Optimizer, learning_rate: float, is_finite: Tensor) -> None:
        seen.append(float(self.gradient_norm()))
        update(self, learning_rate, is_finite)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", spy)
        stats = step(state, batch)
    return stats.gradient_norm, seen[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_brings_the_norm_to_its_limit_and_leaves_smaller_ones(
    precision: str, tiny_state: StateFactory, random_micro_batch: BatchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_micro_batch(4)
    for limit in (None, 0.01, 1e6):
        state = tiny_state(max_grad_norm=limit, precision=precision)
        reported, applied = gradient_norm_at_update(state, batch, monkeypatch)
        assert 0.1 < reported < 100
        assert applied == pytest.approx(0.01 if limit == 0.01 else float(reported), rel=1e-4)


def test_the_loss_scale_halves_after_a_refusal_and_doubles_after_a_long_row() -> None:
    scale = LossScale.make("fp16", CPU)
    assert (scale.value.item(), scale.is_dynamic) == (65536.0, True)
    scale.update(torch.tensor(False))
    assert (scale.value.item(), scale.num_good_steps.item()) == (32768.0, 0)
    for _ in range(1999):
        scale.update(torch.tensor(True))
    assert (scale.value.item(), scale.num_good_steps.item()) == (32768.0, 1999)
    scale.update(torch.tensor(True))
    assert (scale.value.item(), scale.num_good_steps.item()) == (65536.0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_do_not_scale(precision: str) -> None:
    scale = LossScale.make(precision, CPU)
    scale.update(torch.tensor(False))
    assert (scale.value.item(), scale.is_dynamic) == (1.0, False)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_scale_does_not_show(
    optimizer: str, max_grad_norm: float | None, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    plain, scaled = (tiny_state(optimizer=optimizer, max_grad_norm=max_grad_norm) for _ in range(2))
    scaled.loss_scale = LossScale.make("fp16", CPU)
    for seed in range(3):
        batch = random_micro_batch(4, seed)
        one, other = step(plain, batch), step(scaled, batch)
        torch.testing.assert_close(one.gradient_norm, other.gradient_norm, rtol=1e-5, atol=0)
    for name, master in plain.optimizer.masters.items():
        torch.testing.assert_close(scaled.optimizer.masters[name], master, rtol=0, atol=1e-5)


def test_an_fp16_overflow_is_refused_and_the_next_scale_is_smaller(
    tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, batch = tiny_state(precision="fp16"), random_micro_batch(4)
    assert next(state.model.parameters()).dtype == torch.float16
    state.loss_scale.value.fill_(2.0**40)
    before, refusals = all_tensors(state), 0
    while not step(state, batch).is_finite.item():
        refusals += 1
        assert differing(before, all_tensors(state)) == []
    assert 5 < refusals < 30
    assert state.loss_scale.value.item() == 2.0 ** (40 - refusals)
    assert "master.model.embed_tokens.weight" in differing(before, all_tensors(state))
