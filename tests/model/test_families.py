"""Causal families beside Llama, Qwen and GPT-2: documents stay apart, or the family is refused with a reason."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.errors import InputError
from onecard.model.attention import find_borders
from onecard.model.build import build_model, make_config
from onecard.model.decoder import Decoder
from onecard.model.families import find_backend
from onecard.model.loss import find_head, sum_loss

ROWS = ((5, 3, 8), (16,), (1, 15))
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0}
COMMON = SIZES | {"bos_token_id": 0, "max_position_embeddings": 32}
GATED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": None}
WINDOW = GATED | {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("sdpa", WINDOW),
    "mixtral": ("sdpa", GATED | EXPERTS),
    "gemma": ("sdpa", GATED | {"head_dim": 8}),
    "gemma3_text": ("sdpa", WINDOW),
    "phi": ("sdpa", COMMON),
    "gpt_neox": ("sdpa", COMMON | {"intermediate_size": 48}),
    "gpt_bigcode": ("sdpa", COMMON),
    "granite": ("sdpa", GATED),
    "cohere": ("sdpa", GATED),
    "olmo2": ("sdpa", GATED),
    "starcoder2": ("sdpa", GATED),
    "opt": ("sdpa", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "biogpt": ("sdpa", COMMON | {"intermediate_size": 48}),
    "gemma2": ("eager", WINDOW | {"attn_logit_softcapping": 2.0}),
    "gpt_oss": ("eager", WINDOW | EXPERTS),
    "nemotron": ("eager", GATED),
    "stablelm": ("eager", GATED),
    "gptj": ("eager", COMMON | {"rotary_dim": 4}),
    "gpt_neo": ("eager", COMMON | {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "codegen": ("eager", COMMON | {"rotary_dim": 4}),
    "falcon": ("eager", SIZES | {"alibi": False}),
    "xglm": ("eager", COMMON | {"ffn_dim": 48}),
    "bloom": ("apart", SIZES),
    "mpt": ("apart", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "openai-gpt": ("apart", COMMON),
}


def sharp_model(name: str) -> PreTrainedModel:
    """As in `test_packed_documents.py`: attention that looks somewhere."""
    settings = {"model_type": name} | FAMILIES[name][1]
    model = build_model(settings, dropout=0.0, init="transformers", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model


def learn(model: PreTrainedModel, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    """Loss of a batch, its gradients left on the parameters."""
    borders = find_borders(
        documents, tuple(ids.shape), model.get_output_embeddings().weight, find_backend(model.config)
    )
    hidden = Decoder(model, compiled=False)(ids, borders)
    loss = sum_loss(hidden, find_head(model), targets.flatten())
    loss.backward()
    return loss.detach()


def take_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, one in expected.items():
        # The bias of keys has none but rounding: it shifts all scores alike.
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_of_a_row_and_padded_rows_equal_separate_ones(name: str) -> None:
    model = sharp_model(name)
    assert find_backend(model.config) == FAMILIES[name][0]
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(1, 97, (2, 3, 16), generator=generator)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in ROWS])
    spans = [
        (row, slice(sum(lengths[:index]), sum(lengths[: index + 1])))
        for row, lengths in enumerate(ROWS)
        for index in range(len(lengths))
    ]
    packed_loss = learn(model, ids, targets, documents.to(torch.int32))
    packed = take_gradients(model)
    padded_ids, padded_targets = torch.zeros(len(spans), 16, dtype=torch.int64), torch.full((len(spans), 16), -100)
    for index, (row, span) in enumerate(spans):
        padded_ids[index, : span.stop - span.start] = ids[row, span]
        padded_targets[index, : span.stop - span.start] = targets[row, span]
    padded_loss = learn(model, padded_ids, padded_targets)
    padded = take_gradients(model)

    separate_loss = torch.stack([learn(model, ids[row, span][None], targets[row, span]) for row, span in spans]).sum()
    separate = take_gradients(model)
    torch.testing.assert_close(packed_loss, separate_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(padded_loss, separate_loss, rtol=1e-5, atol=0)
    compare(packed, separate)
    compare(padded, separate)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom", "gptj"])
def test_eager_attention_is_that_of_transformers(name: str) -> None:
    # 16 tokens are longer than the windows, and the softcap is low.
    model = sharp_model(name).eval()
    ids = torch.randint(1, 97, (2, 16), generator=torch.Generator().manual_seed(2))
    borders = find_borders(None, (2, 16), model.get_output_embeddings().weight, find_backend(model.config))
    with torch.no_grad():
        found = Decoder(model, compiled=False)(ids, borders)
        model.set_attn_implementation("eager")
        own = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "is an encoder"),
        ("roberta", "is an encoder"),
        ("bert-generation", "is an encoder"),
        ("bart", "an encoder beside its decoder"),
        ("jamba", "a state that runs on"),
        ("qwen3_next", "a state that runs on"),
        ("recurrent_gemma", "a state that runs on"),
        ("mamba", "no plain decoder with attention"),
        ("rwkv", "no plain decoder with attention"),
    ],
)
def test_encoders_and_hybrids_are_refused_by_their_config(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_config({"model_type": name})
