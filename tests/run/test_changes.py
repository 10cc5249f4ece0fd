"""What has changed since a run was last at work is told; what would change what is computed is refused by its name."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shortages import failing

import onecard
from onecard.errors import CheckpointError, DeviceLostError, DoesNotFitError, InputError
from onecard.run import stepping, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from run.conftest import Outcome, Runner


@pytest.fixture
def stopped(runner: "Runner", stop_at: "Callable[[int], Any]") -> "Outcome":
    return runner.start("run", on_event=stop_at(4), max_steps=6, eval_steps=6, sample_steps=6)


def test_names_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--accept moon means nothing. There are data: .*tokenizer: "):
        onecard.resume(tmp_path, accept=["data,moon"])


def test_other_versions_are_told_and_harmless(
    stopped: "Outcome", runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert json.loads(stopped.last_bytes("circumstances.json")).keys() == {"card", "card_bytes", "recipe"}
    monkeypatch.setattr("onecard.run.changes.find_versions", lambda: {"torch": "99"})
    runner.resume("run")
    told = [record.message for record in caplog.records]
    assert any(message.startswith("torch is 99, the run was at work with ") for message in told)
    assert runner.outcome("run").kinds[-1] == ("finished", 6)


def test_other_versions_are_told_before_the_first_checkpoint_too(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner.kill("run", after_events=2, max_steps=4)
    monkeypatch.setattr("onecard.run.changes.find_versions", lambda: {"torch": "99"})
    runner.resume("run")
    assert "torch is 99, the run was at work with " in caplog.text


def test_a_smaller_card_is_refused_until_it_is_accepted(
    stopped: "Outcome", runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped.last / "circumstances.json"
    before = json.loads(path.read_text(encoding="utf-8"))

    def was_on(card_bytes: int, card: str = "A100") -> None:
        there = before | {"card": card, "card_bytes": card_bytes}
        monkeypatch.setattr("onecard.run.changes.read_object", lambda _: there)

    was_on(12 * 10**9, card="CPU")  # of the same name, as the 3080 of 10 and of 12 GB
    with pytest.raises(InputError, match=r"the card is CPU, the run was on CPU, which has more memory: 11.2 GiB"):
        runner.resume("run")
    was_on(80 * 10**9)
    with pytest.raises(InputError, match=r"the card is CPU, the run was on A100, which has more.*\n.*--accept card"):
        runner.resume("run")
    assert runner.outcome("run").record == stopped.record
    onecard.resume(stopped.root, accept=["card"])
    was_on(0)
    runner.resume("run")
    assert "the card is CPU, the run was on A100: the run goes on" in caplog.text


def test_an_edited_recipe_is_refused_until_it_is_accepted(stopped: "Outcome", runner: "Runner") -> None:
    path = stopped.root / "recipe.yaml"
    text = re.sub(r"(?m)^(logging_steps|learning_rate): .*", r"\1: 3", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"learning_rate: 0.006 in the run, 3.0 now\n.*--accept recipe") as caught:
        runner.resume("run")
    assert "logging_steps" not in str(caught.value)
    onecard.resume(stopped.root, accept=["recipe"])
    assert max(event["learning_rate"] for event in runner.outcome("run").events("step")) <= 0.006


def test_changed_text_goes_on_when_it_is_accepted(
    stopped: "Outcome", runner: "Runner", caplog: pytest.LogCaptureFixture
) -> None:
    with runner.text.open("a", encoding="utf-8") as file:
        file.write("one more line " * 50)
    with pytest.raises(CheckpointError, match=r"tokens then, .* now.* has changed .*--accept data`"):
        runner.resume("run")
    onecard.resume(stopped.root, accept=["data"])
    assert "accepted, and the run goes on with what is there now: the training text" in caplog.text
    assert runner.outcome("run").kinds[-1] == ("finished", 6)
    # From now on it is the text of the run.
    onecard.resume(stopped.root)


def test_a_tokenizer_made_from_the_text_stays_the_runs_own(runner: "Runner", stop_at: "Callable[[int], Any]") -> None:
    settings = {"tokenizer": "bpe", "vocab_size": 300, "max_steps": 6, "eval_steps": 6, "sample_steps": 6}
    stopped = runner.start("run", on_event=stop_at(4), **settings)
    before = stopped.last_bytes("tokenizer.json")
    with runner.text.open("a", encoding="utf-8") as file:
        file.write("zyxw zyxw zyxw " * 300)
    onecard.resume(stopped.root, accept=["data"])
    assert runner.outcome("run").last_bytes("tokenizer.json") == before
    onecard.resume(stopped.root)


def test_another_vocabulary_is_never_accepted(stopped: "Outcome", runner: "Runner") -> None:
    recipe = (stopped.root / "recipe.yaml").read_text(encoding="utf-8")
    for checkpoint in (stopped.root / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    (stopped.root / "events.jsonl").unlink()
    (stopped.root / "recipe.yaml").write_text(recipe.replace("tokenizer: bytes", "tokenizer: char"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="so the ids mean other texts"):
        onecard.resume(stopped.root, accept=["data,tokenizer,recipe"])


def test_a_checkpoint_of_the_first_format_goes_on(uninterrupted: "Outcome", runner: "Runner", stop_at: Any) -> None:
    stopped = runner.start("old", on_event=stop_at(7))
    for folder in (stopped.root / "checkpoints").iterdir():
        (folder / "circumstances.json").unlink()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        del manifest["files"]["circumstances.json"]
        manifest["format_version"] = 1
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    runner.resume("old").assert_equals(uninterrupted)


@pytest.fixture
def uninterrupted(runner: "Runner") -> "Outcome":
    return runner.start("whole")


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_run_repeats_itself_to_the_bit(runner: "Runner") -> None:
    outcome = runner.start("run", save_total_limit=10)
    before = contents(outcome.root)
    found = onecard.verify(outcome.root, 5)
    assert (found.checkpoint, [pair.step for pair in found.pairs]) == ("step-000006", [7, 8, 9, 10, 11])
    assert found.is_same
    assert found.same_weights == {"step-000008": True, "step-000009": True}
    named = onecard.verify(outcome.root / "checkpoints" / "step-000003", 20)
    assert [pair.step for pair in named.pairs] == list(range(4, 13))
    assert named.is_same
    assert "the same to the bit" in named.describe()
    assert contents(outcome.root) == before


def test_a_run_that_does_not_repeat_itself_is_told(runner: "Runner") -> None:
    outcome = runner.start("run", save_total_limit=10)
    lines = (outcome.root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        if event["event"] == "step" and event["step"] == 8:
            event["loss"] += 1e-7
    text = "".join(json.dumps(event) + "\n" for event in events)
    (outcome.root / "events.jsonl").write_text(text, encoding="utf-8")
    found = onecard.verify(outcome.root, 5)
    assert not found.is_same
    assert [pair.step for pair in found.pairs if pair.difference] == [8]
    assert "they differ from step 8 on" in found.describe()


def spoil(is_bad: "Callable[[Any], bool]", monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of some steps infinite."""
    train_step = stepping.train_step

    def train(state: Any, *args: Any, **keywords: Any) -> Any:
        if is_bad(state):
            state.loss_scale.value.fill_(float("inf"))
        stats = train_step(state, *args, **keywords)
        state.loss_scale.value.fill_(1.0)
        return stats

    monkeypatch.setattr(stepping, "train_step", train)


