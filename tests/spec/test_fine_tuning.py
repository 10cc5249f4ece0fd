"""Recipes that start from a trained model: what is meant, and what follows from it."""

from pathlib import Path
from typing import Any

import pytest

from onecard.errors import RecipeError
from onecard.spec import load_recipe
from onecard.spec.dump import recipe_to_yaml

MODEL = {"model_name_or_path": "gpt2", "dataset": "chats.jsonl"}
# As people have it for other tools.
FLAT = """
model_name_or_path: HuggingFaceTB/SmolLM2-135M
dataset: chats.jsonl
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
max_seq_length: 512
gradient_checkpointing: true
fp16: true
gradient_accumulation_steps: 16
lr_scheduler_type: cosine
warmup_steps: 30
learning_rate: 4e-5
dataloader_num_workers: 2
load_best_model_at_end: true
metric_for_best_model: eval_loss
remove_unused_columns: false
lora: {r: 8, lora_alpha: 16}
resume_from_checkpoint: null
"""


def problems(**settings: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(settings)
    return "\n".join(caught.value.problems)


def test_a_flat_file_of_other_tools_runs_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(FLAT, encoding="utf-8")
    recipe = load_recipe(path)
    assert (recipe.task, recipe.method, recipe.optim, recipe.precision) == ("sft", "lora", "adamw", "fp16")
    assert (recipe.lora_r, recipe.lora_alpha, recipe.learning_rate) == (8, 16, 4e-5)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (4, 16)
    assert (recipe.num_train_epochs, recipe.warmup_steps, recipe.warmup_ratio) == (3, 30, None)


@pytest.mark.parametrize(
    ("settings", "task", "method"),
    [
        ({}, "sft", "full"),
        ({"task": "pretrain"}, "pretrain", "full"),
        ({"lora": {"r": 4}}, "sft", "lora"),
        ({"lora": True}, "sft", "lora"),
        ({"lora": None}, "sft", "full"),
        ({"lora": "{r: 4}"}, "sft", "lora"),
        ({"lora_alpha": 8}, "sft", "lora"),
        ({"use_peft": True}, "sft", "lora"),
        ({"use_peft": False, "lora_r": 16}, "sft", "full"),
        ({"use_peft": True, "load_in_4bit": "true"}, "sft", "qlora"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "sft", "qlora"),
        ({"load_in_4bit": False, "lora": {"rank": 4}}, "sft", "lora"),
        ({"method": "qlora", "load_in_4bit": True}, "sft", "qlora"),
    ],
    ids=str,
)
def test_task_and_method_follow_from_what_is_given(settings: dict[str, Any], task: str, method: str) -> None:
    recipe = load_recipe(MODEL | settings)
    assert (recipe.task, recipe.method) == (task, method)
    assert recipe.learning_rate == (2e-5 if method == "full" else 2e-4)


def test_defaults_of_fine_tuning_give_way_to_everything_that_is_given() -> None:
    recipe = load_recipe(MODEL | {"max_steps": 10, "warmup_steps": 2, "optim": "muon", "lr": 1e-3})
    assert (recipe.max_steps, recipe.num_train_epochs, recipe.optim, recipe.learning_rate) == (10, None, "muon", 1e-3)
    assert (recipe.warmup_steps, recipe.warmup_ratio) == (2, None)


def test_a_fine_tuning_recipe_survives_a_run_folder(tmp_path: Path) -> None:
    recipe = load_recipe(MODEL | {"lora": {"target_modules": ["c_attn", "c_proj"], "r": 2}, "max_steps": 3})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert recipe.lora_target_modules == ("c_attn", "c_proj")


@pytest.mark.parametrize("given", ["q_proj, v_proj", ["q_proj,v_proj"], ["q_proj", "v_proj"], "[q_proj, v_proj]"])
def test_layers_to_adapt_may_be_listed_in_any_way(given: Any) -> None:
    recipe = load_recipe(MODEL | {"method": "lora"}, lora_target_modules=given)
    assert recipe.lora_target_modules == ("q_proj", "v_proj")


def test_a_recipe_from_scratch_keeps_no_word_of_adapters() -> None:
    text = recipe_to_yaml(load_recipe("demo"))
    assert "lora" not in text
    assert "max_rounds" not in text


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"bf16": True, "torch_dtype": "float32"}, "bf16"),
        ({"torch_dtype": "float32", "fp16": True, "bf16": False}, "fp16"),
        ({"bf16": True, "torch_dtype": "auto"}, "bf16"),
        ({"torch_dtype": "auto", "bnb_4bit_compute_dtype": "bfloat16", "method": "qlora"}, "bf16"),
        ({"bnb_4bit_compute_dtype": "float16", "torch_dtype": "auto", "method": "qlora"}, "fp16"),
        ({"torch_dtype": "float32", "bnb_4bit_compute_dtype": "bfloat16", "method": "qlora"}, "bf16"),
        ({"torch_dtype": "float32"}, "fp32"),
    ],
    ids=str,
)
def test_the_type_of_the_weights_yields_to_that_of_the_arithmetic(settings: dict[str, Any], precision: str) -> None:
    assert load_recipe(MODEL | settings).precision == precision


