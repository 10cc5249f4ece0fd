"""Mistakes: one plain sentence each, all of them together, named as the user wrote them."""

import time
from pathlib import Path
from typing import Any

import pytest

from onecard.errors import RecipeError
from onecard.spec import Recipe, apply_device, describe_recipe, load_recipe


def problems_of(source: Any = None, /, **flags: Any) -> tuple[str, ...]:
    if isinstance(source, dict):
        source = {"dataset": "text.txt"} | source
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, **flags)
    assert caught.value.exit_code == 2
    for jargon in ("pydantic", "validation error", "Input should", "https://", "type="):
        assert jargon not in str(caught.value)
    return caught.value.problems


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


NOT_UTF8 = "sample_prompts is ['a\\udcff'], but has bytes that are not UTF-8: write it as UTF-8 text"


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"lerning_rate": 1}, "lerning_rate is not a setting; did you mean learning_rate?"),
        ({"Max-Itres": 1}, "Max-Itres is not a setting; did you mean max_iters?"),
        ({"zzzzzzz": 1}, "zzzzzzz is not a setting; `onecard recipes --keys` lists them all"),
        ({None: 1}, "null is not a setting; `onecard recipes --keys` lists them all"),
        ({"dataset": ""}, "dataset is empty: give a file, a folder, a glob or a name"),
        ({"dataset": [{"path": ""}]}, "dataset[0] is empty: give a file, a folder, a glob or a name"),
        ({"report_to": 0}, "report_to is 0, but takes tensorboard, wandb, none or a list"),
        ({"report_to": float("inf")}, "report_to is inf, but takes tensorboard, wandb, none or a list"),
        ({"eval_tasks": 3}, "eval_tasks is 3, but takes ifeval, none or a list"),
        ({7: 1}, "7 is not a setting; `onecard recipes --keys` lists them all"),
        ({"lr": "fast"}, "lr is 'fast', but takes a number above 0"),
        ({"lr": "nan"}, "lr is 'nan', but takes a number above 0"),
        ({"lr": "inf"}, "lr is 'inf', but takes a number above 0"),
        ({"lr": None}, "lr is null, but takes a number above 0"),
        ({"dropout": 1}, "dropout is 1, but takes a number of 0 or more and below 1 or null"),
        ({"max_iters": "2.5"}, "max_iters is '2.5', but takes a whole number above 0 or null"),
        ({"max_steps": True}, "max_steps is true, but takes a whole number above 0 or null"),
        ({"batch_size": 0}, "batch_size is 0, but takes a whole number above 0 or auto"),
        ({"torch_compile": "maybe"}, "torch_compile is 'maybe', but takes true, false or auto"),
        (
            {"gradient_checkpointing": 1.5},
            "gradient_checkpointing is 1.5, but takes true, false, a number above 0 and below 1 or auto",
        ),
        ({"precision": "int8"}, "precision is 'int8', but takes auto, bf16, fp16 or fp32"),
        ({"fp16": "maybe"}, "fp16 is 'maybe', but takes true or false"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 contradict each other: keep one of them"),
        ({"bf16": "1", "dtype": "float16"}, "bf16 and dtype contradict each other: keep one of them"),
        ({"mixed_precision": "int8"}, "mixed_precision is 'int8', but takes true, false, bf16, fp16, fp32 or auto"),
        *(
            (
                {"memory_limit_gb": text},
                f"memory_limit_gb is '{text}', but takes a number of GiB above 0, a number with its unit such as 3.2GB "
                "or 3GiB, or null",
            )
            for text in ("3.2 gigs", "0GB", "-1GB", "GB")
        ),
        ({"memory_limit_gb": "11TiB"}, "memory_limit_gb is '11TiB', but takes at most 10,000"),
        ({"report_to": "mlflow"}, "report_to is 'mlflow', but takes tensorboard, wandb, none or a list"),
        (
            {"eval_strategy": "best"},
            "eval_strategy is 'best', but takes steps, epoch or no: "
            "leave it out for ten times in a run, or set eval_steps",
        ),
        ({"min_lr": 1, "lr": "fast"}, "lr is 'fast', but takes a number above 0"),
        ({"min_lr": "low"}, "min_lr is 'low', but takes a number"),
        (
            {"min_lr": 1, "lr": 0.5},
            "min_lr is 1.0, but takes a number from 0 to below learning_rate 0.5; "
            "for a rate that never falls set lr_scheduler_type to constant",
        ),
        (
            {"model_config": "{n_layer: 2"},
            "model_config is '{n_layer: 2', but takes a path or a mapping with model_type, "
            "and this is no complete mapping",
        ),
        ({"max_iters": 5, "epochs": 1}, "max_iters and epochs contradict each other: keep one of them"),
        ({"lr": 1, "learning_rate": 2}, "lr and learning_rate are one setting, but have different values: keep one"),
        (
            {"d_model": 64, "model_config": {"n_embd": 32}},
            "d_model is 64, but model_config has n_embd 32: keep one of them",
        ),
        ({"dataset": {"path": "a", "weight": -1}}, "dataset.weight is -1, but takes a number above 0"),
        ({"dataset": ["a", {"weight": 1}]}, "dataset[1] has no path: give a file, a folder, a glob or a name"),
        (
            {"dataset": [{"path": "a", "wieght": 1}]},
            "dataset[0].wieght is not a setting of a source; did you mean weight?",
        ),
        ({"data": "other.txt"}, "dataset and data are one setting, but have different values: keep one"),
        ({"eval_data": [{"path": 5}]}, "eval_data[0].path is 5, but takes text"),
        ({"eval_data": 5}, "eval_data is 5, but takes text"),
        ({"sizes": {"a": {"lr": -1}}}, "sizes.a: lr is -1, but takes a number above 0"),
        ({"sizes": {"a": {"lrr": 1}}}, "sizes.a: lrr is not a setting; did you mean lr?"),
        ({"sizes": {"a": {"sizes": {}}}}, "sizes.a: sizes cannot be set in such a section"),
        ({"sizes": {"a": 5}}, "sizes.a is 5, but takes a mapping of settings"),
        ({"sizes": 5}, "sizes is 5, but takes a mapping of named sections"),
        ({"on_device": {"cpu": {"lr": -1}}}, "on_device.cpu: lr is -1, but takes a number above 0"),
        ({"on_device": {"cpu": {"device": "cpu"}}}, "on_device.cpu: device cannot be set in such a section"),
        ({"on_device": {"tpu": {}}}, "on_device.tpu is no kind of device: use cpu or cuda"),
        (
            {"sizes": {"a": {"on_device": {"cuda": {"seed": -1}}}}},
            "sizes.a.on_device.cuda: seed is -1, but takes a whole number of 0 or more",
        ),
        ({"size": "a"}, "size is 'a', but this recipe has no sizes: leave it out"),
        (
            {"size": "smal", "sizes": {"small": {}, "big": {}}},
            "size is 'smal', but the sizes of this recipe are small, big; did you mean small?",
        ),
        ({"device": "mps"}, "device 'mps' is unknown: use auto, cpu, cuda or cuda:N"),
        ({"name": "a/b"}, "name 'a/b' cannot name a folder on every system: use letters, digits, - and _"),
        (
            {"model_config": {"n_embd": 100, "n_head": 3}},
            "hidden_size 100 is not a multiple of num_attention_heads 3: change one of them",
        ),
        (
            {"n_heads": 6, "n_kv_heads": 4},
            "num_attention_heads 6 is not a multiple of num_key_value_heads 4: change one of them",
        ),
        (
            {"sizes": {"a": {"n_heads": 6}}, "n_kv_heads": 4},
            "sizes.a: num_attention_heads 6 is not a multiple of num_key_value_heads 4: change one of them",
        ),
        (
            {"min_lr": 1e-4, "lr": 1e-3, "on_device": {"cpu": {"lr": 1e-5}}},
            "on_device.cpu: min_lr is 0.0001, but takes a number from 0 to below learning_rate 1e-05; "
            "for a rate that never falls set lr_scheduler_type to constant",
        ),
        (
            {"batch_size": 8, "grad_accum": 2, "total_batch_size": 8},
            "batch_size 8 x grad_accum 2 is not total_batch_size 8: drop one of them",
        ),
        (
            {"batch_size": 8, "grad_accum": 2, "total_batch_tokens": 8192},
            "per_device_train_batch_size 8 x gradient_accumulation_steps 2 = 16 sequences per step, "
            "but the total batch is 8: drop one of the three",
        ),
        (
            {"batch_size": 16, "total_batch_size": 8},
            "per_device_train_batch_size 16 is more than the total batch of 8: lower it to 8",
        ),
        ({"vocab_size": "4e9"}, "vocab_size is '4e9', but takes at most 10,000,000"),
        ({"d_model": "1e21"}, "d_model is '1e21', but takes at most 10,000,000"),
        ({"seed": 2**63}, "seed is 9223372036854775808, but takes at most 9,223,372,036,854,775,807"),
        ({"max_steps": 10**5000}, "max_steps is too large to show, but takes at most 1,000,000,000"),
        ({"dataset": {"path": "a", "weight": "inf"}}, "dataset.weight is 'inf', but takes at most 1,000,000"),
        ({"decay_ratio": 1.5}, "decay_ratio is 1.5, but takes a number above 0 and up to 1"),
        ({"name": "n" * 300}, "name has 300 characters, too many for a folder: use up to 56"),
        ({"sample_prompts": ["a\udcff"]}, NOT_UTF8),
        ({"text_column": 5}, "text_column is 5, but takes the name of a column"),
        (
            {"optim": "adamw", "muon_lr": 0.03},
            "muon_learning_rate 0.03 has no effect: it needs optim muon; change that, or leave muon_learning_rate out",
        ),
        (
            {"scheduler": "constant", "min_lr": 6e-4},
            "min_lr_ratio 0.1 has no effect: it needs an lr_scheduler_type other than constant; "
            "change that, or leave min_lr_ratio out",
        ),
        (
            {"eval_fraction": 0, "patience": 2},
            "early_stopping_patience 2 has no effect: it needs held-out text: eval_fraction above 0, or eval_dataset; "
            "change that, or leave early_stopping_patience out",
        ),
    ],
)
def test_a_mistake_is_one_plain_sentence(recipe: dict[Any, Any], problem: str) -> None:
    assert problems_of(recipe) == (problem,)


