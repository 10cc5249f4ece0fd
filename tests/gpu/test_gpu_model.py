"""Attention, generation and whole runs on a GPU: those of the CPU, or of plain torch."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onecard
from onecard.data import train_tokenizer
from onecard.model.attention import attend_sdpa, attend_varlen, find_borders
from onecard.model.build import build_model
from onecard.model.decoder import Decoder
from onecard.model.generate import Sampling, complete
from onecard.model.loss import find_head, sum_loss
from onecard.observe.events import Event

ROWS = ((5, 3, 8, 16), (32,), (1, 31))
ON_GPU = pytest.mark.gpu
BACKENDS = [
    ("cpu", "sdpa", torch.float32),
    ("cpu", "sdpa", torch.bfloat16),
    pytest.param(("cuda:0", "sdpa", torch.float32), marks=ON_GPU),
    pytest.param(("cuda:0", "sdpa", torch.bfloat16), marks=ON_GPU),
    pytest.param(("cuda:0", "varlen", torch.bfloat16), marks=ON_GPU),
    pytest.param(("cuda:0", "varlen", torch.float16), marks=ON_GPU),
]
# Share of the norm by which results may differ.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
Backend = tuple[str, str, torch.dtype]


def packed_documents() -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in ROWS]
    return torch.stack(rows).to(torch.int32)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference as a share of the expected norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def plain_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, documents_BT: Tensor, window: int | None) -> Tensor:
    """Softmax over what a query may see, written out; returns [B, T, H, D]."""
    num_shared = q_BHTD.shape[1] // k_BKTD.shape[1]
    k_BHTD, v_BHTD = k_BKTD.repeat_interleave(num_shared, 1), v_BKTD.repeat_interleave(num_shared, 1)
    index_T = torch.arange(q_BHTD.shape[2])
    distance_TT = index_T[:, None] - index_T[None]
    sees_BTT = (documents_BT[:, :, None] == documents_BT[:, None]) & (distance_TT >= 0)
    if window is not None:
        sees_BTT &= distance_TT < window
    scores_BHTT = q_BHTD @ k_BHTD.mT / q_BHTD.shape[-1] ** 0.5
    weights_BHTT = scores_BHTT.masked_fill(~sees_BTT[:, None], -torch.inf).softmax(-1)
    return (weights_BHTT @ v_BHTD).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["own heads", "shared heads"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "whole rows"])
def test_attention_is_the_softmax_written_out(
    is_packed: bool, num_kv_heads: int, window: int | None, backend: Backend
) -> None:
    device, name, dtype = backend
    generator = torch.Generator().manual_seed(0)
    # Sharp scores: at unit scale every weight is about the same, and a wrong mask would hardly show.
    drawn = [3 * torch.randn(3, heads, 32, 32, generator=generator) for heads in (4, num_kv_heads, num_kv_heads)]
    exact = [tensor.to(dtype).float().requires_grad_() for tensor in drawn]
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in drawn]
    documents = packed_documents() if is_packed else None

    borders = find_borders(documents, (3, 32), torch.empty(0, device=device, dtype=dtype), name)
    keywords = {} if borders is None else borders.as_keywords()
    attend = attend_varlen if name == "varlen" else attend_sdpa
    out, _ = attend(torch.nn.Module(), *inputs, None, sliding_window=window, **keywords)
    expected = plain_attention(*exact, torch.zeros(3, 32) if documents is None else documents, window)

    slope = torch.randn(expected.shape, generator=generator)
    out.backward(slope.to(out))
    expected.backward(slope)
    assert out.dtype == dtype
    assert distance(out, expected) < TOLERANCE[dtype]
    for tensor, own in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert own.grad is not None
        assert distance(tensor.grad, own.grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_documents_equal_separate_ones(
    name: str, backend: Backend, settings_of: Callable[..., dict[str, Any]]
) -> None:
    device, attention, dtype = backend
    model = build_model(settings_of(name), dropout=0.0, init="transformers", seed=0, backend=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
            parameter.data = parameter.data.to(device, dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    decoder, head = Decoder(model, compiled=False), find_head(model)
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(1, 97, (3, 32), generator=generator).to(device) for _ in range(2))

    def run(rows: slice, columns: slice, documents: Tensor | None) -> Tensor:
        """Hidden states of a part; its gradients are added to the model's."""
        part = ids[rows, columns]
        borders = find_borders(documents, (part.shape[0], part.shape[1]), next(model.parameters()), attention)
        hidden = decoder(part, borders)
        sum_loss(hidden, head, targets[rows, columns].flatten()).backward()
        return hidden.detach()

    everything = (slice(None), slice(None))
    packed = run(*everything, packed_documents())
    gradients = gradients_of(model)
    separate = []
    for row, lengths in enumerate(ROWS):
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        for start, length in zip(starts, lengths, strict=True):
            separate.append(run(slice(row, row + 1), slice(start, start + length), None))
    tolerance = 2 * TOLERANCE[dtype]
    assert distance(packed, torch.cat(separate)) < tolerance
    for parameter, expected in gradients_of(model).items():
        assert distance(gradients[parameter], expected) < 2 * tolerance, parameter
    # Without borders it is another function, by more than rounding.
    assert distance(run(*everything, None), packed) > 2 * tolerance


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


