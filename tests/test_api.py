"""The functions that commands and other people's code call."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.api import planning, running
from onecard.errors import CheckpointError, DoesNotFitError, InputError
from onecard.hardware import probe_machine
from onecard.observe.events import Event
from onecard.spec import Plan, Recipe

SETTINGS: dict[str, Any] = {
    "tokenizer": "char",
    "max_seq_length": 16,
    "model_config": {"model_type": "llama", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_steps": 6,
    "total_batch_size": 4,
    "save_steps": 2,
    "report_to": "none",
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
    "sample_prompts": ["the"],
    "sample_max_new_tokens": 3,
}


@pytest.fixture
def recipe(tmp_path: Path, corpus_text: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    monkeypatch.chdir(tmp_path)
    return onecard.load_recipe({"dataset": str(corpus_text)} | SETTINGS)


def test_a_run_from_text_to_completions(recipe: Recipe, tmp_path: Path) -> None:
    events: list[Event] = []
    plans: list[tuple[Plan, Path]] = []
    stages: set[str] = set()
    root = onecard.train(
        recipe,
        output_dir=tmp_path / "run",
        on_event=events.append,
        on_plan=lambda plan, folder: plans.append((plan, folder)),
        on_progress=lambda stage, done, total: stages.add(stage),
    )
    assert root == tmp_path / "run"
    assert plans == [(Plan.model_validate_json((root / "plan.json").read_text(encoding="utf-8")), root)]
    assert "training the tokenizer" in stages
    assert [event.event for event in events if event.event in ("step", "finished")] == ["step"] * 6 + ["finished"]
    lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == [event.event for event in events]

    checkpoint = root / "checkpoints" / "step-000006"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([[0, *tokenizer.encode("the", add_special_tokens=False)]])
    with torch.no_grad():
        likeliest = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
    (greedy,) = onecard.generate(root, ["the"], temperature=0, max_new_tokens=1, checkpoint="last")
    assert greedy == likeliest
    assert onecard.generate(checkpoint, ["the"], temperature=0, max_new_tokens=1) == [greedy]


def test_generating(recipe: Recipe, tmp_path: Path) -> None:
    root = onecard.train(recipe, output_dir=tmp_path / "run")
    first, again, other = (onecard.generate(root, ["the", "a lazy"], seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 2
    assert onecard.generate(root, ["the"], checkpoint="4", max_new_tokens=1)
    with pytest.raises(CheckpointError, match="no checkpoint '99'"):
        onecard.generate(root, ["the"], checkpoint="99")
    with pytest.raises(InputError, match="no prompt"):
        onecard.generate(root, [])
    with pytest.raises(InputError, match="prompt 'ROMEO' has characters"):
        onecard.generate(root, ["ROMEO"])
    with pytest.raises(InputError, match="temperature is -1"):
        onecard.generate(root, ["the"], temperature=-1)
    with pytest.raises(InputError, match="no run folder"):
        onecard.generate(tmp_path / "none", ["the"])
    for checkpoint in (root / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        onecard.generate(root, ["the"])


def test_planning_writes_no_run(recipe: Recipe, tmp_path: Path) -> None:
    plan = onecard.plan(recipe)
    assert plan.schedule.num_steps == 6
    assert not (tmp_path / "runs").exists()


def test_a_sample_prompt_that_the_text_cannot_spell_is_refused_before_the_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompt 'ROMEO' has characters"):
        onecard.train(recipe.model_copy(update={"sample_prompts": ("the", "ROMEO")}), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_preparing_gives_what_training_uses(recipe: Recipe) -> None:
    corpus, plan = onecard.prepare(recipe), onecard.plan(recipe)
    assert (plan.corpus.fingerprint, plan.corpus.vocab_size) == (corpus.fingerprint, corpus.vocab_size)


def test_training_makes_the_forecast_of_planning(recipe: Recipe, tmp_path: Path) -> None:
    planned, seen = onecard.plan(recipe).forecast, []
    onecard.train(recipe, output_dir=tmp_path / "run", on_plan=lambda plan, _: seen.append(plan.forecast))
    assert planned is not None
    memory, same = planned.memory, seen[0].memory
    assert (memory.allocated_bytes, memory.phase_bytes) == (same.allocated_bytes, same.phase_bytes)
    # What the process itself holds may have grown in between.
    assert {**memory.breakdown, "process": 0} == {**same.breakdown, "process": 0}


@pytest.mark.parametrize("run", ["plan", "train"])
def test_planning_and_training_refuse_what_does_not_fit_alike(
    run: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = replace(probe_machine(), free_ram_bytes=1000)
    for module in (planning, running):
        monkeypatch.setattr(module, "probe_here", lambda: full)
    monkeypatch.setattr("onecard.planner.decisions.check_ram", lambda *_: None)
    with pytest.raises(DoesNotFitError, match="this does not fit the memory of this machine: it needs"):
        getattr(onecard, run)(recipe, **({"output_dir": tmp_path / "run"} if run == "train" else {}))
    assert not (tmp_path / "run").exists()


def test_the_section_of_the_device_applies(recipe: Recipe) -> None:
    both = recipe.model_copy(update={"on_device": {"cpu": {"max_steps": 3}, "cuda": {"max_steps": 5}}})
    assert onecard.plan(both).schedule.num_steps == 3


def test_runs_are_named_by_recipe_and_time_and_the_latest_is_found(recipe: Recipe, tmp_path: Path) -> None:
    root = onecard.train(recipe.model_copy(update={"name": "poem"}))
    assert root.parent == Path("runs")
    assert root.name.startswith("poem-2")
    events: list[Event] = []
    assert onecard.resume("latest", on_event=events.append) == root
    assert onecard.train(recipe, resume="latest", on_event=events.append) == root
    assert onecard.train(recipe.model_copy(update={"resume_from_checkpoint": True})) == root
    assert [event.event for event in events] == ["saved", "finished"] * 2
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_names_of_the_package() -> None:
    assert all(callable(getattr(onecard, name)) for name in onecard.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        _ = onecard.trane  # type: ignore[attr-defined]


def test_an_adapter_folder_completes_as_the_model_it_belongs_to(recipe: Recipe, tmp_path: Path) -> None:
    from onecard.model.adapt import adapt
    from onecard.model.folder import save_adapter_folder
    from onecard.spec import AdaptPlan

    root = onecard.train(recipe, output_dir=tmp_path / "run")
    base = max((root / "checkpoints").glob("step-*"))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapt(model, AdaptPlan(method="lora", r=4), seed=0)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    save_adapter_folder(model, {}, tmp_path / "adapter")
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "device": "cpu"}
    assert onecard.generate(tmp_path / "adapter", ["the"], **options) == onecard.generate(base, ["the"], **options)


def test_sample_prompts_of_another_language_say_how_to_give_ones_own(recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"(?s)does not know.*--sample_prompts"):
        onecard.plan(recipe.model_copy(update={"sample_prompts": ("从前",)}))