IDLE = (
    {"lr_scheduler_type": "cosine", "decay_ratio": 0.2},
    {"tokenizer": "bytes", "vocab_size": 300},
    {"eval_dataset": "a", "eval_fraction": 0.2},
    {"eval_dataset": "a", "eval_split": "tail"},
    {"eval_fraction": 0, "eval_split": "tail"},
    {"eval_fraction": 0, "eval_batches": 3},
    {"num_workers": 0, "prefetch_factor": 8},
    {"sample_max_new_tokens": 8},
)


@pytest.mark.parametrize("recipe", IDLE, ids=str)
def test_a_setting_without_effect_is_refused(recipe: dict[Any, Any]) -> None:
    (problem,) = problems_of(recipe)
    assert "has no effect: it needs" in problem


@pytest.mark.parametrize("text", ["model_config: &a {x: *a}", f"model_config: {{x: {'[' * 3000}{']' * 3000}}}"])
def test_what_refers_to_itself_or_is_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(write(tmp_path / "deep.yaml", f"dataset: a.txt\n{text}"))
    assert "nested too deeply" in problem


@pytest.mark.parametrize("value", ["9" * 5000, "2020-99-99"])
def test_a_value_that_yaml_cannot_make_is_refused(tmp_path: Path, value: str) -> None:
    (problem,) = problems_of(write(tmp_path / "value.yaml", f"seed: {value}"))
    assert problem.startswith("holds a value that cannot be read: ")


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/a.yaml"])
def test_a_path_that_cannot_be_is_no_recipe(name: str) -> None:
    assert "no such file" in problems_of(name)[0] or "no shipped recipe" in problems_of(name)[0]


