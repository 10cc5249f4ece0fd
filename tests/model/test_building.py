"""Models from scratch: their start, their dropout, and what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onecard.errors import InputError
from onecard.model.build import build_model, count_parameters, make_config
from onecard.model.dropout import add_missing_dropout

Settings = Callable[..., dict[str, Any]]
NAMES = ["llama", "qwen3", "gpt2"]
IDS = torch.randint(97, (16, 32), generator=torch.Generator().manual_seed(0))


def build(settings: dict[str, Any], dropout: float = 0.0, init: str = "transformers", seed: int = 0) -> PreTrainedModel:
    return build_model(settings, dropout=dropout, init=init, seed=seed)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name: str, settings_of: Settings) -> None:
    torch.manual_seed(1)
    first = build(settings_of(name)).state_dict()
    torch.manual_seed(2)
    again = build(settings_of(name), dropout=0.3).state_dict()
    other = build(settings_of(name), seed=1).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_with_zero_output_every_block_starts_as_the_identity(name: str, settings_of: Settings) -> None:
    model = build(settings_of(name), init="zero-output")
    seen: list[tuple[Tensor, Tensor]] = []

    def compare(_: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Any], output: Any) -> None:
        given = args[0] if args else keywords["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    for layer in layers(model):
        layer.register_forward_hook(compare, with_kwargs=True)
    model(input_ids=IDS)
    assert len(seen) == 2
    assert all(torch.equal(given, output) for given, output in seen)
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], build_outputs(settings_of(name)), strict=True))


def build_outputs(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Input and output of the first block at transformers' own start, which is not the identity."""
    model = build(settings)
    hidden = model.base_model(input_ids=IDS, output_hidden_states=True).hidden_states
    return hidden[0], hidden[1]


def test_zero_output_of_an_unknown_family_is_refused(settings_of: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.model.build._OUTPUT_PROJECTIONS", ("elsewhere",))
    with pytest.raises(InputError, match="init zero-output: llama has no known output projections"):
        build(settings_of("llama"), init="zero-output")


def zero_shares(model: PreTrainedModel) -> dict[str, float]:
    """Shares of exact zeros where dropout should show: before the first block, and after its two parts."""
    first, shares = layers(model)[0], {}

    def note(place: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        shares[place] = (value == 0).float().mean().item()

    first.register_forward_pre_hook(
        lambda _, args, kw: note("embedding", args or kw["hidden_states"]), with_kwargs=True
    )
    attention = first.self_attn if hasattr(first, "self_attn") else first.attn
    attention.register_forward_hook(lambda _, __, output: note("attention", output))
    first.mlp.register_forward_hook(lambda _, __, output: note("mlp", output))
    model.base_model(input_ids=IDS, use_cache=False)
    return shares


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_applied_everywhere_once(name: str, settings_of: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_dropout: list[float] = []
    attend = F.scaled_dot_product_attention

    def spy(*args: Any, dropout_p: float, **keywords: Any) -> Tensor:
        attention_dropout.append(dropout_p)
        return attend(*args, dropout_p=dropout_p, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = build(settings_of(name), dropout=0.3).train()
    attention_dropout.clear()  # building looks at the model, too
    shares = zero_shares(model)
    # 16 x 32 x 32 values: five standard deviations are 0.018. Applied twice it would be 0.51.
    assert shares == pytest.approx({"embedding": 0.3, "attention": 0.3, "mlp": 0.3}, abs=0.02)
    assert attention_dropout == [0.3, 0.3]

    attention_dropout.clear()
    assert zero_shares(model.eval()) == {"embedding": 0.0, "attention": 0.0, "mlp": 0.0}
    assert attention_dropout == [0.0, 0.0]
    undropped = build(settings_of(name)).eval()
    assert torch.equal(model(input_ids=IDS).logits, undropped(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {}),  # drops its embedding by `hidden_dropout`
        ("phi3", {"num_key_value_heads": 2}),  # has `embd_pdrop`, which nothing reads
        ("starcoder2", {"num_key_value_heads": 2}),
    ],
)
def test_the_embedding_is_dropped_once_whatever_the_config_calls_it(
    model_type: str, changes: dict[str, Any], settings_of: Settings
) -> None:
    settings = settings_of("gpt2", model_type=model_type, intermediate_size=48, **changes)
    model = build(settings, dropout=0.3).train()
    shares: list[float] = []
    layers(model)[0].register_forward_pre_hook(
        lambda _, args, kw: shares.append(((args[0] if args else kw["hidden_states"]) == 0).float().mean().item()),
        with_kwargs=True,
    )
    model.base_model(input_ids=IDS, use_cache=False)
    assert shares == pytest.approx([0.3], abs=0.02)


def test_dropout_that_cannot_be_applied_is_refused(settings_of: Settings) -> None:
    model = build(settings_of("llama"))
    for layer in layers(model):
        layer.elsewhere = layer.mlp
        del layer.mlp
    with pytest.raises(InputError, match=r"dropout 0\.1 cannot be applied to llama: its LlamaDecoderLayer has none"):
        add_missing_dropout(model, 0.1)
    model.config = SimpleNamespace(model_type="llama")
    with pytest.raises(InputError, match=r"dropout 0\.1 cannot be applied to the attention of llama"):
        add_missing_dropout(model, 0.1)
    add_missing_dropout(model, 0.0)


REFUSED = [
    ({}, "no model_type"),
    ({"model_type": 3}, "no model_type"),
    ({"model_type": "qwen-99"}, "'qwen-99' is unknown to transformers"),
    ({"model_type": "vit"}, "'vit' is no causal language model"),
    ({"model_type": "llama", "hiden_size": 8}, "llama has no setting named hiden_size"),
    ({"model_type": "llama", "to_dict": 8}, "llama has no setting named to_dict"),
    ({"model_type": "llama", "hidden_size": "wide"}, "refuses these settings: .*expected int"),
    ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_no_config_takes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_config(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4, "n_layer": 1, "vocab_size": 50257}, "divisible"),
    ],
    ids=["heads"],
)
def test_configs_without_a_model_for_us_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        count_parameters(settings)
    with pytest.raises(InputError, match=message):
        build(settings)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_without_building(name: str, settings_of: Settings) -> None:
    for is_tied in (True, False):
        settings = settings_of(name, tie_word_embeddings=is_tied)
        model = build(settings)
        total, matrices = count_parameters(settings)
        assert total == sum(parameter.numel() for parameter in model.parameters())
        weights = [p for n, p in model.named_parameters() if ".h." in n or ".layers." in n]
        inner = sum(weight.numel() for weight in weights if weight.ndim == 2)
        assert matrices == inner + 97 * 32
