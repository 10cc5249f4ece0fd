"""Names people know settings by."""

import re
from collections import Counter

import pytest

from onecard.spec import Recipe, load_recipe, recipe_keys
from onecard.spec.accepts import FIELDS
from onecard.spec.spelling import SPELLINGS, Spelling, find_spelling
from onecard.spec.values import VALUES


@pytest.mark.parametrize("row", SPELLINGS, ids=lambda row: row.name)
def test_every_row_leads_to_a_key(row: Spelling) -> None:
    assert row.key in FIELDS
    assert row.name not in FIELDS, "a key needs no row for itself"
    assert re.fullmatch(r"[a-z0-9_]+", row.name)
    assert find_spelling(f"--{row.name.replace('_', '-')}") == row
    assert find_spelling(row.name.upper()) == row


def test_no_name_stands_for_two_keys() -> None:
    counts = Counter(row.name for row in SPELLINGS)
    assert [name for name, count in counts.items() if count > 1] == []


def test_value_rows_name_keys() -> None:
    assert set(VALUES) <= set(FIELDS)


# The names the issue promises.
@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("--max-epochs", "3", "num_train_epochs", 3),
        ("--batch-size", "8", "per_device_train_batch_size", 8),
        ("--hidden-dim", "64", "hidden_size", 64),
        ("--n-layers", "2", "num_hidden_layers", 2),
        ("--device", "cuda:0", "device", "cuda:0"),
        ("--no-mixed-precision", True, "precision", "fp32"),
        ("--use-wandb", True, "report_to", ("tensorboard", "wandb")),
        ("--resume", "latest", "resume_from_checkpoint", "latest"),
        ("--data_path", "x.txt", "dataset", Recipe(dataset=("x.txt",)).dataset),
        ("--model_max_length", "256", "max_seq_length", 256),
        ("--max_iters", "100", "max_steps", 100),
        ("--eval_interval", "10", "eval_steps", 10),
        ("--fp16", "True", "precision", "fp16"),
    ],
)
def test_promised_flags(name: str, value: object, field: str, expected: object) -> None:
    assert getattr(load_recipe(require_dataset=False, **{name: value}), field) == expected


def test_keys_for_help_are_complete() -> None:
    by_name = {info.name: info for info in recipe_keys()}
    assert set(by_name) == set(FIELDS)
    assert "model_settings" not in by_name
    assert all(info.type and info.description for info in by_name.values())
    assert by_name["learning_rate"].type == "a number above 0"
    assert by_name["learning_rate"].default == Recipe().learning_rate
    assert "lr" in by_name["learning_rate"].spellings
    assert by_name["gradient_checkpointing"].type == "true, false, a number above 0 and below 1 or auto"
