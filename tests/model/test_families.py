"""Causal families beside Llama, Qwen and GPT-2: documents stay apart, or the family is refused with a reason."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onecard.errors import InputError
from onecard.model.adapt import adapt
from onecard.model.attention import find_borders
from onecard.model.build import build_model, make_config
from onecard.model.decoder import Decoder
from onecard.model.families import find_backend
from onecard.model.generate import complete_ids
from onecard.model.loss import find_head, sum_loss
from onecard.model.sampling import Sampling
from onecard.spec import AdaptPlan

ROWS = ((5, 3, 8), (16,), (1, 15))
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0}
COMMON = SIZES | {"bos_token_id": 0, "max_position_embeddings": 32}
GATED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": None}
WINDOW = GATED | {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
STATE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FULL = ["full_attention", "full_attention"]
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SHARED = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
HYBRID = LINEAR | SHARED | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 2}
GRIFFIN = {"intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4}
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
    "modernbert-decoder": ("sdpa", COMMON | {"intermediate_size": 48, "pad_token_id": 0, "layer_types": FULL}),
    "mamba": ("apart", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": ("apart", STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "rwkv": ("apart", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}),
    "xlstm": ("apart", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}),
    "jamba": ("apart", GATED | {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "lfm2": ("apart", GATED | {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("apart", SIZES | GRIFFIN),
    "qwen3_next": ("apart", GATED | HYBRID),
    "falcon_h1": ("apart", GATED | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}),
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


@pytest.mark.filterwarnings("ignore:.*_pattern keys")  # PEFT's, of experts
@pytest.mark.parametrize("name", ["mamba", "rwkv", "jamba", "lfm2", "qwen3_next"])
def test_adapters_of_all_linear_layers_move_what_the_model_computes(name: str) -> None:
    model = sharp_model(name).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapt(model, AdaptPlan(method="lora", r=1), seed=0)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    learn(model, ids, ids)
    moving = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert moving
    assert all(grad is not None and grad.any() for name, grad in moving.items() if "lora_B" in name)


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
    ],
)
def test_encoders_are_refused_by_their_config(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_config({"model_type": name})


def test_weights_stay_as_they_are_between_training_and_evaluating() -> None:
    model = build_model(
        {"model_type": "rwkv"} | FAMILIES["rwkv"][1] | {"rescale_every": 1}, dropout=0.0, init="transformers", seed=0
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(input_ids=torch.zeros((1, 4), dtype=torch.int64))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("name", ["mamba", "rwkv", "jamba", "lfm2", "qwen3_next"])
def test_texts_of_unequal_length_are_completed_as_each_alone(name: str) -> None:
    model = sharp_model(name)
    prompts = [[5, 9, 2, 40], [7], [3, 8, 1, 1, 60, 6, 7], [11]]
    sampling = Sampling(max_new_tokens=6, temperature=0.0, seed=0)
    together = complete_ids(model, prompts, [0], sampling)
    assert together == [complete_ids(model, [prompt], [0], sampling)[0] for prompt in prompts]
    with torch.no_grad():
        text = [*prompts[2], *together[2]]
        logits = model.eval()(input_ids=torch.tensor([text])).logits[0]
    assert text[7:] == logits.argmax(-1)[6:-1].tolist()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # Mamba's norms get sums in fp32
@pytest.mark.parametrize("name", ["mamba", "rwkv", "jamba", "lfm2"])
def test_weights_in_16_bits_learn(name: str) -> None:
    model = sharp_model(name).to(torch.bfloat16)
    ids, targets = torch.randint(1, 97, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    assert learn(model, ids, targets, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2, dtype=torch.int32)).isfinite()
    assert all(gradient.isfinite().all() for gradient in take_gradients(model).values())
