"""Adapters change nothing before they are trained, merge into what they compute, and are what plain PEFT reads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from onecard.errors import CheckpointError, InputError
from onecard.model.adapt import adapt, count_trained
from onecard.model.build import build_model
from onecard.model.decoder import Decoder
from onecard.model.folder import load_model_folder, save_adapter_folder, save_model_folder
from onecard.model.nf4 import NF4Linear, find_linears
from onecard.spec import AdaptPlan

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
NAMES = ["llama", "qwen2", "qwen3", "gpt2"]


@pytest.fixture
def build(settings_of: Callable[..., dict[str, Any]]) -> Callable[[str], PreTrainedModel]:
    def make(name: str) -> PreTrainedModel:
        settings = settings_of("llama", model_type="qwen2") if name == "qwen2" else settings_of(name)
        return build_model(settings, dropout=0.0, init="transformers", seed=0).eval()

    return make


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter += 0.05 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_change_nothing(name: str, method: str, build: Callable[[str], PreTrainedModel]) -> None:
    base, model = build(name), build(name)
    if method == "qlora":
        for path, module in find_linears(base).items():
            base.set_submodule(path, NF4Linear.from_linear(module))
    adapt(model, AdaptPlan(method=method, r=4), seed=0)
    assert torch.equal(logits(model), logits(base))
    assert type(model) is type(base)


@pytest.mark.parametrize(
    ("bias", "count"),
    [("none", 0), ("lora_only", 2 * 4), ("all", 2 * 6 + 1)],  # four linears and two norms per layer, one norm behind
)
def test_adapters_move_and_biases_where_asked_for(bias: str, count: int, build: Callable[[str], Any]) -> None:
    model = build("gpt2")
    adapt(model, AdaptPlan(method="qlora", r=4, bias=bias), seed=0)
    moving = trained(model)
    assert len([name for name in moving if ".lora_" in name]) == 2 * 2 * 4
    assert len([name for name in moving if name.endswith(".bias")]) == count
    assert len(moving) == 2 * 2 * 4 + count


def test_named_layers_alone_are_adapted_and_adapters_depend_on_the_seed_alone(build: Callable[[str], Any]) -> None:
    models = []
    for seed in (0, 0, 1):
        models.append(build("llama"))
        torch.rand(3)
        adapt(models[-1], AdaptPlan(method="lora", r=4, target_modules=("q_proj", "1.mlp.up_proj")), seed=seed)
    first, same, other = (trained(model) for model in models)
    assert {name.rsplit(".lora_", 1)[0] for name in first} == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)),
        "model.layers.1.mlp.up_proj",
    }
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_computes_what_the_adapted_one_did(
    name: str, method: str, build: Callable[[str], PreTrainedModel]
) -> None:
    from onecard.model.lora import merge

    model, plain = build(name), build(name)
    adapt(model, AdaptPlan(method=method, r=4), seed=0)
    disturb(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(plain), atol=1e-2)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()
    }


# PEFT asks transformers for a property by its old name (0.21 and 5.23).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_peft_loads_the_same_logits(
    name: str, bias: str, tmp_path: Path, build: Callable[[str], PreTrainedModel]
) -> None:
    from peft import PeftModel

    save_model_folder(build(name), {}, tmp_path / "base")
    model = build(name)
    adapt(model, AdaptPlan(method="lora", r=4, bias=bias), seed=0)
    disturb(model)
    expected = logits(model)
    (tmp_path / "adapter").mkdir()
    masters = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    for parameter in model.parameters():  # as in training with 16 bits: the masters are what counts
        parameter.data = parameter.data.to(torch.bfloat16)
    save_adapter_folder(model, masters, tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method", "bias"), [("qwen3", "lora", "none"), ("qwen3", "qlora", "none"), ("gpt2", "qlora", "all")]
)
def test_an_adapter_folder_opens_as_the_model_that_was_trained(
    name: str, method: str, bias: str, tmp_path: Path, build: Callable[[str], PreTrainedModel]
) -> None:
    plan = AdaptPlan(method=method, r=4, double_quant=False, bias=bias)
    model = adapted_folder(build(name), plan, tmp_path, build(name))
    loaded, _ = load_model_folder(tmp_path / "adapter", torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)

    half, _ = load_model_folder(tmp_path / "adapter", torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in half.buffers()} <= {torch.float32}


def adapted_folder(model: PreTrainedModel, plan: AdaptPlan, root: Path, base: PreTrainedModel) -> PreTrainedModel:
    save_model_folder(base, {}, root / "base")
    model.config.name_or_path = str(root / "base")
    adapt(model, plan, seed=0)
    disturb(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a"
    )
    tokenizer.save_pretrained(root / "adapter")
    save_adapter_folder(model, {}, root / "adapter")
    return model


def name_base(root: Path, name: Any) -> None:
    path = root / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": name}), encoding="utf-8")


def cut_weights(root: Path) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def rename_weights(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = root / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: name_base(root, None), "does not say which model it belongs to"),
        (lambda root: name_base(root, 5), "its base_model_name_or_path is 5"),
        (lambda root: name_base(root, "/it/is/gone"), "an adapter of /it/is/gone, which cannot be used: .*Put that"),
        (lambda root: (root / "adapter" / "frozen_weights.json").write_text("{"), "holds no adapter"),
        (lambda root: (root / "adapter" / "frozen_weights.json").write_text("[]"), "is no JSON object"),
        (cut_weights, "holds no adapter that transformers can read"),
        (rename_weights, "8 parts differ"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_explained(
    damage: Callable[[Path], None], message: str, tmp_path: Path, build: Callable[[str], PreTrainedModel]
) -> None:
    adapted_folder(build("llama"), AdaptPlan(method="lora", r=4), tmp_path, build("llama"))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model_folder(tmp_path / "adapter", torch.float32)


# Dynamo instantiates torch.autograd.Function, which warns against that (PyTorch 2.13).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("name", "method"), [("qwen3", "qlora"), ("gpt2", "lora")])
def test_adapted_decoders_compile_without_a_graph_break(
    name: str, method: str, build: Callable[[str], PreTrainedModel]
) -> None:
    model = build(name)
    adapt(model, AdaptPlan(method=method, r=4), seed=0)
    disturb(model)
    decoder = Decoder(model, compiled=False)
    gradients = []
    for compiled in (False, True):
        if compiled:
            decoder._call = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
        # The sum of a norm's squares would be constant, and its gradients nothing but rounding.
        decoder(IDS, None)[..., 0].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
        model.zero_grad()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"target_modules": ("q_porj",)}, ["'q_porj' matches no layer of LlamaForCausalLM", "q_proj"]),
        ({"target_modules": ("xyz",)}, ["it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"]),
        ({"target_modules": ("lm_head",)}, ["'lm_head' is no linear layer inside LlamaForCausalLM"]),
        ({"target_modules": ("embed_tokens", "c_attn")}, ["'embed_tokens' is no linear", "'c_attn' matches no layer"]),
        ({"target_modules": ()}, ["target_modules is empty"]),
        ({"r": 17}, ["r 17 is more than the 16 rows or columns of model.layers.0.self_attn.k_proj", "set r to 16"]),
        ({"r": 40, "target_modules": ("q_proj", "qproj")}, ["'qproj' matches no layer", "r 40 is more than the 32"]),
    ],
)
def test_adapters_that_cannot_be_are_explained_together(
    changes: dict[str, Any], problems: list[str], build: Callable[[str], PreTrainedModel]
) -> None:
    model = build("llama")
    with pytest.raises(InputError) as raised:
        adapt(model, AdaptPlan(method="qlora", **{"r": 4} | changes), seed=0)
    for problem in problems:
        assert problem in str(raised.value)
    assert not any(isinstance(module, NF4Linear) for module in model.modules()), "nothing may be changed"


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_what_moves_is_counted_without_weights(
    name: str, bias: str, build: Callable[[str], PreTrainedModel], settings_of: Callable[..., dict[str, Any]]
) -> None:
    model = build(name)
    plan = AdaptPlan(method="qlora", r=4, bias=bias)
    adapt(model, plan, seed=0, tokens=[3, 5, 90])
    expected = sum(parameter.numel() for parameter in trained(model).values())
    assert count_trained(json.dumps(settings_of(name)), plan.model_dump_json(), 3) == expected


_WITH_A_BROKEN_BITSANDBYTES = """
from pathlib import Path