LONG = {"max_steps": 16, "eval_steps": 0, "sample_steps": 0, "save_steps": 4, "save_total_limit": 9}


@pytest.mark.parametrize("course", ["skip", "lower_rate"])
def test_a_run_that_went_back_repeats_itself(course: str, runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bad(state: Any) -> bool:
        is_skipped = course == "skip" and state.progress.position not in range(8 * 5, 8 * 10)
        return not is_skipped and state.progress.step >= 5 and state.progress.rate_factor == 1

    with monkeypatch.context() as patched:
        spoil(is_bad, patched)
        outcome = runner.start("run", on_nonfinite=course, **LONG)
    (recovered,) = outcome.events("recovered")
    assert recovered["step"] == 4
    found = onecard.verify(outcome.root / "checkpoints" / "step-000004", 8)
    assert found.is_same, found.describe()
    assert found.same_weights == {"step-000008": True, "step-000012": True}


def test_a_run_that_was_made_in_smaller_parts_repeats_itself(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call == 6, 50))
        outcome = runner.start("run", **LONG)
    assert outcome.events("recovered")
    found = onecard.verify(outcome.root / "checkpoints" / "step-000004", 6)
    assert found.is_same, found.describe()


def test_a_split_whose_event_was_cut_off_is_still_in_force(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out at step 6; then the run goes back to 4, and makes its steps anew in the smaller parts."""

    def is_bad(state: Any) -> bool:
        return state.progress.step >= 7 and state.progress.rate_factor == 1

    with monkeypatch.context() as patched:
        patched.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call == 6, 50))
        spoil(is_bad, patched)
        outcome = runner.start("run", on_nonfinite="lower_rate", **LONG)
    (recovered,) = outcome.events("recovered")
    assert (recovered["step"], recovered["problem"]) == (4, "not finite")
    assert recovered["settings"] == {"micro_batch_size": 1}
    found = onecard.verify(outcome.root / "checkpoints" / "step-000004", 8)
    assert found.is_same, found.describe()


def test_a_step_that_is_refused_again_is_the_same(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(lambda state: state.progress.step == 5, monkeypatch)
    outcome = runner.start("run", **LONG)
    assert [event["step"] for event in outcome.events("step") if not event["is_finite"]] == [6]
    checkpoint = outcome.root / "checkpoints" / "step-000004"
    assert onecard.verify(checkpoint, 6).is_same
    spoil(lambda state: state.progress.step == 6, monkeypatch)
    found = onecard.verify(checkpoint, 3)
    assert not found.is_same
    assert [pair.step for pair in found.pairs if pair.difference] == [7]


def test_what_a_repetition_lacks_is_explained(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = runner.start("run", max_steps=4)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(verify, "restore", fail)
        with pytest.raises(DoesNotFitError, match="memory ran out while the run was being loaded"):
            onecard.verify(outcome.root, 1)
    plan = json.loads((outcome.root / "plan.json").read_text(encoding="utf-8"))
    (outcome.root / "plan.json").write_text(json.dumps(plan | {"device": "cuda:7"}), encoding="utf-8")
    with pytest.raises(InputError, match="device cuda:7"):
        onecard.verify(outcome.root, 1)


LOST = torch.AcceleratorError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (LOST, DeviceLostError, r"any more while the run was being loaded \(CUDA error"),
        (MemoryError(), DoesNotFitError, "memory ran out while the run was being loaded"),
    ],
    ids=["GPU", "memory"],
)
def test_what_fails_while_a_run_is_loaded_is_explained(
    error: Exception,
    expected: type[Exception],
    words: str,
    stopped: "Outcome",
    runner: "Runner",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("onecard.run.start.restore", fail)
    with pytest.raises(expected, match=words):
        runner.resume("run")


def test_a_resume_that_has_no_room_leaves_newer_checkpoints(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = runner.start("run", **LONG)

    def fail(_: Any) -> None:
        raise DoesNotFitError("no room")

    monkeypatch.setattr("onecard.run.session.probe", fail)
    before = outcome.checkpoints, outcome.record
    with pytest.raises(DoesNotFitError):
        onecard.resume(outcome.root / "checkpoints" / "step-000004")
    assert (outcome.checkpoints, outcome.record) == before


def test_nothing_to_repeat_is_refused(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=3, save_steps=3)
    with pytest.raises(InputError, match="nothing to repeat"):
        onecard.verify(outcome.root, 5)
    with pytest.raises(InputError, match=r"no steps after step-000003"):
        onecard.verify(outcome.root / "checkpoints" / "step-000003", 5)