def test_all_problems_come_together_each_once() -> None:
    recipe = {
        "lr": -1,
        "epocs": 3,
        "n_heads": 3,
        "hidden_dim": 64,
        "sizes": {"a": {"seed": "x"}},
        "on_device": {"cuda": {"layers_n": 1}},
    }
    assert problems_of(recipe, batch_size="many", size="b") == (
        "lr is -1, but takes a number above 0",
        "epocs is not a setting; did you mean epochs?",
        "sizes.a: seed is 'x', but takes a whole number of 0 or more",
        "on_device.cuda: layers_n is not a setting; did you mean n_layers?",
        "batch_size is 'many', but takes a whole number above 0 or auto",
        "size is 'b', but the sizes of this recipe are a",
        "hidden_size 64 is not a multiple of num_attention_heads 3: change one of them",
    )


def test_a_missing_dataset_is_reported_unless_it_was_given_wrongly() -> None:
    missing = "dataset is missing: name a text file, a folder, a glob, a Hub data set or python-stdlib"
    assert problems_of() == (missing,)
    assert problems_of(dataset={"weight": 1}) == ("dataset has no path: give a file, a folder, a glob or a name",)
    assert problems_of(n_heads=3, hidden_dim=64)[-1] == missing
    for settings in ({}, {"learning_rate": "fast"}):
        assert "dataset is missing: name chats: a file of" in problems_of(model_name_or_path="base", **settings)[-1]