def test_what_says_nothing_here_is_accepted_and_other_tools_words_are_known() -> None:
    dumped = {"overwrite_output_dir": False, "trust_remote_code": False, "group_by_length": True, "do_train": True}
    assert load_recipe(MODEL | dumped | {"ddp_find_unused_parameters": None}) == load_recipe(MODEL)
    words = {"stage": "sft", "finetuning_type": "lora", "cutoff_len": 512, "val_size": 0.1}
    recipe = load_recipe(MODEL | words)
    assert (recipe.task, recipe.method, recipe.max_seq_length, recipe.eval_fraction) == ("sft", "lora", 512, 0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": "a", "task": "sft", "max_steps": 1}, "set model_name_or_path"),
        ({"dataset": "a", "method": "lora", "max_steps": 1}, "set model_name_or_path"),
        (MODEL | {"hidden_size": 64}, "hidden_size 64 has no effect"),
        (MODEL | {"model_config": {"model_type": "llama"}}, "model_config has no effect"),
        (MODEL | {"tokenizer": "bytes"}, "an existing model has its own"),
        (MODEL | {"method": "full", "lora_r": 4}, "lora_r 4 has no effect"),
        (MODEL | {"method": "full", "load_in_4bit": True}, "weights in 4 bits cannot be trained"),
        (MODEL | {"task": "pretrain", "max_rounds": 4}, "max_rounds 4 has no effect"),
        (MODEL | {"lora": {"rr": 4}}, "rr cannot be set there"),
        (MODEL | {"lora": 7}, "takes a mapping such as"),
        (MODEL | {"lora": {"r": 0}}, "lora_r is 0"),
        (MODEL | {"lora": "{r: 4"}, "no complete mapping"),
        (MODEL | {"bnb_4bit_quant_type": "fp4"}, "onecard knows only nf4 here"),
        (MODEL | {"assistant_only_loss": False}, "onecard knows only true here"),
        (MODEL | {"trust_remote_code": True}, "no code that comes with a model is ever run"),
        (MODEL | {"overwrite_output_dir": True}, "give another output_dir"),
        (MODEL | {"fp16": True, "bnb_4bit_compute_dtype": "bfloat16"}, "keep the one that the card computes"),
        (MODEL | {"bf16": True, "torch_dtype": "float16"}, "bf16 and torch_dtype contradict each other"),
        (MODEL | {"precision": "fp32", "bf16": True}, "bf16 and precision contradict each other"),
        (MODEL | {"save_strategy": "best"}, "leave it out for ten times in a run, or set save_steps"),
        (MODEL | {"template": "qwen"}, "template is not a setting: leave it out for the tokenizer's own"),
        (MODEL | {"max_samples": 100}, "max_samples is not a setting: give fewer rows"),
        (MODEL | {"stage": "dpo"}, "stage is 'dpo', but takes sft or pt"),
        (MODEL | {"finetuning_type": "freeze"}, "finetuning_type is 'freeze', but takes full, lora or qlora"),
        (MODEL | {"on_bad_row": "ignore"}, "takes error or skip"),
        ({"dataset": "a", "model_name_or_path": " ", "max_steps": 1}, "null starts from scratch"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_told(settings: dict[str, Any], words: str) -> None:
    assert words in problems(**settings)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"save_strategy": "epoch", "save_steps": 500}, {"save_steps": "epoch"}),
        ({"evaluation_strategy": "epoch"}, {"eval_steps": "epoch"}),
        ({"logging_strategy": "epoch", "logging_steps": 5}, {"logging_steps": "epoch"}),
        ({"metric_for_best_model": "eval_loss"}, {"metric_for_best_model": "loss"}),
        ({"auto_find_batch_size": True}, {"fit": "auto"}),
        ({"attn_implementation": "flash_attention_2"}, {}),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}, "tf32": True, "save_safetensors": True}, {}),
    ],
)
def test_files_of_transformers_keep_their_meaning(given: dict[str, Any], changed: dict[str, Any]) -> None:
    plain, found = (load_recipe(MODEL | more, require_dataset=False) for more in ({}, given))
    keys = type(found).model_fields
    differences = {key: getattr(found, key) for key in keys if getattr(found, key) != getattr(plain, key)}
    assert {key: value for key, value in differences.items() if key != "warmup_ratio"} == changed