LETTERS = "abcdefghijklmnopqrstuvwxyz ."
PROMPTS = ["a", "hello there", "xyz."]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_completions_are_those_of_the_cpu(name: str, device: str, settings_of: Callable[..., dict[str, Any]]) -> None:
    tokenizer = train_tokenizer("char", [LETTERS])
    settings = settings_of(name, vocab_size=len(LETTERS) + 1, tie_word_embeddings=False)
    model = build_model(settings, dropout=0.0, init="transformers", seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    greedy = Sampling(max_new_tokens=12, temperature=0)
    alone = [complete(model, tokenizer, [prompt], greedy)[0] for prompt in PROMPTS]
    assert len(set("".join(alone))) > 5
    assert complete(model.to(device), tokenizer, PROMPTS, greedy) == alone

    model.bfloat16()
    before = torch.cuda.get_rng_state(device) if device != "cpu" else torch.get_rng_state()
    # Longer than the 32 positions it knows, so that the window slides.
    first, again, other = (
        complete(model, tokenizer, PROMPTS, Sampling(40, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert all(set(text) <= set(LETTERS) for text in first)
    assert torch.equal(torch.cuda.get_rng_state(device) if device != "cpu" else torch.get_rng_state(), before)


RUN: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_seq_length": 16,
    "model_config": {"model_type": "qwen3", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dropout": 0.1,
    "per_device_train_batch_size": 3,
    "total_batch_size": 8,
    "max_steps": 8,
    "eval_steps": 4,
    "eval_batches": 2,
    "save_steps": 3,
    "sample_steps": 3,
    "sample_prompts": ["the ", "lazy"],
    "sample_max_new_tokens": 4,
    "torch_compile": False,
    "deterministic": True,
    "report_to": "none",
}


@pytest.fixture
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64, "cuda": 512})
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_own_place")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deterministic_run_that_was_stopped_ends_bit_for_bit_as_if_it_had_not(
    optimizer: str, precision: str, device: str, corpus_text: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.event == "step" and event.step == 4:
            signal.raise_signal(signal.SIGINT)

    settings = RUN | {"dataset": str(corpus_text), "optim": optimizer, "precision": precision, "device": device}
    recipe = onecard.load_recipe(settings)
    whole = onecard.train(recipe, output_dir=tmp_path / "whole")
    stopped = onecard.train(recipe, output_dir=tmp_path / "stopped", on_event=stop)
    assert not (stopped / "checkpoints" / "step-000008").exists()
    onecard.resume(stopped)
    assert record(stopped) == record(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "loss_scale.safetensors"):
        files = [run / "checkpoints" / "step-000008" / name for run in (whole, stopped)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def record(run: Path) -> list[tuple[Any, ...]]:
    """Step, loss and gradient norm of every update, losses of every evaluation, and the samples."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("event", "step", "loss", "grad_norm", "samples")
    return [tuple(str(event.get(key)) for key in kept) for event in events]
