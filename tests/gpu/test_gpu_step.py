"""One update on a GPU is that of plain torch on the CPU, never waits, and is refused whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from onecard.data import Batch
from onecard.spec import AdaptPlan
from onecard.training.micro_batch import MicroBatch
from onecard.training.state import TrainState
from onecard.training.step import StepStats, place, train_step

StateFactory = Callable[..., TrainState]
BatchFactory = Callable[..., MicroBatch]
SEEDS = range(3)
# Matrices that are worth 8 bits, and some that are worth paging.
WIDE = {"hidden_size": 64, "intermediate_size": 1600}


def on(device: str, batch: MicroBatch) -> list[MicroBatch]:
    """A batch of eight rows on a device, as two micro-batches."""
    ids, targets = batch.ids.to(device).split(4), batch.targets.to(device).split(4)
    return [MicroBatch(*pair, None) for pair in zip(ids, targets, strict=True)]


def step(state: TrainState, batches: list[MicroBatch]) -> StepStats:
    plan = state.plan.optimizer
    return train_step(state, batches, plan.learning_rate, max_grad_norm=plan.max_grad_norm)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference as a share of the expected norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def torch_optimizers(model: PreTrainedModel, state: TrainState) -> list[torch.optim.Optimizer]:
    """Torch's own optimizers for what the state's Muon and AdamW move, one tensor at a time."""
    plan, tensors = state.plan.optimizer, state.optimizer.state_tensors()
    parameters = dict(model.named_parameters())
    by_muon = [p for name, p in parameters.items() if f"muon.{name}.momentum" in tensors]
    rest = [p for name, p in parameters.items() if f"muon.{name}.momentum" not in tensors]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    decay: dict[str, Any] = {"weight_decay": plan.weight_decay}
    betas = (plan.adam_beta1, plan.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=betas, eps=plan.adam_epsilon, foreach=False, **decay)
    if not by_muon:
        return [adamw]
    momentum = {"momentum": plan.muon_momentum, "nesterov": True, "adjust_lr_fn": "original"}
    return [adamw, torch.optim.Muon(by_muon, lr=plan.muon_learning_rate, **momentum, **decay)]


# Torch's Muon iterates in bf16, ours in the precision of the run.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-3), ("muon", 0.03)])
def test_fp32_steps_are_those_of_plain_torch_on_the_cpu(
    optimizer: str, tolerance: float, device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    # An epsilon above rounding, of which Adam's first steps would otherwise make full ones.
    state = tiny_state(device=device, optimizer=optimizer, adam_epsilon=1e-4)
    reference = tiny_state(optimizer=optimizer).model
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    theirs = torch_optimizers(reference, state)
    for seed in SEEDS:
        batch = random_micro_batch(8, seed)
        stats = step(state, on(device, batch))
        logits = reference(input_ids=batch.ids).logits.flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        assert distance(stats.loss, loss) < tolerance
        assert distance(stats.gradient_norm, norm) < 3 * tolerance
        for each in theirs:
            each.step()
            each.zero_grad()
    for name, parameter in reference.named_parameters():
        moved = state.optimizer.masters[name].detach().cpu() - start[name]
        assert distance(moved, parameter.detach() - start[name]) < tolerance, name


def assert_same_course(one: TrainState, other: TrainState, batches: list[MicroBatch], tolerance: float) -> None:
    """Both states take the same steps: losses and gradients (by their running means) agree."""
    for batch in batches:
        found, expected = (step(state, on(str(state.device), batch)) for state in (one, other))
        assert found.is_finite.item()
        assert distance(found.loss, expected.loss) < tolerance
        assert distance(found.gradient_norm, expected.gradient_norm) < tolerance
    expected_moments = other.optimizer.state_tensors()
    for name, moment in one.optimizer.state_tensors().items():
        if name.endswith("exp_avg"):
            assert distance(moment, expected_moments[name]) < tolerance, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_steps_follow_fp32_ones(
    precision: str, device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    # Without noise of 2^-8 that Adam would turn into whole steps.
    mixed = tiny_state("llama", optimizer="adamw", adam_epsilon=1e-2, precision=precision, device=device)
    exact = tiny_state("llama", optimizer="adamw", adam_epsilon=1e-2)
    assert next(mixed.model.parameters()).dtype != torch.float32
    assert_same_course(mixed, exact, [random_micro_batch(8, seed) for seed in SEEDS], 0.03)


def test_an_fp16_overflow_halves_the_scale_until_it_fits(
    device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state, batches = tiny_state(precision="fp16", device=device), on(device, random_micro_batch(8))
    state.loss_scale.value.fill_(2.0**40)
    before, refusals = all_tensors(state), 0
    while refusals < 30 and not step(state, batches).is_finite.item():
        refusals += 1
        assert differing(before, all_tensors(state)) == []
    assert 5 < refusals < 30
    assert state.loss_scale.value.item() == 2.0 ** (40 - refusals)
    assert "master.model.embed_tokens.weight" in differing(before, all_tensors(state))


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of everything an update may change."""
    model = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    masters = {f"master.{name}": tensor for name, tensor in state.optimizer.masters.items()}
    return {key: tensor.detach().clone() for key, tensor in (model | masters | state.optimizer.state_tensors()).items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_a_non_finite_update_changes_nothing_on_the_device(
    optimizer: str,
    precision: str,
    device: str,
    tiny_state: StateFactory,
    random_micro_batch: BatchFactory,
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    if optimizer not in ("adamw", "muon"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    state = tiny_state(settings=settings_of("qwen3", **WIDE), optimizer=optimizer, precision=precision, device=device)
    batches = on(device, random_micro_batch(8))
    assert step(state, batches).is_finite.item()
    before = all_tensors(state)
    embedding = state.model.get_input_embeddings()
    for poison in (float("nan"), float("inf")):
        handle = embedding.register_forward_hook(lambda _, __, output, poison=poison: output * poison)
        assert not step(state, batches).is_finite.item()
        handle.remove()
        assert differing(before, all_tensors(state)) == []
    assert step(state, batches).is_finite.item()
    assert differing(before, all_tensors(state))


# What the compiler advises for this card (TF32, more SMs) is not at stake.
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_those_of_eager_mode(
    device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    if device == "cpu":  # everything of the compiler but its C++ code, which takes long to build
        monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = (
        tiny_state("llama", optimizer="adamw", adam_epsilon=1e-2, precision="bf16", torch_compile=flag, device=device)
        for flag in (False, True)
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_course(compiled, eager, [random_micro_batch(8, seed) for seed in SEEDS], 0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class _Looks(TorchDispatchMode):
    """Refuses to read a tensor's value, which on a GPU means waiting for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    if device == "cpu":
        with _Looks():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SAYS_IT_IS_A_PROTOTYPE = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


@SAYS_IT_IS_A_PROTOTYPE
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_step_over_packed_documents_never_waits(
    name: str, precision: str, device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    state = tiny_state(name, precision=precision, device=device, dropout=0.1)
    rows = random_micro_batch(4)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0] * 9 + [1] * 7, [0] + [1] * 15], dtype=torch.int32)
    for borders in (None, documents):
        batch = Batch(rows.ids, rows.targets, borders, rows.ids.numel())
        step(state, [place(batch, state)])  # libraries are loaded by the first
        with without_waiting(device):
            stats = step(state, [place(batch, state) for _ in range(2)])
        assert stats.is_finite.item()


@SAYS_IT_IS_A_PROTOTYPE
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "method"), [("llama", "qlora"), ("gpt2", "lora"), ("gpt2", "qlora")])
def test_adapted_steps_never_wait_and_are_those_of_the_cpu(
    name: str, method: str, precision: str, device: str, tiny_state: StateFactory, random_micro_batch: BatchFactory
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    changes: dict[str, Any] = {"optimizer": "adamw", "adapt": AdaptPlan(method=method, r=4)}
    state = tiny_state(name, precision=precision, device=device, **changes)
    reference = tiny_state(name, precision="fp32", device="cpu", **changes)
    for seed in SEEDS:
        batch = random_micro_batch(8, seed)
        expected = step(reference, on("cpu", batch))
        batches = on(device, batch)
        if seed == 0:  # libraries are loaded by the first
            found = step(state, batches)
        else:
            with without_waiting(device):
                found = step(state, batches)
        assert distance(found.loss, expected.loss) < (1e-4 if precision == "fp32" else 0.02)
        assert distance(found.gradient_norm, expected.gradient_norm) < (1e-3 if precision == "fp32" else 0.1)


@SAYS_IT_IS_A_PROTOTYPE
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_smaller_and_paged_state_never_waits_and_is_that_of_the_cpu(
    optimizer: str,
    device: str,
    tiny_state: StateFactory,
    random_micro_batch: BatchFactory,
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # An epsilon above rounding, of which Adam's first steps would otherwise make full ones.
    changes: dict[str, Any] = {"settings": settings_of("llama", **WIDE), "adam_epsilon": 1e-4}
    state = tiny_state(device=device, optimizer=optimizer, **changes)
    reference = tiny_state(optimizer=optimizer.removeprefix("paged_"), **changes)
    start = {name: master.detach().clone() for name, master in reference.optimizer.masters.items()}
    for seed in SEEDS:
        batch = random_micro_batch(8, seed)
        step(reference, on("cpu", batch))
        batches = on(device, batch)
        if seed == 0:  # libraries are loaded by the first
            step(state, batches)
        else:
            with without_waiting(device):
                step(state, batches)
    for name, master in reference.optimizer.masters.items():
        moved = state.optimizer.masters[name].detach().cpu() - start[name]
        assert distance(moved, master.detach() - start[name]) < 0.02, name


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_paged_state_is_outside_the_caching_allocator(
    optimizer: str, tiny_state: StateFactory, settings_of: Callable[..., dict[str, Any]]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    taken = {}
    for name in (optimizer, f"paged_{optimizer}"):
        before = torch.cuda.memory_allocated()
        state = tiny_state(settings=settings_of("llama", **WIDE), optimizer=name, device="cuda:0")
        taken[name] = torch.cuda.memory_allocated() - before
        paged = state.optimizer.paged_tensors()
        assert all(tensor.is_cuda and not tensor.any() for tensor in paged)
    assert sum(tensor.nbytes for tensor in paged) > 100_000
    assert taken[optimizer] - taken[f"paged_{optimizer}"] >= sum(tensor.nbytes for tensor in paged)


@SAYS_IT_IS_A_PROTOTYPE
def test_waiting_would_be_noticed(device: str) -> None:
    value = torch.ones((), device=device)
    with pytest.raises((AssertionError, RuntimeError)), without_waiting(device):
        value.item()
