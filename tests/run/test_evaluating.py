"""Checkpoints of a run are measured after it as the run itself would have."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import onecard
from onecard.errors import CheckpointError, InputError
from onecard.evaluation.task import Result, Subject
from onecard.run import evaluate as evaluating
from onecard.spec import CheckpointScores, Score

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner

# More batches than there are: every held-out block, at every checkpoint, and all of those stay.
WHOLE: dict[str, Any] = {"eval_batches": 1000, "eval_steps": 3, "save_steps": 3, "save_total_limit": 100}


@pytest.fixture
def outcome(runner: "Runner") -> "Outcome":
    return runner.start("run", **WHOLE)


def losses(rows: tuple[CheckpointScores, ...]) -> list[float]:
    return [row.find("loss").value for row in rows]


def test_every_checkpoint_has_the_loss_that_the_run_measured(outcome: "Outcome") -> None:
    events = [event for event in outcome.record if event["event"] == "evaluated"]
    found = onecard.evaluate(outcome.root)
    assert [row.step for row in found.checkpoints] == [event["step"] for event in events] == [3, 6, 9, 12]
    assert losses(found.checkpoints) == pytest.approx([event["loss"] for event in events], rel=1e-6)
    for row, event in zip(found.checkpoints, events, strict=True):
        assert row.find("loss").standard_error == pytest.approx(event["standard_error"], rel=1e-4)
        assert row.find("bits_per_byte").value == pytest.approx(event["bits_per_byte"], rel=1e-6)
        assert row.find("loss").n == event["num_target_tokens"]
    assert found.best == {"loss": f"step-{next(e['step'] for e in reversed(events) if e['is_best']):06d}"}
    assert len(found.comparisons) == 3

    lines = (outcome.root / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    assert [(line["step"], line["name"]) for line in recorded[:4]] == [
        (3, "loss"),
        (3, "perplexity"),
        (3, "bits_per_byte"),
        (6, "loss"),
    ]
    fields = {key: recorded[0][key] for key in Score.model_fields}
    assert Score.model_validate(fields) == found.checkpoints[0].find("loss")
    # Whose weights they are is part of what was measured.
    assert len({line["protocol"]["weights"] for line in recorded}) == 4
    assert {"dtype", "device", "torch", "transformers", "onecard", "data"} <= recorded[0]["protocol"].keys()


def test_what_each_item_took_is_kept_for_comparing_runs(outcome: "Outcome", tmp_path: Path) -> None:
    onecard.evaluate(outcome.root)
    other = shutil.copytree(outcome.root, tmp_path / "other")
    (entry,) = onecard.compare([outcome.root, other]).comparisons
    assert (entry.score, entry.gain, entry.p_value, entry.n > 1) == ("loss", 0, 1, True)


def test_neither_batch_size_nor_the_other_checkpoints_change_a_score(outcome: "Outcome") -> None:
    whole = losses(onecard.evaluate(outcome.root, batch_size=1).checkpoints)
    assert losses(onecard.evaluate(outcome.root, batch_size=64).checkpoints) == pytest.approx(whole, rel=1e-6)
    alone = onecard.evaluate(outcome.root, checkpoints="6,12", batch_size=1).checkpoints
    assert losses(alone) == [whole[1], whole[3]]
    (named,) = onecard.evaluate(outcome.root / "checkpoints" / "step-000009", batch_size=1).checkpoints
    assert losses((named,)) == [whole[2]]
    one, four = (onecard.evaluate(outcome.root, limit=5, checkpoints="last", batch_size=n).checkpoints for n in (1, 4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-6)
    assert four[0].find("loss").n == one[0].find("loss").n < alone[0].find("loss").n


def test_two_that_may_have_been_picked_pay_for_all_looks(outcome: "Outcome") -> None:
    # The run itself looked at four.
    best, last = onecard.evaluate(outcome.root, checkpoints="3,12").best["loss"], "step-000012"
    (entry,) = onecard.evaluate(outcome.root, checkpoints="3,12").comparisons
    assert entry.num_comparisons == (6 if best == last else 3)
    (entry,) = onecard.evaluate(outcome.root, checkpoints="3,9").comparisons
    assert entry.num_comparisons == 6
    # On another text only what is measured now has been looked at.
    text = outcome.root.parent / "other.txt"
    text.write_text("To be, or not to be. " * 100, encoding="utf-8")
    first, *_ = onecard.evaluate(outcome.root, checkpoints="3,9", text=text).comparisons
    assert first.num_comparisons == 1
    (entry,) = onecard.evaluate(outcome.root, checkpoints="6,9", text=text).comparisons
    assert entry.num_comparisons == 3


def test_tasks_see_each_checkpoint_once_in_order(outcome: "Outcome", monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measure = evaluating.LossTask.measure

    def watched(task: Any, subject: Subject) -> Result:
        seen.append(id(subject.model))
        return measure(task, subject)

    monkeypatch.setattr(evaluating.LossTask, "measure", watched)
    onecard.evaluate(outcome.root, ["loss", "loss"])
    assert len(seen) == 4
    assert len(set(seen)) == 1, "a checkpoint was loaded as another model"


def test_what_cannot_be_measured_is_said_before(outcome: "Outcome", runner: "Runner") -> None:
    root = outcome.root
    with pytest.raises(InputError, match=r"(?s)no task is given.*limit is 0"):
        onecard.evaluate(root, [], limit=0)
    with pytest.raises(InputError, match="no run folder"):
        onecard.evaluate(root / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint '7': use best, last, or one of 3, 6, 9, 12"):
        onecard.evaluate(root, checkpoints="3,7")
    with pytest.raises(InputError, match="give a run, a model, or a file of responses"):
        onecard.evaluate()
    for name in ("step-000003", "step-000009"):
        (root / "checkpoints" / name / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"(?s)step-000003 is damaged.*step-000009 is damaged.*--checkpoints"):
        onecard.evaluate(root)
    assert not (root / "scores.jsonl").exists()
    onecard.evaluate(root, checkpoints="6")

    model = runner.folder / "model"
    shutil.copytree(root / "checkpoints" / "step-000006", model)
    with pytest.raises(InputError, match=r"this is a model: give the run folder.*--text FILE"):
        onecard.evaluate(model)
    shutil.rmtree(root / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        onecard.evaluate(root)


def test_another_text_than_the_run_held_out_is_refused(outcome: "Outcome", runner: "Runner") -> None:
    runner.text.write_text("other words " * 2000, encoding="utf-8", newline="\n")
    with pytest.raises(CheckpointError, match="has changed since it began"):
        onecard.evaluate(outcome.root)


def test_a_run_that_held_nothing_out_has_no_loss_to_measure(runner: "Runner") -> None:
    outcome = runner.start("run", eval_fraction=0.0, eval_batches=None, eval_steps=None, max_steps=2)
    with pytest.raises(InputError, match="held nothing out"):
        onecard.evaluate(outcome.root)


def test_ifeval_over_checkpoints(runner: "Runner", tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from onecard.evaluation.ifeval import Checker

    try:
        Checker()
    except InputError:
        pytest.skip("needs NLTK's punkt_tab")
    outcome = runner.start("run", **WHOLE, max_seq_length=32)
    rows = [
        {"key": n, "prompt": f"say {n}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for n in range(5)
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = onecard.evaluate(
        outcome.root, ["loss", "ifeval"], ifeval_data=data, limit=4, checkpoints="3,12", max_new_tokens=8
    )
    assert found.best.keys() == {"loss", "prompt_level_strict_acc"}
    assert [entry.score for entry in found.comparisons] == ["loss", "prompt_level_strict_acc"]
    score = found.checkpoints[0].find("inst_level_loose_acc")
    assert (score.n, score.protocol["max_new_tokens"], score.protocol["is_greedy"]) == (4, 8, True)

    # What was written is kept, and scores the same without the model.
    kept = outcome.root / "responses" / "ifeval-step-000012.jsonl"
    again = onecard.evaluate(responses=kept, ifeval_data=data)
    values = [[score.value for score in row.scores] for row in again.checkpoints]
    assert values == [[score.value for score in found.checkpoints[1].scores if "acc" in score.name]]
    assert again.notes == ("1 of 5 prompts have no response and are left out",)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_runs_on_chats_are_measured_on_their_held_out_answers(method: str, tuner: Any) -> None:
    chats = {"eval_fraction": 0.25, "eval_steps": 3, "save_steps": 3, "learning_rate": 1e-2}
    outcome = tuner("llama", method=method, **chats).start("run")
    events = outcome.events("evaluated")
    found = onecard.evaluate(outcome.root)
    assert [row.step for row in found.checkpoints] == [event["step"] for event in events] == [3, 6]
    # An adapter is measured merged; for QLoRA into weights that are not in 4 bits.
    tolerance = {"full": 1e-6, "lora": 1e-4, "qlora": 5e-2}[method]
    assert losses(found.checkpoints) == pytest.approx([event["loss"] for event in events], rel=tolerance)
    assert [row.find("loss").n for row in found.checkpoints] == [event["num_target_tokens"] for event in events]
    assert losses(found.checkpoints)[0] != losses(found.checkpoints)[1]


def test_a_task_of_the_harness_over_checkpoints(outcome: "Outcome", tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    rows = [{"text": f"the {n}", "choices": ["ab", "lazy", "fox"], "label": n % 3} for n in range(5)]
    data, task = tmp_path / "rows.jsonl", tmp_path / "own.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data.as_posix()},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    task.write_text(json.dumps(settings), encoding="utf-8")
    found = onecard.evaluate(outcome.root, [str(task)], checkpoints="3,12", limit=4, batch_size=3)
    assert found.best.keys() == {"own/acc"}
    assert [row.find("own/acc").n for row in found.checkpoints] == [4, 4]
    assert len(found.comparisons) == 1
    assert (outcome.root / "responses" / "own-step-000012.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_fewshot": -1}, "num_fewshot is -1: give 0 or more"),
        ({"num_fewshot": 3}, "num_fewshot is for tasks of lm-evaluation-harness"),
        ({"tasks": ("ifeval",), "apply_chat_template": True}, "apply_chat_template is for tasks of lm-evaluation"),
    ],
)
def test_settings_of_tasks_that_are_not_asked_for_are_not_ignored(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        evaluating.EvaluationRequest(**settings).check()


def test_a_mistake_in_responses_is_told_without_the_scorers_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss() -> None:
        raise InputError("the scorer is missing")

    monkeypatch.setattr(evaluating, "Checker", miss)
    prompt = {"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    (tmp_path / "responses.jsonl").write_text("1\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: it takes two texts"):
        onecard.evaluate(responses=tmp_path / "responses.jsonl", ifeval_data=tmp_path / "prompts.jsonl")
