"""What fine-tuning starts from, how long it goes on, and what a resume refuses."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eight_chats import CHATS, TEXT, write_chats
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.cli.plan_text import summary_rows
from onecard.errors import CheckpointError, InputError
from onecard.evaluation.heldout import HeldoutLoss
from onecard.model.folder import load_model_folder
from onecard.run.folder import RunFolder
from onecard.spec import Recipe

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner

Tuner = Callable[..., "Runner"]


def test_a_model_trained_from_scratch_learns_to_chat_from_its_best_checkpoint(
    runner: "Runner", tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 3.0])
    with monkeypatch.context() as scripted:
        scripted.setattr("onecard.run.crew.Crew.measure_heldout_loss", lambda *_: HeldoutLoss(next(losses), 0.0, 100))
        scratch = runner.start("scratch", tokenizer="bpe", vocab_size=300, max_seq_length=48, max_steps=4, eval_steps=2)
    outcome = tuner("llama", model_name_or_path=str(scratch.root)).start("run")
    base = RunFolder.open(outcome.root).plan().model.base
    assert base is not None
    assert base.folder == str(scratch.root / "checkpoints" / "step-000002")
    assert outcome.record[-1]["reason"] == "completed"
    assert [len(text) > 0 for text in onecard.generate(outcome.root, ["Hi"], device="cpu")] == [True]


def test_a_fine_tuned_model_and_a_merged_adapter_can_be_started_from(tuner: Tuner, tmp_path: Path) -> None:
    runner = tuner("qwen3", chat_template="chatml", learning_rate=1e-2)
    first = runner.start("first")
    second = runner.start("second", model_name_or_path=str(first.root), chat_template="auto")
    assert second.events("step")[0]["loss"] < 0.8 * first.events("step")[0]["loss"]

    adapted = tuner("qwen3", chat_template="chatml", method="lora", learning_rate=1e-2).start("adapted")
    model, tokenizer = load_model_folder(adapted.last, torch.float32)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    merged = {"model_name_or_path": str(tmp_path / "merged"), "chat_template": "auto"}
    third = runner.start("third", **merged)
    assert third.events("step")[0]["loss"] < 0.8 * adapted.events("step")[0]["loss"]


def test_an_adapter_is_no_model_to_start_from(tuner: Tuner) -> None:
    runner = tuner("llama", method="lora", max_steps=1)
    outcome = runner.start("adapter")
    for path in (outcome.root, outcome.last):
        with pytest.raises(InputError, match="holds an adapter, which is no whole model"):
            runner.start("next", model_name_or_path=str(path))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_running_text_goes_on_with_the_tokenizer_of_the_base(
    method: str, tuner: Tuner, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join([TEXT] * 20), encoding="utf-8")
    settings = {"task": "pretrain", "dataset": str(tmp_path / "text.txt"), "max_seq_length": 16, "eval_fraction": 0.1}
    outcome = tuner("gpt2", method=method, **settings, learning_rate=1e-2, max_steps=20, eval_steps=5).start("run")
    own, used = (AutoTokenizer.from_pretrained(folder) for folder in (bases("gpt2"), outcome.last))
    assert used.get_vocab() == own.get_vocab()
    losses = [event["loss"] for event in outcome.events("evaluated")]
    assert losses[-1] < 0.8 * losses[0]
    (text,) = onecard.generate(outcome.root, ["user: What is"], temperature=0, device="cpu")
    assert text.strip()


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_resume_refuses_another_base(method: str, tuner: Tuner, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    runner = tuner("llama", method=method, model_name_or_path=str(tmp_path / "base"), max_steps=2)
    before = runner.start("run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="are not those that this run was planned with"):
        runner.resume("run")
    assert runner.outcome("run").record == before.record


def test_a_resume_tells_of_a_tokenizer_with_other_ids(
    tuner: Tuner, bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    runner = tuner("llama", model_name_or_path=str(tmp_path / "base"), max_steps=2)
    before = runner.start("run")
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer and .* have changed.*restore them.*--accept tokenizer,data`"):
        runner.resume("run")
    with pytest.raises(CheckpointError, match=r"the tokenizer has changed.*restore it"):
        onecard.resume(before.root, accept=["data"])
    assert runner.outcome("run").record == before.record
    onecard.resume(before.root, accept=["data", "tokenizer"])
    assert "goes on with what is there now: the tokenizer and the training text" in caplog.text


@pytest.mark.parametrize("template", ["auto", "chatml"])
@pytest.mark.parametrize("gone", ["weights", "folder"])
def test_a_run_of_all_weights_goes_on_without_its_base(
    gone: str,
    template: str,
    tuner: Tuner,
    bases: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    settings = {"model_name_or_path": str(tmp_path / "base"), "max_steps": 4, "save_steps": 2}
    runner = tuner("llama", chat_template=template, dropout=0.1, **settings)
    whole = runner.start("whole")
    runner.kill("again", after_events=whole.kinds.index(("saved", 2)) + 2)
    shutil.rmtree(tmp_path / "base") if gone == "folder" else (tmp_path / "base" / "model.safetensors").unlink()
    again = runner.resume("again")
    again.assert_equals(whole)
    assert "could not be compared" in caplog.text
    assert RunFolder.open(again.root).plan(again.last).model.base == RunFolder.open(whole.root).plan().model.base
    names = ("config.json", "generation_config.json", "tokenizer.json")
    assert [again.last_bytes(name) for name in names] == [whole.last_bytes(name) for name in names]


def test_adapters_need_their_base_to_go_on(tuner: Tuner, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    settings = {"model_name_or_path": str(tmp_path / "base"), "max_steps": 4, "save_steps": 2}
    runner = tuner("llama", method="lora", **settings)
    whole = runner.start("whole")
    runner.kill("again", after_events=whole.kinds.index(("saved", 2)) + 2)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        runner.resume("again")


TEMPLATE = (
    "{%% for turn in messages %%}{{ turn['role'] + '%s ' + turn['content'] + eos_token }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ 'assistant%s ' }}{%% endif %%}"
)


def test_a_resume_refuses_changed_chats_and_a_changed_template(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE % (":", ":"), encoding="utf-8")
    runner = tuner("llama", chat_template="chat.jinja", max_steps=2)
    runner.start("run")
    monkeypatch.chdir("/")
    runner.resume("run")
    (tmp_path / "chat.jinja").write_text(TEMPLATE % (">", ">"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"its chat template .*has changed since this run began"):
        runner.resume("run")
    (tmp_path / "chat.jinja").write_text(TEMPLATE % (":", ":"), encoding="utf-8")
    write_chats(tmp_path / "chats.jsonl", [*CHATS[:7], CHATS[0]])
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        runner.resume("run")
    write_chats(tmp_path / "chats.jsonl")
    runner.resume("run")


def started_with(runner: "Runner", **settings: Any) -> "Outcome":
    """A run whose duration is given by `settings` alone."""
    durations = dict.fromkeys(("max_steps", "num_train_epochs", "max_tokens"))
    recipe = onecard.load_recipe(runner.values | durations | settings)
    return type(runner.start("unused", max_steps=1))(onecard.train(recipe, output_dir=runner.folder / "run"))


def num_tokens(outcome: "Outcome") -> int:
    """Tokens of all chats, each as often as the network reads it: the last is only ever a target."""
    audit = json.loads((outcome.root / "audit.json").read_text(encoding="utf-8"))
    return int(audit["num_tokens"]) - int(audit["num_rows"])


@pytest.mark.parametrize("packing", [True, False], ids=["flat", "off"])
def test_epochs_are_whole_passes_and_tokens_are_those_that_were_there(packing: bool, tuner: Tuner) -> None:
    outcome = started_with(tuner("gpt2", packing=packing, total_batch_size=4), num_train_epochs=3)
    finished = outcome.record[-1]
    assert (finished["step"], finished["num_steps"]) == (6, 6)
    assert finished["tokens_seen"] == 3 * num_tokens(outcome)
    steps = outcome.events("step")
    audit = json.loads((outcome.root / "audit.json").read_text(encoding="utf-8"))
    assert sum(step["num_target_tokens"] for step in steps) == 3 * audit["num_target_tokens"]


def test_tokens_as_a_duration(tuner: Tuner) -> None:
    outcome = started_with(tuner("gpt2", total_batch_size=8), max_tokens=1500)
    plan = RunFolder.open(outcome.root).plan()
    assert outcome.record[-1]["step"] == math.ceil(1500 / plan.tokens_per_step) > 3


@pytest.mark.parametrize("packing", [True, False], ids=["flat", "off"])
def test_hours_become_steps_by_a_measurement_over_chats(packing: bool, tuner: Tuner) -> None:
    outcome = started_with(tuner("gpt2", packing=packing, max_seq_length=64), max_hours=0.5 / 3600)
    finished = outcome.record[-1]
    assert finished["reason"] in ("completed", "time limit")
    assert "measured" in RunFolder.open(outcome.root).plan().reasons["schedule.num_steps"]
    assert finished["step"] >= 1


def test_hours_beside_epochs_end_a_run_at_whichever_comes_first(tuner: Tuner) -> None:
    runner = tuner("gpt2")
    recipe = onecard.load_recipe({key: value for key, value in runner.values.items() if key != "max_steps"})
    recipe = recipe.model_copy(update={"num_train_epochs": 3.0, "max_hours": 5.0})
    plan = onecard.plan(recipe)
    assert plan.schedule.num_steps == 3
    assert "3 x 8 chats, over before 5:00:00" in plan.reasons["schedule.num_steps"]
    rows = dict(summary_rows(plan))
    assert "3.0 epochs, or 5:00:00, whichever comes first, " in rows["steps"]
    few = onecard.plan(recipe.model_copy(update={"num_train_epochs": 10.0**6, "max_hours": 0.5 / 3600}))
    assert few.schedule.num_steps < 10**6
    assert "are over before 1e+06 x 8 chats (1000000 steps)" in few.reasons["schedule.num_steps"]


def test_a_plan_names_the_tokens_that_the_template_adds(tuner: Tuner) -> None:
    values = tuner("llama", method="lora", chat_template="chatml").values
    rows = dict(summary_rows(onecard.plan(onecard.load_recipe(values))))
    assert rows["new tokens"] == "<|im_start|>, <|im_end|>, of the chat template"


def lose(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(32)


def quantize(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


DAMAGES = {lose: "1 are missing", reshape: "1 are of another shape", quantize: "1 of its weights are stored as I8"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_refused_before_any_chat_is_prepared(
    damage: Callable[[dict[str, torch.Tensor]], None],
    tuner: Tuner,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    runner = tuner("llama", model_name_or_path=str(tmp_path / "base"))
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        runner.start("run")
    assert not (tmp_path / "cache" / "chats").exists()


def test_a_checkpoint_with_other_bytes_is_no_base(tuner: Tuner) -> None:
    runner = tuner("llama", max_steps=1)
    checkpoint = runner.start("first").last
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors has other content than was written"):
        runner.start("second", model_name_or_path=str(checkpoint))


def without_length(runner: "Runner", **settings: Any) -> Recipe:
    values = runner.values | settings
    return onecard.load_recipe({key: value for key, value in values.items() if key != "max_seq_length"})


def test_without_a_length_the_positions_of_the_base_are_taken(tuner: Tuner) -> None:
    runner = tuner("llama", max_steps=2)
    recipe = without_length(runner, on_device={"cpu": {"total_batch_size": 4}})
    plan = onecard.plan(recipe)
    assert (plan.max_seq_length, plan.total_batch_size) == (64, 4)
    assert plan.reasons["max_seq_length"].startswith("all positions that")
    root = onecard.train(recipe, output_dir=runner.folder / "run")
    assert RunFolder.open(root).recipe().max_seq_length == 64
    onecard.resume(root)
    onecard.train(recipe, resume=root)
    assert onecard.plan(without_length(runner, on_device={"cpu": {"max_seq_length": 32}})).max_seq_length == 32
    for given in ({"max_seq_length": 1024}, {"on_device": {"cpu": {"max_seq_length": 65}}}):
        with pytest.raises(InputError, match="is more than the 64 positions of"):
            onecard.plan(without_length(runner, **given) if "on_device" in given else runner.recipe(**given))


def test_a_held_out_set_of_its_own_and_sources_by_weight(tuner: Tuner, tmp_path: Path) -> None:
    other = [[{"role": "user", "content": f"Say {number}"}, CHATS[0][1]] for number in range(4)]
    write_chats(tmp_path / "other.jsonl", other)
    write_chats(tmp_path / "eval.jsonl", [chat[:1] + CHATS[1][1:] for chat in CHATS[:6]])
    sources = [
        {"path": str(tmp_path / "chats.jsonl"), "weight": 1},
        {"path": str(tmp_path / "other.jsonl"), "weight": 3},
    ]
    runner = tuner("gpt2", dataset=sources, eval_dataset=str(tmp_path / "eval.jsonl"), eval_fraction=0.05)
    settings = {"dataset": sources, "per_device_eval_batch_size": 2, "eval_steps": 3}
    whole = runner.start("whole", **settings)
    again = runner.start("again", **settings)
    again.assert_equals(whole)
    part = runner.start("part", **settings, eval_batches=2)
    counts = [outcome.events("evaluated")[-1]["num_target_tokens"] for outcome in (whole, part)]
    assert counts[1] * 6 == counts[0] * 4
    assert [event["step"] for event in whole.events("evaluated")] == [3, 6]
    assert whole.events("evaluated")[-1]["bits_per_byte"] > 0
    assert onecard.prepare(runner.recipe(**settings)).weights == (1.0, 3.0)
