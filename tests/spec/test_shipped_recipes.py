"""The shipped recipes: they load, in every size and on every device, with the numbers they promise."""

from typing import Any

import pytest
import yaml

from onecard.spec import Recipe, apply_device, describe_recipe, load_recipe, recipe_names, recipe_to_yaml
from onecard.spec.agreement import SHAPE_KEYS

SIZES = {
    "a6000-pretrain": ("small", "medium", "large"),
    "rtx-5060-pretrain": (None, "medium"),
}
FROM_SCRATCH = tuple(name for name in recipe_names() if load_recipe(name).model_name_or_path is None)
FINE_TUNED = tuple(name for name in recipe_names() if name not in FROM_SCRATCH)
VARIANTS = [
    (name, size, device) for name in FROM_SCRATCH for size in SIZES.get(name, (None,)) for device in ("cpu", "cuda")
]
# 65 characters and the end of the text.
SHAKESPEARE_VOCAB_SIZE = 66

PARAMETERS = {
    ("a6000-pretrain", "small"): 25_566_592,
    ("a6000-pretrain", "medium"): 124_280_320,
    ("a6000-pretrain", "large"): 345_034_752,
    ("demo", "cpu"): 3_262_592,
    ("demo", "cuda"): 25_699_840,
    ("large-gpu-pretrain", None): 23_076_096,
    ("rtx-5060-pretrain", None): 74_731_776,
    ("rtx-5060-pretrain", "medium"): 35_661_312,
    ("shakespeare-char", None): 10_771_200,
    ("shakespeare-char-cpu", None): 796288,
    ("small-gpu-pretrain", None): 1_442_560,
    ("small-pretrain", "cpu"): 23_076_096,
    ("small-pretrain", "cuda"): 4_458_624,
}


def load(name: str, size: str | None, device: str) -> Recipe:
    return apply_device(load_recipe(name, **({"size": size} if size else {})), device)