from onecard.errors import InputError
from onecard.model import lora
from onecard.model.adapt import adapt
from onecard.model.build import build_model
from onecard.spec import AdaptPlan

model = build_model({settings}, dropout=0.0, init="transformers", seed=0)
adapt(model, AdaptPlan(method="lora", r=4), seed=0)
lora.save(model, {{}}, Path({folder!r}))
assert not lora.attach(build_model({settings}, dropout=0.0, init="transformers", seed=0), Path({folder!r}))
print(sum(p.numel() for p in model.parameters() if p.requires_grad))
try:
    adapt(build_model({settings}, dropout=0.0, init="transformers", seed=0), AdaptPlan(method="qlora", r=4), seed=0)
except InputError as error:
    print(error)
"""


def test_a_broken_bitsandbytes_is_no_concern_of_lora_and_is_explained_for_qlora(
    settings_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(
        'raise ImportError("no libbitsandbytes")\n', encoding="utf-8"
    )
    # In a process of its own: here bitsandbytes may be loaded already.
    code = _WITH_A_BROKEN_BITSANDBYTES.format(settings=settings_of("llama"), folder=str(tmp_path))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    number, sentence = done.stdout.splitlines()
    assert int(number) > 0
    assert "method qlora needs bitsandbytes" in sentence
    assert "no libbitsandbytes" in sentence
