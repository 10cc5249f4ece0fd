"""Moments in 8 bits: bitsandbytes' update, refused and resumed as AdamW's is."""

import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onecard.errors import InputError
from onecard.spec import OptimizerPlan, Plan
from onecard.training import adamw_8bit
from onecard.training.adamw_8bit import AdamW8bit
from onecard.training.assemble import assemble
from onecard.training.micro_batch import MicroBatch
from onecard.training.paged import PageableZeros
from onecard.training.state import TrainState
from onecard.training.step import train_step

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

StateFactory = Callable[..., TrainState]
BatchFactory = Callable[..., MicroBatch]
YES, NO = torch.tensor(True), torch.tensor(False)
# One fills its last block, one does not, one is cut where runs are short.
SHAPES = [(64, 64), (70, 131), (130, 256)]


@pytest.fixture
def rates(tiny_plan: Callable[..., Plan]) -> OptimizerPlan:
    return tiny_plan(optimizer="adamw_8bit", learning_rate=1e-3).optimizer


@pytest.fixture
def wide(settings_of: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A shape whose matrices are worth 8 bits."""
    return settings_of("llama", hidden_size=64, intermediate_size=160)


def random_matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def spread_gradients(seed: int) -> list[Tensor]:
    """Gradients over four powers of ten."""
    sizes = [10 ** matrix.clamp(-3, 1) for matrix in random_matrices(1000 + seed)]
    return [gradient * size for gradient, size in zip(random_matrices(seed), sizes, strict=True)]


def take_steps(optimizer: AdamW8bit, matrices: list[Tensor], seeds: range) -> None:
    for seed in seeds:
        for matrix, gradient in zip(matrices, spread_gradients(seed), strict=True):
            matrix.grad = gradient
        optimizer.step(1e-3, YES)


def copies(optimizer: AdamW8bit) -> list[Tensor]:
    return [tensor.clone() for _, _, tensor in optimizer.state_of()]


def test_an_update_is_that_of_bitsandbytes(rates: OptimizerPlan) -> None:
    ours, theirs = random_matrices(), random_matrices()
    optimizer = AdamW8bit(ours, rates, PageableZeros(is_paged=False))
    signed, unsigned = (functional.create_dynamic_map(signed=is_signed) for is_signed in (True, False))
    states = [
        (
            *(torch.zeros(matrix.shape, dtype=torch.uint8) for _ in range(2)),
            *(torch.zeros(-(-matrix.numel() // 256)) for _ in range(2)),
        )
        for matrix in theirs
    ]
    for seed in range(4):
        for matrix, gradient, (first, second, scale, square_scale) in zip(
            theirs, spread_gradients(seed), states, strict=True
        ):
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", gradient, matrix, first, second, 0.9, 0.95, 0.0, 0.0, 1e-8, seed + 1, 1e-3,
                signed, unsigned, scale, square_scale, 0.1, 1.0,
            )  # fmt: skip
        take_steps(optimizer, ours, range(seed, seed + 1))
    found = {(id(matrix), name): tensor for matrix, name, tensor in optimizer.state_of()}
    for own, other, (first, second, scale, square_scale) in zip(ours, theirs, states, strict=True):
        # Theirs rounds a scale once more or less, which may tip a value to its neighbour.
        assert (own - other).abs().max() < 1e-4
        assert ((own - other).abs() > 1e-6).float().mean() < 1e-3
        for name, codes in (("exp_avg", first), ("exp_avg_sq", second)):
            assert (found[id(own), name][: own.numel()] != codes.flatten()).float().mean() < 1e-3
        torch.testing.assert_close(found[id(own), "exp_avg_scale"], scale)
        torch.testing.assert_close(found[id(own), "exp_avg_sq_scale"], square_scale)
        assert found[id(own), "step"].item() == 4


def test_a_refused_step_changes_no_bit(rates: OptimizerPlan) -> None:
    matrices = random_matrices()
    optimizer = AdamW8bit(matrices, rates, PageableZeros(is_paged=False))
    take_steps(optimizer, matrices, range(3))
    weights, state = [matrix.clone() for matrix in matrices], copies(optimizer)
    for poison in (1.0, float("nan"), float("inf")):
        for matrix in matrices:
            matrix.grad = torch.full_like(matrix, poison)
        optimizer.step(1e-3, NO)
        assert all(map(torch.equal, weights, matrices))
        assert all(map(torch.equal, state, copies(optimizer)))
    take_steps(optimizer, matrices, range(3, 4))
    assert not any(map(torch.equal, state, copies(optimizer)))


class _MostAtOnce(TorchDispatchMode):
    """Adds up the memory of all results that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and id(storage) not in self.live and id(storage) not in given:
                self.live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, id(storage))
        self.most_bytes = max(self.most_bytes, sum(self.live.values()))
        return result


