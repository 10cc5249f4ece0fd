"""Masters, moments and Muon."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onecard.training import muon
from onecard.training.micro_batch import MicroBatch
from onecard.training.muon import Muon, orthogonalize
from onecard.training.state import TrainState
from onecard.training.step import train_step

StateFactory = Callable[..., TrainState]
BatchFactory = Callable[..., MicroBatch]


@pytest.mark.parametrize("shape", [(6, 32, 32), (3, 48, 16), (2, 16, 80)], ids=str)
def test_batched_orthogonalization_equals_one_at_a_time(shape: tuple[int, ...]) -> None:
    # Singular values from 0.05 to 1: five iterations lift a much smaller one only part of the way.
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    matrices = (left * torch.logspace(-1.3, 0, min(shape[1:]))) @ right
    matrices[0] *= 1e-3
    together = orthogonalize(matrices)
    assert together.shape == matrices.shape
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalize(matrix[None])[0], rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6
        assert values.max() < 1.3
        # Same singular vectors: the product with the original is symmetric and positive.
        product = found @ matrix.mT if shape[1] <= shape[2] else found.mT @ matrix
        torch.testing.assert_close(product, product.mT, rtol=1e-3, atol=1e-3 * float(product.abs().max()))


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 8, 8)).any()


def copies(weights: list[Tensor]) -> list[Tensor]:
    return [weight.clone().requires_grad_() for weight in weights]


def test_muon_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (24, 16), (16, 40), (32, 32)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = copies(start), copies(start)
    own_muon = Muon(ours, [False] * 4, momentum=0.95, compute_dtype=torch.bfloat16)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original", ns_steps=5
    )
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        own_muon.step(0.02, 0.1, torch.tensor(True))
        reference.step()
    for own, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        # Torch iterates one matrix at a time, in bf16 too: the same up to its rounding.
        assert moved > 0.1
        assert (own - other).norm() < 0.01 * moved


class _Allocations(TorchDispatchMode):
    """Adds up the memory that operators take beyond what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        made = {tensor.untyped_storage().data_ptr(): tensor for tensor in tree_leaves(result) if _is_tensor(tensor)}
        self.num_bytes += sum(tensor.untyped_storage().nbytes() for place, tensor in made.items() if place not in given)
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_no_memory_but_single_numbers(
    optimizer: str, precision: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    """What runs out in an update tears it."""
    state = tiny_state(optimizer=optimizer, precision=precision)
    for master in state.optimizer.masters.values():
        master.grad = torch.randn(master.shape)
    is_finite = torch.tensor(True)
    with _Allocations() as taken:
        state.optimizer.step(1e-2, is_finite)
    assert taken.num_bytes < 256
    assert min(master.nbytes for master in state.optimizer.masters.values() if master.ndim == 2) > 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_in_smaller_batches_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(24, 16)] * 5 + [(16, 40)] * 3]
    whole, parts = copies(start), copies(start)
    own = Muon(whole, [False] * 8, momentum=0.95, compute_dtype=dtype)
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 2 * 24 * 16)
    other = Muon(parts, [False] * 8, momentum=0.95, compute_dtype=dtype)
    assert [len(masters) for masters, _ in other.buffers()] == [2, 2, 1, 1, 1, 1]
    for is_finite in (True, False, True):
        for one, two in zip(whole, parts, strict=True):
            one.grad = torch.randn(one.shape, generator=generator) if is_finite else torch.full(one.shape, torch.nan)
            two.grad = one.grad.clone()
        # An expert that no token was sent to.
        whole[1].grad = parts[1].grad = None
        for each in (own, other):
            each.step(0.02, 0.1, torch.tensor(is_finite))
    for one, two, first in zip(whole, parts, start, strict=True):
        assert not torch.equal(one, first)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_muon_steps_further_for_tall_matrices_whichever_way_they_are_stored() -> None:
    gradient = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    tall, stored = torch.zeros(64, 16), torch.zeros(16, 64)
    tall.grad, stored.grad = gradient, gradient.T.contiguous()
    Muon([tall], [False], momentum=0.9, compute_dtype=torch.float32).step(1.0, 0.0, torch.tensor(True))
    Muon([stored], [True], momentum=0.9, compute_dtype=torch.float32).step(1.0, 0.0, torch.tensor(True))
    torch.testing.assert_close(tall, stored.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tall, -2.0 * orthogonalize(gradient[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_muon_moves_matrices_of_layers_and_adamw_the_rest(name: str, tiny_state: StateFactory) -> None:
    state = tiny_state(name)
    tensors = state.optimizer.state_tensors()
    by_muon = {key.split(".", 1)[1].removesuffix(".momentum") for key in tensors if key.startswith("muon.")}
    by_adamw = {key.split(".", 1)[1].rsplit(".", 1)[0] for key in tensors if key.startswith("adamw.")}
    assert not by_muon & by_adamw
    assert by_muon | by_adamw == set(state.optimizer.masters)
    is_inner = {key for key in state.optimizer.masters if ".layers." in key or ".h." in key}
    assert by_muon == {key for key in is_inner if state.optimizer.masters[key].ndim == 2}


def test_adamw_decays_matrices_only(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    plain, decayed = (tiny_state(optimizer="adamw", weight_decay=decay) for decay in (0.0, 0.5))
    for state in (plain, decayed):
        train_step(state, [random_micro_batch(4)], 1e-2, max_grad_norm=None)
    for name, master in plain.optimizer.masters.items():
        start = decayed.optimizer.masters[name] - master
        assert bool(start.any()) == (master.ndim >= 2), name


def test_adamw_is_that_of_torch(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    state = tiny_state(optimizer="adamw", max_grad_norm=None)
    reference = tiny_state(optimizer="adamw").model
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        foreach=False,
    )
    for seed in range(3):
        batch = random_micro_batch(4, seed)
        train_step(state, [batch], 3e-3, max_grad_norm=None)
        logits = reference(input_ids=batch.ids).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100).backward()
        adamw.step()
        adamw.zero_grad()
    for own, other in zip(state.model.parameters(), reference.parameters(), strict=True):
        # Where a gradient is rounding noise alone, Adam makes a whole step of it.
        assert ((own - other).abs() > 1e-4).float().mean() < 0.005


def test_masters_collect_what_bf16_cannot_hold(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    state = tiny_state(precision="bf16", optimizer="adamw", weight_decay=0.0, name="llama")
    name = "model.norm.weight"
    parameter = dict(state.model.named_parameters())[name]
    assert parameter.dtype == torch.bfloat16
    start = parameter.detach().clone()
    masters = [state.optimizer.masters[name].clone()]
    for _ in range(3):
        train_step(state, [random_micro_batch(4)], 1e-5, max_grad_norm=None)
        masters.append(state.optimizer.masters[name].clone())
    # One is 2^-8 from its neighbour in bf16: three steps of 1e-5 do not show there, but add up.
    assert torch.equal(parameter, start)
    assert all((after != before).all() for before, after in pairwise(masters))
    for _ in range(60):
        train_step(state, [random_micro_batch(4)], 1e-3, max_grad_norm=None)
    assert torch.equal(parameter, state.optimizer.masters[name].bfloat16())
    assert not torch.equal(parameter, start)


def test_gradients_add_up_in_fp32(tiny_state: StateFactory) -> None:
    state = tiny_state(precision="bf16", optimizer="adamw")
    name, parameter = next(iter(state.model.named_parameters()))
    # In bf16 the sum would stand still at 256 times the summand.
    for _ in range(600):
        (parameter * 3.0).sum().backward()
    assert parameter.grad is None
    gradient = state.optimizer.masters[name].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.unique().tolist() == [1800.0]


def test_in_fp32_a_parameter_is_its_own_master(tiny_state: StateFactory) -> None:
    state = tiny_state()
    assert all(state.optimizer.masters[name] is p for name, p in state.model.named_parameters())


def test_all_moments_exist_before_the_first_step(tiny_state: StateFactory, random_micro_batch: BatchFactory) -> None:
    state = tiny_state()
    before = {name: tensor.data_ptr() for name, tensor in state.optimizer.state_tensors().items()}
    train_step(state, [random_micro_batch(4)], 1e-3, max_grad_norm=1.0)
    assert before == {name: tensor.data_ptr() for name, tensor in state.optimizer.state_tensors().items()}
    assert len(before) >= len(state.optimizer.masters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_into_a_fresh_optimizer_bit_for_bit(
    optimizer: str, precision: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, fresh = (tiny_state(optimizer=optimizer, precision=precision, seed=seed) for seed in (1, 2))
    for seed in range(3):
        train_step(state, [random_micro_batch(4, seed)], 1e-2, max_grad_norm=1.0)
    fresh.optimizer.load_masters({name: tensor.detach().clone() for name, tensor in state.optimizer.masters.items()})
    with torch.no_grad():
        fresh.optimizer.load_state_tensors({k: v.clone() for k, v in state.optimizer.state_tensors().items()})
    for each in (state, fresh):
        train_step(each, [random_micro_batch(4, 9)], 1e-2, max_grad_norm=1.0)
    for name, master in state.optimizer.masters.items():
        assert torch.equal(fresh.optimizer.masters[name], master), name
    for one, other in zip(state.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rates_of_muon_and_adamw_keep_their_ratio(
    tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state = tiny_state(learning_rate=1e-3, muon_learning_rate=0.05, weight_decay=0.0, max_grad_norm=None)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = state.optimizer.masters[name].clone()
    train_step(state, [random_micro_batch(4)], 0.5e-3, max_grad_norm=None)
    moved = (state.optimizer.masters[name] - before).detach()
    # Half of the peak: each singular value of the step is about 0.025.
    assert torch.linalg.svdvals(moved).median() == pytest.approx(0.025, rel=0.3)


def test_masters_start_from_weights_that_were_never_rounded(tiny_state: StateFactory) -> None:
    exact, mixed = (tiny_state(precision=precision) for precision in ("fp32", "bf16"))
    for name, master in exact.optimizer.masters.items():
        assert torch.equal(mixed.optimizer.masters[name], master), name
    for parameter, master in zip(mixed.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.equal(parameter, master.bfloat16())
