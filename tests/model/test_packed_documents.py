"""A packed document is computed as if it were alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from onecard.errors import InputError
from onecard.model.attention import DocumentBorders, attend_sdpa, find_borders
from onecard.model.build import build_model, make_config
from onecard.model.decoder import Decoder
from onecard.model.loss import find_head, sum_loss

ROWS = ((5, 3, 8), (16,), (1, 15))
CPU = torch.device("cpu")


def sharp_model(settings: dict[str, Any]) -> PreTrainedModel:
    """A model whose attention looks somewhere: at the usual start it averages, and a wrong mask would hardly show."""
    model = build_model(settings, dropout=0.0, init="transformers", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (len(ROWS), 16), generator=generator)
    targets = torch.randint(1, 97, ids.shape, generator=generator)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in ROWS])
    return ids, targets, documents.to(torch.int32)


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_documents_equal_separate_ones(name: str, settings_of: Callable[..., dict[str, Any]]) -> None:
    model = sharp_model(settings_of(name))
    decoder, head = Decoder(model, compiled=False), find_head(model)
    ids, targets, documents = packed_rows()

    packed = decoder(ids, find_borders(documents, (3, 16), torch.empty(0), "sdpa"))
    packed_loss = sum_loss(packed, head, targets.flatten())
    packed_loss.backward()
    packed_gradients = gradients_of(model)

    separate, separate_loss = [], torch.zeros(())
    for row, lengths in enumerate(ROWS):
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        for start, length in zip(starts, lengths, strict=True):
            span = (slice(row, row + 1), slice(start, start + length))
            hidden = decoder(ids[span], None)
            loss = sum_loss(hidden, head, targets[span].flatten())
            loss.backward()
            separate.append(hidden.detach())
            separate_loss += loss.detach()

    torch.testing.assert_close(packed.detach(), torch.cat(separate), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_loss.detach(), separate_loss, rtol=1e-5, atol=0)
    for parameter, expected in gradients_of(model).items():
        torch.testing.assert_close(packed_gradients[parameter], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_positions_restart_with_every_document() -> None:
    borders = find_borders(packed_rows()[2], (3, 16), torch.empty(0), "sdpa")
    assert borders is not None
    assert borders.position_ids_BT[0].tolist() == [*range(5), *range(3), *range(8)]
    assert borders.position_ids_BT[1].tolist() == [*range(16)]


def test_rows_without_inner_borders_need_no_mask() -> None:
    assert find_borders(None, (2, 16), torch.empty(0), "sdpa") is None


def test_varlen_borders_are_document_starts_padded_with_the_end() -> None:
    borders = find_borders(packed_rows()[2], (3, 16), torch.empty(0), "varlen")
    assert borders is not None
    assert borders.cumulative_lengths is not None
    lengths = borders.cumulative_lengths.tolist()
    assert lengths[:7] == [0, 5, 8, 16, 32, 33, 48]
    assert set(lengths[6:]) == {48}
    # The number of documents changes with every batch; the length must not, or a compiled decoder starts over.
    one = find_borders(None, (3, 16), torch.empty(0), "varlen")
    assert one is not None
    assert one.cumulative_lengths is not None
    assert len(one.cumulative_lengths) == len(lengths)
    assert one.cumulative_lengths[:4].tolist() == [0, 16, 32, 48]


def test_borders_reach_the_decoder_by_the_names_the_backend_reads() -> None:
    borders = DocumentBorders(torch.zeros(1, 2), mask_BTT=torch.ones(1, 2, 2))
    assert set(borders.as_keywords()) == {"position_ids", "document_mask"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "gpt2"},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_attention_is_that_of_transformers(changes: dict[str, Any], settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = settings_of("gpt2" if changes["model_type"] == "gpt2" else "llama", **changes)
    model = sharp_model(settings).eval()
    theirs = AutoModelForCausalLM.from_config(make_config(settings), attn_implementation="eager").eval()
    theirs.load_state_dict(model.state_dict())
    ids = packed_rows()[0]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_a_flat_row_equals_its_mask_in_every_gradient(
    window: int | None, settings_of: Callable[..., dict[str, Any]]
) -> None:
    model = sharp_model(settings_of("llama", model_type="mistral", sliding_window=window))
    decoder = Decoder(model, compiled=False)
    ids = packed_rows()[0][:1]
    documents = packed_rows()[2][:1]
    flat, masked = (
        find_borders(documents, (1, 16), torch.empty(0), "sdpa", by_mask=by_mask) for by_mask in (False, True)
    )
    assert flat is not None
    assert masked is not None
    assert flat.lengths == ROWS[0]
    # A compiled decoder would be compiled for every new set of lengths.
    assert masked.lengths is None
    found = []
    for borders in (flat, masked):
        hidden = decoder(ids, borders)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append({"hidden": hidden.detach(), **gradients_of(model)})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_document_in_a_sliding_window_sees_neither_beyond_the_window_nor_its_neighbour(
    num_rows: int, settings_of: Callable[..., dict[str, Any]]
) -> None:
    model = sharp_model(settings_of("llama", model_type="mistral", sliding_window=4, num_hidden_layers=1))
    decoder = Decoder(model, compiled=False)
    ids, documents = packed_rows()[0][:num_rows], packed_rows()[2][:num_rows]
    borders = find_borders(documents, (num_rows, 16), torch.empty(0), "sdpa")
    before = decoder(ids, borders).detach().view(num_rows, 16, -1)
    ids[0, [4, 8]] = (ids[0, [4, 8]] + 40) % 97
    after = decoder(ids, borders).detach().view(num_rows, 16, -1)
    changed = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [4, 8, 9, 10, 11]


def test_borders_are_checked_before_output_projections_are_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mask that is ignored must be noticed although zeroed projections would hide it.
    monkeypatch.setattr("onecard.model.checks.find_borders", lambda *_: DocumentBorders(torch.arange(6)[None]))
    settings = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "vocab_size": 32}
    with pytest.raises(InputError, match="leak into each other"):
        build_model({**settings, **small}, dropout=0.0, init="zero-output", seed=0)


@pytest.mark.parametrize("lengths", [None, (256, 44), (100, 200)], ids=["one", "long", "short"])
def test_attention_in_16_bits_is_that_of_fp32_rounded(lengths: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()
    found, _ = attend_sdpa(module, q, k, v, None, document_lengths=lengths)
    assert found.dtype == torch.bfloat16
    expected, _ = attend_sdpa(module, q.float(), k.float(), v.float(), None, document_lengths=lengths)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, (q, k, v), slope.bfloat16())
    for one, other in zip(gradients, torch.autograd.grad(expected, (q, k, v), slope), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05)
