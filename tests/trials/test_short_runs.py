"""Short runs of a tiny model, and the search over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onecard
from onecard.api.here import apply_its_device, probe_here
from onecard.data import TrainingData
from onecard.errors import InputError
from onecard.planner import loaded_bytes
from onecard.run.inputs import plan_inputs, prepare_inputs
from onecard.spec import Plan, SchedulePlan
from onecard.training.schedule import rate_at
from onecard.trials.rates import find_rate, list_warnings
from onecard.trials.short_runs import Leader, ShortRuns, shorten
from onecard.trials.timing import time_setting

SETTINGS: dict[str, Any] = {
    "tokenizer": "char",
    "max_seq_length": 16,
    "model_config": {"model_type": "llama", "intermediate_size": 48},
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_steps": 240,
    "total_batch_size": 4,
    "eval_fraction": 0.2,
    "optim": "adamw",
    "learning_rate": 1e-3,
    "device": "cpu",
    "precision": "fp32",
    "torch_compile": False,
}
Inputs = Callable[..., tuple[Plan, TrainingData]]


@pytest.fixture
def inputs(tmp_path: Path, corpus_text: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onecard.planner.measure._PEAK_SIZE", {"cpu": 64})
    monkeypatch.chdir(tmp_path)

    def make(**changes: Any) -> tuple[Plan, TrainingData]:
        machine = probe_here()
        recipe = apply_its_device(onecard.load_recipe({"dataset": str(corpus_text)} | SETTINGS | changes), machine)
        corpus = prepare_inputs(recipe, None)
        return plan_inputs(recipe, machine, corpus, loaded_bytes()), corpus

    return make


@pytest.fixture
def runs(inputs: Inputs) -> ShortRuns:
    found = ShortRuns(*inputs())
    found.settle(1.0, found.time(1.0))
    return found


def schedule(name: str, num_steps: int, num_warmup: int, num_decay: int) -> SchedulePlan:
    return SchedulePlan(
        name=name, num_steps=num_steps, num_warmup_steps=num_warmup, num_decay_steps=num_decay, min_lr_ratio=0.0
    )


@pytest.mark.parametrize(
    ("given", "warmup", "decay"),
    [
        (schedule("cosine", 5000, 100, 4900), 50, 450),  # a tenth, for two in a hundred would be ten steps
        (schedule("wsd", 5000, 1000, 2000), 100, 200),
        (schedule("wsd", 5000, 0, 5000), 0, 500),
        (schedule("linear", 5000, 8, 4992), 8, 492),
    ],
)
def test_a_shortened_schedule_keeps_its_shape_and_its_warmup(given: SchedulePlan, warmup: int, decay: int) -> None:
    found = shorten(given, 500)
    assert (found.num_steps, found.num_warmup_steps, found.num_decay_steps) == (500, warmup, decay)
    assert rate_at(found, 499) < 0.01
    assert shorten(given, 5000) == given


def test_the_same_run_made_again_is_the_same_bit_for_bit_whatever_came_between(runs: ShortRuns) -> None:
    first = runs.run(1.0, 1337, 40)
    other = runs.run(1.0, 1338, 40)
    runs.run(8.0, 1337, 40)
    again = runs.run(1.0, 1337, 40)
    assert again.losses == first.losses
    assert again.heldout_loss == first.heldout_loss
    assert other.losses != first.losses
    assert first.heldout_loss is not None
    assert first.heldout_loss < runs.start_loss


def test_runs_at_other_rates_see_the_same_text(runs: ShortRuns) -> None:
    tiny, more = runs.run(1e-9, 1337, 40), runs.run(1.0, 1337, 40)
    assert tiny.losses[0] == more.losses[0]
    assert tiny.losses[-1] > more.losses[-1]


def test_a_run_that_diverges_or_lags_is_stopped_and_told(runs: ShortRuns) -> None:
    wild = runs.run(1e6, 1337, 40)
    assert wild.heldout_loss is None
    assert "loss above its start" in str(wild.stopped) or "not finite" in str(wild.stopped)
    assert len(wild.losses) < 40
    good = runs.run(8.0, 1337, 40)
    assert good.heldout_loss is not None
    lagging = runs.run(1e-6, 1337, 40, Leader(good.losses, runs.start_loss - good.heldout_loss))
    assert "behind by" in str(lagging.stopped)
    assert len(lagging.losses) == 20


def test_a_search_finds_that_a_rate_is_far_too_low(inputs: Inputs) -> None:
    plan, corpus = inputs(learning_rate=1e-4, max_steps=60)
    told: list[Any] = []
    found = find_rate(plan, corpus, 5.0, told.append, told.append)
    assert told == [found.budget, *found.trials]
    assert found.budget.lengths == (60,)
    assert found.proposal is not None
    assert found.proposal.factor > 5
    assert found.proposal.noise is not None
    assert {trial.seed for trial in found.trials} == {1337, 1338}
    assert found.rates_of(2.0) == {"learning_rate": 2e-4}
    assert not any("times as long" in text for text in list_warnings(found))


def test_both_rates_of_muon_go_together(inputs: Inputs) -> None:
    plan, corpus = inputs(optim="muon", muon_learning_rate=0.02, learning_rate=0.004, max_steps=4)
    found = find_rate(plan, corpus, 5.0, lambda budget: None, lambda trial: None)
    assert found.rates_of(0.5) == {"learning_rate": 0.002, "muon_learning_rate": 0.01}


def test_too_few_minutes_say_how_many_are_enough(inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"Give --minutes \d+"):
        find_rate(*inputs(), 1e-4, lambda budget: None, lambda trial: None)


def test_without_held_out_text_there_is_nothing_to_compare(inputs: Inputs) -> None:
    with pytest.raises(InputError, match="nothing is held out"):
        find_rate(*inputs(eval_fraction=0.0), 1.0, lambda budget: None, lambda trial: None)


def test_a_setting_is_timed_on_its_text_and_on_random_tokens(inputs: Inputs) -> None:
    plan, corpus = inputs()
    for data in (corpus, None):
        found = time_setting(plan, data, 0.2)
        assert found.shortage is None
        assert len(found.steps) >= 3
        assert all(tokens == plan.tokens_per_step for _, tokens, _ in found.steps)
        assert found.peak_bytes > 0
        assert found.peak_flops > 0
    assert not any(wait for _, _, wait in found.steps)


def test_memory_that_runs_out_is_an_answer(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError("no room for this")

    plan, corpus = inputs()
    monkeypatch.setattr("onecard.trials.steps.make_step", refuse)
    found = time_setting(plan, corpus, 0.2)
    assert found.shortage == "no room for this"
    assert found.steps == ()
