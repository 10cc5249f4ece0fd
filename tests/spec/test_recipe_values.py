"""Numbers, truth values, lists and words as people and YAML write them."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.spec import Recipe, load_recipe


def value_of(key: str, value: Any) -> Any:
    recipe = load_recipe({key: value}, require_dataset=False)
    return getattr(recipe, "model_settings" if key == "model_config" else key)


@settings(deadline=None, derandomize=True)
@given(st.floats(min_value=1e-12, max_value=1e12), st.sampled_from(["{!r}", "{:e}", " {:.3e} ", "{:G}"]))
def test_rates_load_from_any_spelling_of_a_number(number: float, form: str) -> None:
    text = form.format(number)
    assert value_of("learning_rate", text) == float(text)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 10**15), st.sampled_from(["{}", "{:_}", " {} ", "+{}"]))
def test_counts_load_from_any_spelling_of_a_whole_number(number: int, form: str) -> None:
    assert value_of("max_tokens", form.format(number)) == number


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("learning_rate", "4e-5", 4e-5),
        ("max_steps", "1e4", 10_000),
        ("max_steps", "10_000", 10_000),
        ("max_tokens", "100000000000000001", 100_000_000_000_000_001),
        ("per_device_train_batch_size", "1e1", 10),
        ("num_train_epochs", "0.5", 0.5),
        ("deterministic", "Yes", True),
        ("deterministic", "off", False),
        ("deterministic", 1, True),
        ("torch_compile", "True", True),
        ("torch_compile", "AUTO", "auto"),
        ("gradient_checkpointing", "0.5", 0.5),
        ("gradient_checkpointing", "1", True),
        ("gradient_checkpointing", 1.0, True),
        ("gradient_checkpointing", 0, False),
        ("per_device_train_batch_size", "auto", "auto"),
        ("per_device_train_batch_size", "8", 8),
        ("max_steps", "None", None),
        ("run_name", "null", None),
        ("max_grad_norm", 0, None),
        ("max_grad_norm", "0.0", None),
        ("max_steps", -1, None),
        ("run_name", 5060, "5060"),
        ("precision", "BFloat16", "bf16"),
        ("precision", "torch.float16", "fp16"),
        ("lr_scheduler_type", "warmup_stable_decay", "wsd"),
        ("lr_scheduler_type", "cosine_with_min_lr", "cosine"),
        ("optim", "adamw_torch_fused", "adamw"),
        ("optim", "adamw_bnb_8bit", "adamw_8bit"),
        ("optim", "paged_adamw_32bit", "paged_adamw"),
        ("optim", "paged_adamw_8bit", "paged_adamw_8bit"),
        ("device", "gpu", "cuda"),
        ("device", 1, "cuda:1"),
        ("report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("report_to", "[wandb]", ("wandb",)),
        ("report_to", False, ()),
        ("report_to", "none", ()),
        ("sample_prompts", "a, b", ("a, b",)),
        ("sample_prompts", "[x for x in", ("[x for x in",)),
        ("sample_prompts", '["a", "b"]', ("a", "b")),
        ("sample_prompts", "[1, 2]", ("[1, 2]",)),
        ("on_device", "{cpu: {seed: 3}}", {"cpu": {"seed": 3}}),
        ("model_config", "{model_type: gpt2, n_layer: 2}", {"model_type": "gpt2", "n_layer": 2}),
        ("model_config", {"rope": [{"theta": "1e6"}], "name": "2e"}, {"rope": [{"theta": 1e6}], "name": "2e"}),
        ("memory_limit_gb", "6", 6.0),
        ("memory_limit_gb", "3GiB", 3.0),
        ("memory_limit_gb", "3.2GB", 3.2e9 / 2**30),
        ("memory_limit_gb", " 512 mib ", 0.5),
        ("memory_limit_gb", "none", None),
        ("reserve_gb", "1.5GiB", 1.5),
        ("resume_from_checkpoint", "True", True),
        ("resume_from_checkpoint", "latest", "latest"),
    ],
)
def test_values_are_understood_as_people_write_them(key: str, text: Any, expected: Any) -> None:
    value = value_of(key, text)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("switches", "precision"),
    [
        ({"fp16": "True"}, "fp16"),
        ({"fp16": "True", "bf16": "False"}, "fp16"),
        ({"fp16": False, "bf16": False}, "fp32"),
        ({"fp16": False}, "fp32"),
        ({"precision": "bf16", "fp16": False}, "bf16"),
        ({"precision": "fp16", "fp16": False}, "fp32"),
        ({"precision": "fp32", "fp32": False}, "auto"),
        ({"mixed_precision": "no"}, "fp32"),
        ({"mixed_precision": True}, "auto"),
        ({"mixed_precision": "bf16"}, "bf16"),
        ({"no-mixed-precision": True}, "fp32"),
        ({"no_mixed_precision": "False"}, "auto"),
        ({"torch_dtype": "float32"}, "fp32"),
    ],
)
def test_precision_by_the_switches_of_other_tools(switches: dict[str, Any], precision: str) -> None:
    assert load_recipe(switches, require_dataset=False).precision == precision


@pytest.mark.parametrize(
    ("recipe", "flags", "precision"),
    [
        ({"precision": "fp16"}, {"fp16": "False"}, "fp32"),
        ({"fp16": True}, {"bf16": True}, "bf16"),
        ({"bf16": True}, {"fp16": False}, "bf16"),
        ({"bf16": True}, {"precision": "auto"}, "auto"),
        ({"fp32": True}, {"mixed_precision": True}, "auto"),
    ],
)
def test_precision_switches_across_layers(recipe: dict[str, Any], flags: dict[str, Any], precision: str) -> None:
    assert load_recipe(recipe, require_dataset=False, **flags).precision == precision


def test_strategies_of_transformers_become_steps() -> None:
    recipe = load_recipe(
        {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": False, "save_interval": 0}, require_dataset=False
    )
    assert (recipe.eval_steps, recipe.save_steps) == (5, 0)


def test_sources_load_from_text_mapping_and_list() -> None:
    text = "dataset:\n  - a.txt\n  - {path: b.txt, weight: 2e-1}\neval_dataset: {path: c, split: test}"
    recipe = load_recipe(yaml.safe_load(text))
    assert [(source.path, source.weight) for source in recipe.dataset] == [("a.txt", 1.0), ("b.txt", 0.2)]
    assert recipe.eval_dataset[0].split == "test"
    assert load_recipe(dataset="[ab]*.txt").dataset[0].path == "[ab]*.txt"
    assert [source.path for source in load_recipe(dataset="[a.txt, b.txt]").dataset] == ["a.txt", "b.txt"]


def test_sources_load_from_the_texts_of_several_flags() -> None:
    texts = ["{path: rows.jsonl, text_column: body, weight: 2}", "[a.txt, {path: b.txt}]", "c[1].txt"]
    sources = value_of("dataset", texts)
    assert [source.path for source in sources] == ["rows.jsonl", "a.txt", "b.txt", "c[1].txt"]
    assert (sources[0].text_column, sources[0].weight) == ("body", 2)
    assert value_of("report_to", ["tensorboard,wandb"]) == ("tensorboard", "wandb")
    assert value_of("sample_prompts", ["[a", '["a"]']) == ("[a", '["a"]')


def test_the_column_of_all_sources_can_be_named_alone() -> None:
    recipe = load_recipe({"dataset": "a.jsonl", "text_column": "body"})
    assert recipe.dataset[0].text_column == "body"
    assert load_recipe(dataset=["b.jsonl", "c.jsonl"], text_column="body").dataset[1].text_column == "body"
    assert load_recipe({"dataset": "a.jsonl", "text_column": "body"}, dataset="b").dataset[0].text_column == "text"


def test_values_that_python_already_has_are_kept() -> None:
    given = Recipe(max_steps=5, learning_rate=1e-3, gradient_checkpointing=True, sample_prompts=("a",))
    loaded = load_recipe(
        max_steps=5, learning_rate=1e-3, gradient_checkpointing=True, sample_prompts=["a"], require_dataset=False
    )
    assert loaded == given
