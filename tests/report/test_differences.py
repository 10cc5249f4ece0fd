"""Settings that differ between runs, by the names of recipe keys; what has no effect is left out."""

from onecard.report.differences import find_differences
from onecard.report.record import read_runs
from onecard.spec import AdaptPlan


def differences(*roots) -> dict[str, tuple]:
    return {row.name: row.values for row in find_differences(read_runs(roots))}


def test_equal_runs_differ_in_nothing(write_run) -> None:
    assert differences(write_run("a", [3.0]), write_run("b", [2.0], recipe={"name": "b", "logging_steps": 3})) == {}


def test_a_setting_appears_once_by_the_name_of_its_key(write_run) -> None:
    first = write_run("a", [3.0], recipe={"learning_rate": 1e-3}, learning_rate=1e-3)
    second = write_run("b", [3.0], recipe={"learning_rate": 2e-3}, learning_rate=2e-3)
    assert differences(first, second) == {"learning_rate": (1e-3, 2e-3)}


def test_what_only_a_recipe_says_is_found_with_its_default(write_run) -> None:
    second = write_run("b", [3.0], recipe={"eval_fraction": 0.1})
    assert differences(write_run("a", [3.0]), second) == {"eval_fraction": (0.05, 0.1)}


def test_settings_of_another_optimizer_are_those_of_no_run(write_run) -> None:
    found = differences(write_run("a", [3.0]), write_run("b", [3.0], optimizer="adamw"))
    assert found["optim"] == ("muon", "adamw")
    assert found["muon_momentum"] == (0.95, None)


def test_adapters_stand_beside_none(write_run) -> None:
    base = {"model_name_or_path": "gpt2"}
    second = write_run(
        "b",
        [3.0],
        recipe=base | {"method": "lora", "lora_r": 8},
        adapt=AdaptPlan(method="lora", r=8),
        optimizer="adamw",
    )
    found = differences(write_run("a", [3.0], recipe=base, optimizer="adamw"), second)
    assert "model_name_or_path" not in found
    assert (found["method"], found["lora_r"]) == (("full", "lora"), (None, 8))


def test_groups_come_in_their_order(write_run) -> None:
    changes = {"seed": 7, "eval_steps": 5, "max_seq_length": 8, "device": "cuda", "dropout": 0.5}
    rows = find_differences(read_runs([write_run("a", [3.0]), write_run("b", [3.0], **changes)]))
    assert [(row.group, row.name) for row in rows] == [
        ("model", "dropout"),
        ("batch", "max_seq_length"),
        ("optimizer", "seed"),
        ("machine", "device"),
        ("watching", "eval_steps"),
    ]


def test_a_recipe_that_cannot_be_read_makes_no_differences(write_run) -> None:
    second = write_run("b", [3.0], recipe={"eval_fraction": 0.1})
    (second / "recipe.yaml").write_text("{", encoding="utf-8")
    assert differences(write_run("a", [3.0]), second) == {}


def test_every_key_of_a_recipe_has_its_place(write_run) -> None:
    # A new key that is in no list is shown under data: say in differences.py where it belongs.
    from onecard.report import differences as module
    from onecard.spec import recipe_keys

    (run,) = read_runs([write_run("a", [3.0])])
    shown = {name for group, name in module.settings_of(run, with_recipe=True) if group == "data"}
    keys = {key.name for key in recipe_keys()}
    assert shown & keys == {
        *("dataset", "eval_dataset", "eval_fraction", "eval_split", "tokenizer", "vocab_size"),
    }


def test_versions_that_differ_are_listed_with_the_step_they_came_after(write_run) -> None:
    first, second, old = (write_run(name, [3.0]) for name in ("a", "b", "old"))
    lines = ['{"step": 0, "versions": {"python": "3.12.1", "torch": "2.12.0"}}']
    (first / "versions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines.append('{"step": 40, "versions": {"python": "3.12.1", "torch": "2.13.0"}}')
    (second / "versions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert differences(first, second) == {"torch": ("2.12.0", "2.12.0, 2.13.0 from step 40")}
    # Of a run that began before this was written down nothing is known, which is no difference.
    assert differences(first, old) == {}
