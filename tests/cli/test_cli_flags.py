import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onecard.cli.flags import FlagKind, parse_flags
from onecard.cli.recipe_words import flag_kinds
from onecard.errors import InputError

KINDS = flag_kinds()


@pytest.mark.parametrize(
    ("line", "positionals", "overrides"),
    [
        ("demo", ["demo"], {}),
        ("demo --learning_rate 4e-5", ["demo"], {"learning_rate": "4e-5"}),
        ("--learning-rate=4e-5 demo", ["demo"], {"learning_rate": "4e-5"}),
        ("--max_steps 10 demo --seed 3", ["demo"], {"max_steps": "10", "seed": "3"}),
        # Numbers below zero are values.
        ("--max_steps -1 demo", ["demo"], {"max_steps": "-1"}),
        ("--lr -1e-3", [], {"lr": "-1e-3"}),
        # Switches, with and without a value, before and after the recipe.
        ("--fp16 demo", ["demo"], {"fp16": True}),
        ("--fp16 True demo", ["demo"], {"fp16": True}),
        ("--fp16 0 demo", ["demo"], {"fp16": False}),
        ("demo --fp16", ["demo"], {"fp16": True}),
        ("--deterministic=off", [], {"deterministic": False}),
        ("--torch_compile auto demo", ["demo"], {"torch_compile": "auto"}),
        ("--mixed-precision bf16 demo", ["demo"], {"mixed_precision": "bf16"}),
        ("--use-wandb demo", ["demo"], {"use_wandb": True}),
        ("--no-mixed-precision demo", ["demo"], {"no_mixed_precision": True}),
        ("--no-torch-compile demo", ["demo"], {"torch_compile": False}),
        ("--no_deterministic false", [], {"deterministic": True}),
        ("--tie_word_embeddings --fp16", [], {"tie_word_embeddings": True, "fp16": True}),
        # Names that people know from other tools.
        (
            "--max-epochs 3 --batch-size 8 --hidden-dim 64 --n-layers 2 --device cpu",
            [],
            {"max_epochs": "3", "batch_size": "8", "hidden_dim": "64", "n_layers": "2", "device": "cpu"},
        ),
        # Lists collect.
        ("--dataset a --dataset b", [], {"dataset": ["a", "b"]}),
        ("--data_path a", [], {"data_path": ["a"]}),
        ("--report_to none", [], {"report_to": ["none"]}),
        # What no key is called goes on to the loader, with or without a value.
        ("--learing_rate 1 demo", ["demo"], {"learing_rate": "1"}),
        ("--no-nonsense", [], {"no_nonsense": True}),
        ("--max_steps 5 --max_steps 5", [], {"max_steps": "5"}),
    ],
)
def test_words_are_understood(line: str, positionals: list[str], overrides: dict[str, object]) -> None:
    words = parse_flags(line.split(), KINDS)
    assert (words.positionals, words.overrides) == (positionals, overrides)


def test_text_with_spaces_and_dashes_is_a_value() -> None:
    words = parse_flags(
        ["--sample_prompts", "-- a, b = c", "--sample-prompts=--help me", "--sample_prompts", ""], KINDS
    )
    assert words.overrides == {"sample_prompts": ["-- a, b = c", "--help me", ""]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("demo --learning-rate", "--learning-rate needs a value"),
        ("--learning_rate --fp16", "--learning_rate needs a value"),
        ("--dataset", "--dataset needs a value"),
        ("--seed 1 --seed 2", "--seed is given twice, as 1 and as 2"),
        ("--no-torch-compile=auto", "--no-torch-compile auto: takes true or false"),
    ],
)
def test_what_makes_no_sense_is_reported(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_flags(line.split(), KINDS)


value_keys = st.sampled_from(sorted(key for key, kind in KINDS.items() if kind is FlagKind.VALUE))
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(value_keys, values, max_size=4), st.booleans(), st.booleans(), st.integers(0, 4))
def test_any_value_arrives_unchanged(given_values, has_dashes: bool, has_equals: bool, place: int) -> None:
    args: list[str] = []
    for number, (key, value) in enumerate(given_values.items()):
        if number == place:
            args.append("demo")
        flag = f"--{key.replace('_', '-') if has_dashes else key}"
        assume(has_equals or not value.startswith("--"))
        args += [f"{flag}={value}"] if has_equals else [flag, value]
    words = parse_flags(args, KINDS)
    assert words.overrides == given_values
    assert words.positionals == (["demo"] if place < len(given_values) else [])


@given(st.lists(st.text(max_size=8), max_size=6))
def test_no_line_ends_in_anything_but_words_or_a_message(args: list[str]) -> None:
    try:
        words = parse_flags(args, KINDS)
    except InputError:
        return
    assert len(words.positionals) + len(words.overrides) <= len(args)