def test_flags_that_break_an_unchosen_variant_are_fine() -> None:
    recipe = {"dataset": "a", "sizes": {"a": {"n_kv_heads": 4}}, "on_device": {"cuda": {"n_kv_heads": 4}}}
    loaded = load_recipe(recipe, n_heads=6)
    assert loaded.num_attention_heads == 6
    with pytest.raises(RecipeError, match=r"on_device\.cuda: num_attention_heads 6 is not a multiple"):
        apply_device(loaded, "cuda")


def test_a_recipe_made_by_hand_has_its_device_section_checked() -> None:
    recipe = Recipe(on_device={"cpu": {"sede": 1}})
    with pytest.raises(RecipeError, match=r"on_device\.cpu: sede is not a setting; did you mean seed\?"):
        apply_device(recipe, "cpu")


def test_single_settings_cannot_be_merged_into_a_config_file() -> None:
    assert problems_of({"model_config": "own.json"}, model_config={"n_layer": 2}) == (
        "model_config {'n_layer': 2} cannot change single settings of own.json: give model_type too",
    )


def test_an_unknown_name_lists_what_there_is() -> None:
    (problem,) = problems_of("dmo")
    assert problem.startswith("no shipped recipe and no file has this name; did you mean demo? (shipped: a6000-")
    with pytest.raises(RecipeError, match="no shipped recipe"):
        describe_recipe("dmo")


def test_an_unknown_name_is_reported_with_the_mistakes_in_the_flags() -> None:
    assert problems_of("dmo", sede=1)[1:] == ("sede is not a setting; did you mean seed?",)


def test_a_missing_file_and_a_folder_say_what_to_name(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "demo.yaml")
    assert problem.startswith("there is no such file; did you mean demo?")
    (problem,) = problems_of("dmo.yml")
    assert problem.startswith("there is no such file; did you mean demo?")
    (problem,) = problems_of(tmp_path)
    assert "folder without recipe.yaml" in problem
    recipe = write(tmp_path / "recipe.yaml", "dataset: a.txt")
    assert problems_of(tmp_path) == (f"this is a folder: name {recipe}",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nlr: [1, 2\n", "line 3, column 1: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n\tlr: 2\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("seed: 1\nlr: 2\nseed: 3\n", "line 3, column 1: seed is given twice"),
        ("sizes:\n  a: {lr: 1, lr: 2}\n", "line 2, column 14: lr is given twice"),
        ("", "the file is empty"),
        ("- a\n- b\n", "the file holds a list"),
        ("demo", "the file holds one value"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: could not determine a constructor"),
        ("seed: \x00", "not valid YAML: unacceptable character"),
        (b"seed: 1 # \xff\xfe", "byte 10 is not UTF-8 text: save the file as UTF-8"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str | bytes, problem: str) -> None:
    file = write(tmp_path / "broken.yaml", text)
    (found,) = problems_of(file)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("seed: 1\n\tlr: 2\n", "indent with spaces"),
        ("seed: 1\nseed: 3\n", "keep one of them"),
        ("seed: 1\n---\nseed: 3\n", "keep one recipe in a file"),
        ('name: "a\n', "close the quote"),
        ("dataset: *.txt\n", "put text that begins with * in quotes"),
        ("dataset: !mine a\n", "put text that begins with ! in quotes"),
        ("seed: \x00", "save the file as plain text in UTF-8"),
        ("? [a]\n: 3\n", "a key is one word"),
        ("seed: [1, 2\n", "write one `key: value` a line"),
        ("seed: 2026-99-99\n", "Put text in quotes"),
    ],
)
def test_a_broken_file_says_what_to_change(tmp_path: Path, text: str, remedy: str) -> None:
    (found,) = problems_of(write(tmp_path / "broken.yaml", text))
    assert remedy in found


def test_data_in_place_of_a_recipe_are_told_where_they_belong(tmp_path: Path) -> None:
    (found,) = problems_of(write(tmp_path / "chats.jsonl", '{"messages": []}\n{"messages": []}\n'))
    assert "give text or chats with --dataset" in found


def test_aliases_of_aliases_are_refused_before_they_are_written_out(tmp_path: Path) -> None:
    lines = ["a: &a [" + ", ".join("x" * 9) + "]"]
    lines += [f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    started = time.perf_counter()
    (found,) = problems_of(write(tmp_path / "bomb.yaml", "\n".join([*lines, "dataset: *i"])))
    assert "stand for more than 100,000 values" in found
    assert time.perf_counter() - started < 5  # written out, they are 400 million


def test_a_recipe_without_a_name_is_told_apart_from_the_folder_one_stands_in() -> None:
    with pytest.raises(RecipeError, match="the name of the recipe is empty"):
        describe_recipe("")
