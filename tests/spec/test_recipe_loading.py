"""Sources and layers: what wins, what it displaces, and that flags always win."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.errors import RecipeError
from onecard.spec import Recipe, apply_device, load_recipe, recipe_to_yaml
from onecard.spec.agreement import DURATION_KEYS, TOTAL_BATCH_KEYS, WARMUP_KEYS
from onecard.spec.paths import make_absolute


def load(recipe: dict[str, Any], **flags: Any) -> Recipe:
    return load_recipe({"dataset": "text.txt"} | recipe, **flags)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_size_and_size_over_the_recipe() -> None:
    recipe = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "seed": 1,
        "sizes": {"big": {"num_hidden_layers": 8, "hidden_size": 256}},
    }
    loaded = load(recipe, size="big", n_layers="4")
    assert (loaded.num_hidden_layers, loaded.hidden_size, loaded.seed, loaded.size) == (4, 256, 1, "big")


def test_without_a_choice_no_size_applies() -> None:
    loaded = load({"sizes": {"big": {"seed": 7}}})
    assert (loaded.seed, loaded.sizes) == (1337, {})


def test_a_recipe_may_choose_its_size_and_a_flag_another() -> None:
    recipe = {"size": "a", "sizes": {"a": {"seed": 1}, "b": {"seed": 2}}}
    assert load(recipe).seed == 1
    assert load(recipe, size="b").seed == 2
    assert load(recipe, size="none").seed == 1337


def test_device_section_waits_for_the_device() -> None:
    loaded = load({"seed": 1, "on_device": {"cuda": {"seed": 2}}})
    assert loaded.seed == 1
    assert apply_device(loaded, "cuda:1").seed == 2
    assert apply_device(loaded, "cpu").seed == 1
    assert apply_device(loaded, "cuda").on_device == {}


def test_a_flag_also_wins_over_the_device_section() -> None:
    loaded = load({"on_device": {"cuda": {"batch_size": 16, "grad_accum": 2}}}, batch_size=4)
    applied = apply_device(loaded, "cuda")
    assert (applied.per_device_train_batch_size, applied.gradient_accumulation_steps) == (4, 2)


def test_a_chosen_size_wins_over_the_recipes_device_section_but_not_over_its_own() -> None:
    recipe = {
        "on_device": {"cuda": {"hidden_size": 128}},
        "sizes": {"big": {"hidden_size": 512, "seed": 1, "on_device": {"gpu": {"seed": 2}}}},
    }
    applied = apply_device(load(recipe, size="big"), "cuda")
    assert (applied.hidden_size, applied.seed) == (512, 2)


def test_a_flag_of_a_group_removes_the_group_from_device_sections() -> None:
    loaded = load({"max_steps": 5, "on_device": {"cpu": {"num_train_epochs": 1}}}, max_tokens=1000)
    applied = apply_device(loaded, "cpu")
    assert (applied.max_steps, applied.num_train_epochs, applied.max_tokens) == (None, None, 1000)


@pytest.mark.parametrize("group", [DURATION_KEYS, WARMUP_KEYS, TOTAL_BATCH_KEYS])
def test_a_later_layer_replaces_the_others_of_a_group(group: tuple[str, ...]) -> None:
    values = {"total_batch_tokens": 4096, "warmup_ratio": 0.5}
    for kept in group:
        for earlier in group:
            loaded = load({earlier: values.get(earlier, 8)}, **{kept: values.get(kept, 9)})
            assert [key for key in group if getattr(loaded, key) is not None] == [kept]


def test_min_lr_and_its_ratio_replace_each_other() -> None:
    assert load({"min_lr": 3e-4}, min_lr_ratio=0.5).min_lr_ratio == 0.5
    assert load({"min_lr_ratio": 0.5, "lr": 1e-3}, min_lr=2e-4).min_lr_ratio == pytest.approx(0.2)


BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_size", "total_batch_tokens")


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        # micro, accumulation, total, total in tokens
        ((8, 4, None, None), (None, None, 64, None), (8, "auto", 64, None)),
        ((8, 4, None, None), (None, None, 4, None), ("auto", "auto", 4, None)),
        ((8, 4, None, None), (None, 2, 64, None), ("auto", 2, 64, None)),
        ((32, 2, None, None), (None, 2, 64, None), (32, 2, 64, None)),
        ((8, 4, None, None), (None, None, None, 4096), ("auto", "auto", None, 4096)),
        ((None, None, 32, None), (8, None, None, None), (8, "auto", 32, None)),
        ((None, 4, 32, None), (16, None, None, None), (16, "auto", 32, None)),
        ((8, None, 32, None), (None, 2, None, None), ("auto", 2, 32, None)),
        ((None, None, 32, None), (8, 8, None, None), (8, 8, None, None)),
        ((None, None, None, 8192), (8, 8, None, None), (8, 8, None, None)),
        ((8, 4, None, None), (16, None, None, None), (16, 4, None, None)),
    ],
)
def test_batch_keys_keep_the_effective_batch_unless_told_otherwise(file: tuple, flags: tuple, expected: tuple) -> None:
    def keys(values: tuple) -> dict[str, Any]:
        return {key: value for key, value in zip(BATCH, values, strict=True) if value is not None}

    loaded = load(keys(file), **keys(flags))
    assert tuple(getattr(loaded, key) for key in BATCH) == expected


def test_model_config_merges_key_by_key_until_the_architecture_changes() -> None:
    recipe = {"model_config": {"model_type": "qwen3", "head_dim": 64}, "hidden_size": 256}
    assert load(recipe, model_config="{rope_theta: 1e6}").model_settings == {
        "model_type": "qwen3",
        "head_dim": 64,
        "rope_theta": 1e6,
    }
    other = load(recipe, model_config={"model_type": "gpt2", "n_layer": 2})
    assert (other.model_settings, other.hidden_size) == ({"model_type": "gpt2", "n_layer": 2}, None)
    assert load(recipe, model_config="configs/own.json").model_settings == "configs/own.json"


def test_shape_keys_and_model_config_replace_each_other_across_layers() -> None:
    shorthand = load({"hidden_size": 256}, model_config={"n_embd": 128})
    assert (shorthand.hidden_size, shorthand.model_settings) == (None, {"n_embd": 128})
    mapping = load({"model_config": {"model_type": "gpt2", "n_embd": 128}}, d_model=256)
    assert (mapping.hidden_size, mapping.model_settings) == (256, {"model_type": "gpt2"})


def test_another_tokenizer_drops_the_vocabulary_size() -> None:
    recipe = {"vocab_size": 4096}
    assert load(recipe, tokenizer="char").vocab_size is None
    assert load(recipe, tokenizer="bpe").vocab_size == 4096
    assert load(recipe, tokenizer="gpt2", vocab_size=50257).vocab_size == 50257


def test_min_lr_becomes_a_share_of_the_final_learning_rate() -> None:
    recipe = {"learning_rate": 1e-3, "min_lr": "1e-5", "on_device": {"cuda": {"lr": 1e-4}}}
    loaded = load(recipe, lr="2e-3")
    assert loaded.min_lr_ratio == pytest.approx(1e-5 / 2e-3)
    assert apply_device(load(recipe), "cuda").min_lr_ratio == pytest.approx(0.1)


def test_wandb_and_tensorboard_are_added_and_taken_away() -> None:
    assert load({}, use_wandb=True).report_to == ("tensorboard", "wandb")
    assert load({"report_to": "none"}, use_wandb="True").report_to == ("wandb",)
    assert load({}, use_tensorboard="no").report_to == ()
    assert load({"use_wandb": True}, report_to="tensorboard").report_to == ("tensorboard",)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ({"muon_momentum": 0.9}, {"optim": "adamw"}),
        ({"decay_ratio": 1.0, "min_lr": 1e-4}, {"lr_scheduler_type": "constant"}),
        ({"dataloader_prefetch_factor": 8}, {"num_workers": 0}),
        ({"eval_fraction": 0.1, "eval_split": "tail"}, {"eval_dataset": "b.txt"}),
        ({"eval_split": "tail", "early_stopping_patience": 3, "eval_batches": 2}, {"eval_fraction": 0}),
        ({"vocab_size": 300}, {"tokenizer": "bytes"}),
        ({"sample_prompts": ["a"], "sample_max_new_tokens": 9}, {"sample_prompts": []}),
    ],
)
def test_a_flag_that_makes_settings_idle_removes_them(recipe: dict[str, Any], flags: dict[str, Any]) -> None:
    loaded = load(recipe, **flags)
    assert all(getattr(loaded, key) == getattr(Recipe(), key) for key in recipe if key in Recipe.model_fields)
    section = load(recipe | {"on_device": {"cuda": flags}})
    assert apply_device(section, "cuda") == loaded
    assert getattr(apply_device(section, "cpu"), list(recipe)[-1], None) != getattr(Recipe(), list(recipe)[-1], 1)


def test_overrides_alone_make_a_recipe() -> None:
    assert load_recipe(data="a.txt").dataset[0].path == "a.txt"
    assert load_recipe(require_dataset=False) == Recipe()


def test_a_file_gives_its_name_and_finds_text_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    (folder / "texts").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write(folder / "texts" / "a.txt", "text")
    write(folder / "both.txt", "text")
    write(elsewhere / "both.txt", "text")
    recipe = "dataset: [texts, 'texts/*.txt', both.txt, roneneldan/TinyStories, python-stdlib]\ntokenizer: texts"
    loaded = load_recipe(write(folder / "mine.yaml", recipe))
    texts = folder / "texts"
    assert loaded.name == "mine"
    assert [source.path for source in loaded.dataset] == [
        str(texts),
        str(texts / "*.txt"),
        "both.txt",
        "roneneldan/TinyStories",
        "python-stdlib",
    ]
    assert loaded.tokenizer == str(texts)


def test_a_run_can_be_continued_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text")
    sources = ["a.txt", "*.txt", "org/name", "python-stdlib"]
    (tmp_path / "python-stdlib").mkdir()
    whole = make_absolute(load_recipe(dataset=sources, eval_dataset="a.txt", tokenizer="a.txt", model_config="a.txt"))
    file, pattern = str(tmp_path / "a.txt"), str(tmp_path / "*.txt")
    assert [source.path for source in whole.dataset] == [file, pattern, "org/name", "python-stdlib"]
    assert (whole.eval_dataset[0].path, whole.tokenizer, whole.model_settings) == (file, file, file)
    monkeypatch.chdir("/")
    assert make_absolute(whole) == whole
    assert make_absolute(Recipe()) == Recipe()


def test_paths_of_flags_are_relative_to_the_current_directory_only(tmp_path: Path) -> None:
    write(tmp_path / "beside.txt", "text")
    file = write(tmp_path / "mine.yaml", "seed: 1")
    assert load_recipe(file, dataset="beside.txt").dataset[0].path == "beside.txt"


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "windows.yaml"
    file.write_bytes(b"\xef\xbb\xbfdataset: a.txt\r\nseed: 3\r\n")
    assert load_recipe(str(file)).seed == 3


def test_yaml_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = "dataset: a.txt\nsizes:\n  a: &a {seed: 1, n_layers: 2}\n  b: {<<: *a, seed: 2}\nsize: b"
    loaded = load_recipe(write(tmp_path / "anchors.yaml", text))
    assert (loaded.seed, loaded.num_hidden_layers) == (2, 2)


def drop_contradictions(layer: dict[str, Any]) -> dict[str, Any]:
    """Leaves one of each pair that cannot stand in one layer, so that most random layers load."""
    pairs = [
        ("max_steps", "num_train_epochs"),
        ("warmup_steps", "warmup_ratio"),
        ("fp16", "precision"),
        ("model_config", "hidden_size"),
        ("total_batch_size", "gradient_accumulation_steps"),
    ]
    dropped = {second for first, second in pairs if first in layer}
    return {key: value for key, value in layer.items() if key not in dropped}


# Random layers: keys that displace one another, and some that do not.
LAYERS = st.fixed_dictionaries(
    {},
    optional={
        "max_steps": st.integers(1, 9),
        "num_train_epochs": st.integers(1, 9),
        "warmup_steps": st.integers(0, 9),
        "warmup_ratio": st.sampled_from([0.1, 0.2]),
        "per_device_train_batch_size": st.sampled_from(["auto", 1, 2, 4]),
        "gradient_accumulation_steps": st.sampled_from(["auto", 1, 2, 4]),
        "total_batch_size": st.sampled_from([None, 8, 16]),
        "hidden_size": st.sampled_from([64, 128]),
        "num_attention_heads": st.sampled_from([2, 4, 6]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "model_config": st.sampled_from([{"model_type": "gpt2"}, {"n_embd": 32}, {"head_dim": 8}, "own.json"]),
        "tokenizer": st.sampled_from(["bpe", "char"]),
        "vocab_size": st.sampled_from([300, 400]),
        "min_lr": st.sampled_from([0.0, 1e-5]),
        "learning_rate": st.sampled_from([1e-3, "2e-3"]),
        "fp16": st.booleans(),
        "precision": st.sampled_from(["auto", "bf16"]),
        "report_to": st.sampled_from(["none", "wandb", "tensorboard"]),
        "use_wandb": st.booleans(),
        "seed": st.integers(0, 9),
        "optim": st.sampled_from(["adamw", "adamw_8bit", "muon"]),
        "muon_learning_rate": st.sampled_from([0.01, 0.03]),
        "lr_scheduler_type": st.sampled_from(["constant", "wsd"]),
        "decay_ratio": st.sampled_from([0.3, 0.4]),
        "eval_dataset": st.sampled_from([[], "b.txt"]),
        "eval_split": st.sampled_from(["auto", "tail"]),
        "text_column": st.sampled_from(["text", "body"]),
        "sample_prompts": st.lists(st.text(max_size=5), max_size=2),
    },
)


LAYERS = LAYERS.map(drop_contradictions)


def load_or_skip(recipe: dict[str, Any], flags: dict[str, Any]) -> Recipe | None:
    try:
        return load(recipe, **flags)
    except RecipeError:
        return None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LAYERS, LAYERS, LAYERS)
def test_a_device_section_means_the_same_as_a_layer_between_recipe_and_flags(
    recipe: dict[str, Any], section: dict[str, Any], flags: dict[str, Any]
) -> None:
    waiting = load_or_skip(recipe | {"on_device": {"cuda": section}}, flags)
    layered = load_or_skip(recipe | {"sizes": {"s": section}, "size": "s"}, flags)
    if waiting is None or layered is None:
        return
    assert apply_device(waiting, "cuda") == layered.model_copy(update={"size": None, "sizes": {}})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LAYERS, LAYERS, LAYERS, st.booleans())
def test_yaml_of_a_recipe_loads_to_an_equal_recipe(
    recipe: dict[str, Any], section: dict[str, Any], flags: dict[str, Any], chosen: bool
) -> None:
    sections = {"on_device": {"cpu": section}, "sizes": {"s": {"on_device": {"cpu": section}, "seed": 5}}}
    loaded = load_or_skip(recipe | sections, flags | ({"size": "s"} if chosen else {}))
    if loaded is not None:
        assert load_recipe(yaml.safe_load(recipe_to_yaml(loaded))) == loaded


@pytest.mark.parametrize(
    "prompt", ["a\x85b", "\u2028", "a\u2029", "从前\n  有", "\ufeffa", "\U000bf398,B\x85", "4e-5", " - a: 'b' # c"]
)
def test_prompts_survive_yaml(prompt: str) -> None:
    loaded = load({"sample_prompts": [prompt]})
    assert load_recipe(yaml.safe_load(recipe_to_yaml(loaded))).sample_prompts == (prompt,)