def count_parameters(recipe: Recipe) -> int:
    """Counts on the meta device, which holds no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert isinstance(recipe.model_settings, dict)
    shape = {key: value for key in SHAPE_KEYS if (value := getattr(recipe, key)) is not None}
    settings: dict[str, Any] = recipe.model_settings | shape | {"max_position_embeddings": recipe.max_seq_length}
    settings["vocab_size"] = recipe.vocab_size or SHAKESPEARE_VOCAB_SIZE
    settings |= {"bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_promised_recipes_are_there() -> None:
    assert recipe_names() == (
        "a6000-pretrain",
        "demo",
        "large-gpu-pretrain",
        "rtx-3060-dialogpt-medium",
        "rtx-3060-distilgpt2",
        "rtx-3060-gpt2",
        "rtx-3060-tinyllama",
        "rtx-4060-laptop-sft",
        "rtx-4060-laptop-sft-aggressive",
        "rtx-4060-laptop-sft-minimal",
        "rtx-5060-pretrain",
        "shakespeare-char",
        "shakespeare-char-cpu",
        "small-gpu-pretrain",
        "small-pretrain",
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_describes_itself_and_survives_a_run_folder(name: str) -> None:
    info = describe_recipe(name)
    loaded = load_recipe(name)
    assert loaded.name == info.name == name
    assert loaded.description == info.description != ""
    assert info.text.startswith(f"name: {name}\n")
    assert load_recipe(yaml.safe_load(recipe_to_yaml(loaded))) == loaded


@pytest.mark.parametrize(("name", "size", "device"), VARIANTS)
def test_a_recipe_has_the_parameters_it_promises(name: str, size: str | None, device: str) -> None:
    expected = PARAMETERS.get((name, size)) or PARAMETERS[name, device]
    assert count_parameters(load(name, size, device)) == expected


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_flags_win_in_every_recipe_on_every_device(name: str) -> None:
    flags = {"hidden-dim": "192", "n-layers": 1, "n-heads": 3, "n-kv-heads": 3, "batch-size": 2, "max-iters": 7}
    for device in ("cpu", "cuda"):
        recipe = apply_device(load_recipe(name, **flags, grad_accum=3, device=device, precision="fp32"), device)
        assert (recipe.hidden_size, recipe.num_hidden_layers, recipe.num_attention_heads) == (192, 1, 3)
        assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 3)
        assert (recipe.total_batch_size, recipe.max_steps, recipe.num_train_epochs) == (None, 7, None)
        assert (recipe.device, recipe.precision) == (device, "fp32")


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize(
    "flags",
    [
        {"optim": "adamw"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine"},
        {"num_workers": 0},
        {"eval_dataset": "a.txt"},
        {"eval_fraction": 0},
        {"sample_prompts": []},
    ],
    ids=str,
)
def test_switching_something_off_needs_no_second_flag(name: str, flags: dict[str, Any]) -> None:
    for size in SIZES.get(name, (None,)):
        for device in ("cpu", "cuda"):
            apply_device(load_recipe(name, **flags, **({"size": size} if size else {})), device)


@pytest.mark.parametrize("name", FROM_SCRATCH)
@pytest.mark.parametrize("flags", [{"tokenizer": "bytes"}, {"model_name_or_path": "gpt2"}], ids=str)
def test_another_tokenizer_or_a_trained_model_needs_no_second_flag(name: str, flags: dict[str, Any]) -> None:
    for device in ("cpu", "cuda"):
        apply_device(load_recipe(name, **flags), device)


@pytest.mark.parametrize("name", FINE_TUNED)
@pytest.mark.parametrize(
    "flags", [{"method": "full"}, {"method": "qlora", "lora_r": 64}, {"task": "pretrain"}], ids=str
)
def test_fine_tuning_changes_its_method_by_one_flag(name: str, flags: dict[str, Any]) -> None:
    recipe = load_recipe(name, **flags)
    assert {key: getattr(recipe, key) for key in flags} == flags


def test_rtx_5060_pretrain_has_the_numbers_of_its_page() -> None:
    recipe = load_recipe("rtx-5060-pretrain")
    shape = (recipe.hidden_size, recipe.num_hidden_layers, recipe.num_attention_heads, recipe.num_key_value_heads)
    assert shape == (768, 12, 12, 6)
    assert (recipe.intermediate_size, recipe.vocab_size, recipe.max_seq_length) == (1024, 32_768, 1024)
    assert (recipe.dropout, recipe.per_device_train_batch_size, recipe.learning_rate) == (0.1, 24, 3e-4)
    assert (recipe.max_steps, recipe.eval_steps, recipe.eval_batches, recipe.save_steps) == (10_000, 500, 50, 1000)
    assert (recipe.warmup_steps, recipe.lr_scheduler_type, recipe.early_stopping_patience) == (1000, "cosine", 5)
    assert recipe.min_lr_ratio * recipe.learning_rate == pytest.approx(1e-5)
    assert recipe.tie_word_embeddings is True
    assert any(not prompt.isascii() for prompt in recipe.sample_prompts)


@pytest.mark.parametrize("batch_size", [16, 24, 32])
@pytest.mark.parametrize("length", [512, 768, 1024])
@pytest.mark.parametrize("rate", ["1e-4", "5e-4"])
def test_rtx_5060_pretrain_varies_by_flag(batch_size: int, length: int, rate: str) -> None:
    recipe = load_recipe("rtx-5060-pretrain", batch_size=batch_size, model_max_length=length, lr=rate)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (batch_size, 1)
    assert (recipe.max_seq_length, recipe.learning_rate) == (length, float(rate))
    assert recipe.min_lr_ratio * recipe.learning_rate == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("small-pretrain", "cuda", (256, 3, 16, 2)),
        ("small-pretrain", "cpu", (512, 6, 4, 8)),
        ("small-gpu-pretrain", "cuda", (128, 2, 8, 4)),
        ("large-gpu-pretrain", "cuda", (512, 6, 32, 1)),
        ("a6000-pretrain", "cuda", (768, 14, 32, 4)),
        ("shakespeare-char", "cuda", (384, 6, 64, 1)),
    ],
)
def test_width_depth_and_batch_are_the_promised_ones(name: str, device: str, expected: tuple[int, ...]) -> None:
    recipe = load(name, None, device)
    batch = (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps)
    assert (recipe.hidden_size, recipe.num_hidden_layers, *batch) == expected


def test_shakespeare_char_is_the_baby_gpt() -> None:
    recipe = load_recipe("shakespeare-char")
    assert (recipe.tokenizer, recipe.max_seq_length, recipe.max_steps, recipe.dropout) == ("char", 256, 5000, 0.2)
    assert (recipe.optim, recipe.adam_beta2, recipe.min_lr_ratio) == ("adamw", 0.99, pytest.approx(0.1))
    assert (recipe.eval_split, recipe.eval_fraction, recipe.num_attention_heads) == ("tail", 0.1, 6)


def test_only_shakespeare_needs_a_file_of_the_user() -> None:
    paths = {name: load_recipe(name).dataset[0].path for name in FROM_SCRATCH}
    assert {name for name, path in paths.items() if path != "python-stdlib"} == {
        "shakespeare-char",
        "shakespeare-char-cpu",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtx-4060-laptop-sft", (64, 4e-5, 5, 1024, 6, 0.01)),
        ("rtx-4060-laptop-sft-aggressive", (48, 6e-5, 6, 768, 8, 0.02)),
        ("rtx-4060-laptop-sft-minimal", (64, 4e-5, 5, 512, 4, 0.01)),
    ],
)
def test_rtx_4060_laptop_sft_has_the_numbers_of_its_page(name: str, expected: tuple[float, ...]) -> None:
    recipe = load_recipe(name)
    assert (recipe.task, recipe.method, recipe.optim) == ("sft", "full", "adamw")
    assert recipe.model_name_or_path == "HuggingFaceTB/SmolLM2-135M"
    lengths = (recipe.max_seq_length, recipe.max_rounds)
    assert (recipe.total_batch_size, recipe.learning_rate, recipe.num_train_epochs, *lengths, recipe.weight_decay) == (
        expected
    )
    assert (recipe.warmup_ratio, recipe.save_steps, recipe.gradient_checkpointing) == (0.2, 20, "auto")
    assert recipe.gradient_accumulation_steps == (32 if name.endswith("minimal") else "auto")


@pytest.mark.parametrize("model", ["distilgpt2", "gpt2", "dialogpt-medium"])
def test_rtx_3060_recipes_train_adapters_or_everything(model: str) -> None:
    recipe = load_recipe(f"rtx-3060-{model}")
    assert (recipe.method, recipe.max_seq_length, recipe.total_batch_size) == ("lora", 512, 32)
    assert (recipe.lr_scheduler_type, recipe.warmup_steps, recipe.learning_rate) == ("cosine", 30, 2e-4)
    full = load_recipe(f"rtx-3060-{model}", method="full")
    assert (full.method, full.learning_rate) == ("full", 2e-5)


def test_rtx_3060_tinyllama_is_qlora_with_any_rank_and_length() -> None:
    recipe = load_recipe("rtx-3060-tinyllama", lora_r=64, lora_alpha=128, max_length=2048)
    assert (recipe.method, recipe.double_quant, recipe.lora_r, recipe.lora_alpha) == ("qlora", True, 64, 128)
    assert recipe.max_seq_length == 2048
    assert load_recipe("rtx-3060-tinyllama").lora_r == 16