def test_an_update_takes_no_more_than_was_claimed_before_it(
    rates: OptimizerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw_8bit, "_RUN_ELEMENTS", 16_384)
    matrices = random_matrices()
    optimizer = AdamW8bit(matrices, rates, PageableZeros(is_paged=False))
    for matrix, gradient in zip(matrices, spread_gradients(0), strict=True):
        matrix.grad = gradient
    with _MostAtOnce() as claimed:
        optimizer.claim_scratch()
    with _MostAtOnce() as taken:
        optimizer.step(1e-3, YES)
    assert claimed.most_bytes == 16_384 * (4 + 4 + 1) + 64 * 4
    assert taken.most_bytes - claimed.most_bytes < 64  # single numbers
    assert taken.most_bytes > 0.9 * claimed.most_bytes


class _NoRoomForCodes(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.empty.memory_format and (kwargs or {}).get("dtype") == torch.uint8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return function(*args, **(kwargs or {}))


def test_memory_that_runs_out_before_an_update_tears_nothing(
    wide: dict[str, Any], tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, whole = (tiny_state(settings=wide, optimizer="adamw_8bit") for _ in range(2))
    before = {name: tensor.detach().clone() for name, tensor in state.optimizer.masters.items()}
    with _NoRoomForCodes(), pytest.raises(RuntimeError, match="allocate"):
        train_step(state, [random_micro_batch(4)], 1e-2, max_grad_norm=1.0)
    assert not state.is_updating
    assert all(torch.equal(before[name], tensor) for name, tensor in state.optimizer.masters.items())
    state.optimizer.forget_gradients()
    for each in (state, whole):
        train_step(each, [random_micro_batch(4)], 1e-2, max_grad_norm=1.0)
    for name, tensor in whole.optimizer.state_tensors().items():
        assert torch.equal(state.optimizer.state_tensors()[name], tensor), name
    for one, other in zip(state.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_how_matrices_are_cut_into_runs_changes_nothing(rates: OptimizerPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = random_matrices(), random_matrices()
    optimizers = [AdamW8bit(whole, rates, PageableZeros(is_paged=False))]
    monkeypatch.setattr(adamw_8bit, "_RUN_ELEMENTS", 4096)
    optimizers.append(AdamW8bit(cut, rates, PageableZeros(is_paged=False)))
    lengths = [sum(piece.num_elements for piece in run) for run in with_gradients(optimizers[1], cut)]
    assert sum(lengths) == sum(matrix.numel() for matrix in cut)
    assert max(lengths) <= 4096
    take_steps(optimizers[1], cut, range(3))
    monkeypatch.undo()
    take_steps(optimizers[0], whole, range(3))
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    for one, other in zip(*map(copies, optimizers), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def with_gradients(optimizer: AdamW8bit, matrices: list[Tensor]) -> list[Any]:
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    return list(optimizer._runs())


def test_a_matrix_without_a_gradient_is_left_alone(rates: OptimizerPlan) -> None:
    matrices = random_matrices()
    optimizer = AdamW8bit(matrices, rates, PageableZeros(is_paged=False))
    take_steps(optimizer, matrices, range(2))
    weights, state = [matrix.clone() for matrix in matrices], copies(optimizer)
    matrices[1].grad = None
    optimizer.step(1e-3, YES)
    is_same = [torch.equal(before, after) for before, after in zip(weights, matrices, strict=True)]
    assert is_same == [False, True, False]
    kept = [torch.equal(before, after) for before, after in zip(state, copies(optimizer), strict=True)]
    assert kept == [False] * 5 + [True] * 5 + [False] * 5


def test_vectors_small_matrices_and_embeddings_stay_in_32_bits(wide: dict[str, Any], tiny_state: StateFactory) -> None:
    state = tiny_state(settings=wide, optimizer="adamw_8bit")
    tensors = state.optimizer.state_tensors()
    is_8bit = {name: tensors[f"adamw.{name}.exp_avg"].dtype == torch.uint8 for name in state.optimizer.masters}
    assert is_8bit["lm_head.weight"]
    assert is_8bit["model.layers.0.mlp.up_proj.weight"]
    assert not is_8bit["model.embed_tokens.weight"]
    assert not is_8bit["model.layers.0.self_attn.k_proj.weight"]  # 32 x 64
    assert not is_8bit["model.norm.weight"]
    for name, master in state.optimizer.masters.items():
        num_bytes = sum(
            tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"adamw.{name}.") and "step" not in key
        )
        assert num_bytes <= master.numel() * (2 + 8 / 256) + 512 if is_8bit[name] else num_bytes == 8 * master.numel()


def test_a_tied_head_stays_in_32_bits_with_its_embedding(wide: dict[str, Any], tiny_state: StateFactory) -> None:
    state = tiny_state(settings=wide | {"tie_word_embeddings": True}, optimizer="adamw_8bit")
    tensors = state.optimizer.state_tensors()
    assert tensors["adamw.model.embed_tokens.weight.exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw"])
def test_state_goes_into_a_fresh_optimizer_bit_for_bit(
    optimizer: str, precision: str, wide: dict[str, Any], tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, fresh = (tiny_state(settings=wide, optimizer=optimizer, precision=precision, seed=seed) for seed in (1, 2))
    for seed in range(3):
        train_step(state, [random_micro_batch(4, seed)], 1e-2, max_grad_norm=1.0)
    fresh.optimizer.load_masters({name: tensor.detach().clone() for name, tensor in state.optimizer.masters.items()})
    with torch.no_grad():
        fresh.optimizer.load_state_tensors({k: v.clone() for k, v in state.optimizer.state_tensors().items()})
    for each in (state, fresh):
        train_step(each, [random_micro_batch(4, 9)], 1e-2, max_grad_norm=1.0)
    for one, other in zip(state.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in state.optimizer.state_tensors().items():
        assert torch.equal(fresh.optimizer.state_tensors()[name], tensor), name


def test_it_learns_as_adamw_does(
    wide: dict[str, Any], tiny_plan: Callable[..., Plan], random_micro_batch: BatchFactory
) -> None:
    batch = random_micro_batch(8)
    losses: dict[str, list[float]] = {}
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        state = assemble(tiny_plan(settings=wide, optimizer=optimizer))
        losses[optimizer] = [float(train_step(state, [batch], 3e-3, max_grad_norm=1.0).loss) for _ in range(31)]
    assert losses["paged_adamw_8bit"] == losses["adamw_8bit"]
    assert losses["adamw"][-1] < 0.1 * losses["adamw"][0]
    assert losses["adamw_8bit"] != losses["adamw"]
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.01)
    assert all(after < before for before, after in pairwise(losses["adamw_8bit"][::10]))


def test_without_bitsandbytes_it_says_what_to_install(rates: OptimizerPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"optim adamw_8bit needs bitsandbytes.*or use optim adamw"):
        AdamW8bit(random_matrices(), rates, PageableZeros(is_paged=False))
