"""A run that was stopped or killed ends as if nothing had happened, bit for bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import onecard
from onecard.checkpoint import folder as checkpoint_module
from onecard.errors import CheckpointError, DataError, InputError, RunBusyError
from onecard.evaluation.heldout import HeldoutLoss
from onecard.observe.events import Event

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner

Press = Callable[[int], Callable[[Event], None]]


@pytest.fixture
def uninterrupted(runner: "Runner") -> "Outcome":
    return runner.start("whole")


def test_the_record_tells_everything_in_order(uninterrupted: "Outcome") -> None:
    steps = [("step", step) for step in range(1, 13)]
    assert [event for event in uninterrupted.kinds if event[0] == "step"] == steps
    after = {4: ["evaluated", "saved"], 5: ["sampled"], 12: ["evaluated", "sampled", "saved", "finished"]}
    for step, expected in after.items():
        kinds = [kind for kind, at in uninterrupted.kinds if at == step and kind != "step"]
        assert kinds == expected
    finished = uninterrupted.record[-1]
    assert (finished["reason"], finished["tokens_seen"]) == ("completed", 12 * 8 * 16)
    evaluated = [event for event in uninterrupted.record if event["event"] == "evaluated"]
    assert finished["loss"] == evaluated[-1]["loss"]
    assert finished["best_loss"] == min(event["loss"] for event in evaluated)
    assert all(event["num_target_tokens"] == 8 * 16 for event in uninterrupted.record if event["event"] == "step")


def test_equal_runs_are_equal(uninterrupted: "Outcome", runner: "Runner") -> None:
    runner.start("again").assert_equals(uninterrupted)
    other = runner.start("other", seed=5)
    assert other.record != uninterrupted.record
    assert other.last_bytes("model.safetensors") != uninterrupted.last_bytes("model.safetensors")


@pytest.mark.parametrize("step", [3, 7, 8])
def test_stopped_and_resumed(step: int, uninterrupted: "Outcome", runner: "Runner", stop_at: Press) -> None:
    stopped = runner.start("stopped", on_event=stop_at(step))
    assert stopped.kinds[-1] == ("finished", step)
    assert stopped.record[-1]["reason"] == "interrupted"
    assert stopped.checkpoints[-1] == f"step-{step:06d}"
    resumed = runner.resume("stopped")
    resumed.assert_equals(uninterrupted)
    assert resumed.checkpoints == uninterrupted.checkpoints


def test_stopped_twice_and_resumed(uninterrupted: "Outcome", runner: "Runner", stop_at: Press) -> None:
    runner.start("stopped", on_event=stop_at(2))
    runner.resume("stopped", on_event=stop_at(7))
    runner.resume("stopped").assert_equals(uninterrupted)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_masters_survive_a_resume(optimizer: str, runner: "Runner", stop_at: Press) -> None:
    whole = runner.start("whole", optim=optimizer, precision="bf16", max_steps=6)
    runner.start("stopped", on_event=stop_at(4), optim=optimizer, precision="bf16", max_steps=6)
    runner.resume("stopped").assert_equals(whole)


EVENTS = [("step", 1), ("saved", 3), ("evaluated", 4), ("evaluated", 8), ("sampled", 10), ("step", 11)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_killed_at_any_event_twice_and_resumed(
    event: tuple[str, int], uninterrupted: "Outcome", runner: "Runner"
) -> None:
    runner.kill("killed", after_events=uninterrupted.kinds.index(event) + 1)
    assert runner.outcome("killed").kinds[-1] == event
    runner.kill("killed", after_events=3)
    runner.resume("killed").assert_equals(uninterrupted)


def test_killed_at_the_last_events_and_resumed(uninterrupted: "Outcome", runner: "Runner") -> None:
    total = len(uninterrupted.kinds)
    runner.kill("killed", after_events=total - 3)  # evaluated, but not saved
    runner.kill("killed", after_events=total - len(resumed_from(uninterrupted, 9)) - 1)  # saved, but not finished
    runner.resume("killed").assert_equals(uninterrupted)
    # A run that is done is done.
    runner.resume("killed").assert_equals(uninterrupted)


def resumed_from(outcome: "Outcome", step: int) -> list[tuple[str, int]]:
    """What the record holds before the checkpoint of a step is reported."""
    return outcome.kinds[: outcome.kinds.index(("saved", step))]


@pytest.mark.parametrize("save", [1, 2, 3])
def test_killed_while_saving_and_resumed(
    save: int, uninterrupted: "Outcome", runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = iter(range(1, 100))
    force = checkpoint_module.force_to_disk

    def die(folder: Path) -> None:
        if next(saves) == save:
            (folder / "model.safetensors").write_bytes(b"half")
            raise SystemExit(9)  # passes through everything, as the end of the process would
        force(folder)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "force_to_disk", die)
        with pytest.raises(SystemExit):
            runner.start("killed")
    assert list((runner.folder / "killed" / "checkpoints").glob(".*.partial"))
    resumed = runner.resume("killed")
    resumed.assert_equals(uninterrupted)
    assert not list((resumed.root / "checkpoints").glob(".*"))


def test_a_real_process_killed_while_saving(uninterrupted: "Outcome", runner: "Runner", tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(onecard.spec.recipe_to_yaml(runner.recipe()), encoding="utf-8")
    program = f"""
import os, onecard
from onecard.checkpoint import folder
from onecard.planner import measure
measure._PEAK_SIZE = {{"cpu": 64}}
force, saves = folder.force_to_disk, iter(range(100))
def die(path):
    if next(saves) == 2:
        os._exit(9)
    force(path)
folder.force_to_disk = die
onecard.train(onecard.load_recipe({str(recipe)!r}), output_dir={str(runner.folder / "killed")!r})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert ended.returncode == 9, ended.stderr.decode()
    assert list((runner.folder / "killed" / "checkpoints").glob(".*.partial"))
    runner.resume("killed").assert_equals(uninterrupted)


def test_from_an_older_checkpoint(uninterrupted: "Outcome", runner: "Runner") -> None:
    runner.start("again", save_total_limit=10)
    folder = runner.folder / "again" / "checkpoints"
    aside = list[set[str]]()
    onecard.resume(
        folder / "step-000006", on_event=lambda event: aside.append({path.name for path in folder.glob("superseded-*")})
    )
    runner.outcome("again").assert_equals(uninterrupted)
    # Kept until the run has been there again.
    assert aside[0] >= {"superseded-step-000009", "superseded-step-000012"}
    assert not list(folder.glob("superseded-*"))


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    uninterrupted: "Outcome", runner: "Runner", caplog: pytest.LogCaptureFixture
) -> None:
    runner.start("damaged", save_total_limit=10)
    checkpoints = runner.folder / "damaged" / "checkpoints"
    flip_last_byte(checkpoints / "step-000012" / "model.safetensors")
    (checkpoints / "step-000009" / "optimizer.safetensors").unlink()
    aside = list[set[str]]()
    onecard.resume(
        runner.folder / "damaged", on_event=lambda event: aside.append({p.name for p in checkpoints.glob("damaged-*")})
    )
    runner.outcome("damaged").assert_equals(uninterrupted)
    assert aside[0] == {"damaged-step-000009", "damaged-step-000012"}
    assert [record.message.split(" It is now ")[1] for record in caplog.records] == [
        "damaged-step-000012; going on from step-000008",
        "damaged-step-000009; going on from step-000008",
    ]


def test_when_every_checkpoint_is_damaged_nothing_is_begun_anew(runner: "Runner") -> None:
    outcome = runner.start("damaged", max_steps=3)
    before = outcome.record
    for name in outcome.checkpoints:
        flip_last_byte(outcome.root / "checkpoints" / name / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.safetensors has other content"):
            runner.resume("damaged")
        assert outcome.record == before


def test_a_damaged_checkpoint_that_was_named_is_refused(runner: "Runner") -> None:
    outcome = runner.start("damaged", max_steps=3)
    checkpoint = outcome.root / "checkpoints" / outcome.checkpoints[-1]
    flip_last_byte(checkpoint / "model.safetensors")
    before = outcome.record
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content"):
        onecard.resume(checkpoint)
    assert outcome.record == before


def test_changed_text_is_refused(runner: "Runner") -> None:
    outcome = runner.start("changed", max_steps=3)
    before = outcome.record
    with runner.text.open("a", encoding="utf-8") as file:
        file.write("one more line")
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        runner.resume("changed")
    assert outcome.record == before
    runner.text.unlink()
    with pytest.raises(DataError, match=r"corpus\.txt"):
        runner.resume("changed")


def test_a_run_in_use_is_refused(runner: "Runner") -> None:
    outcome = runner.start("busy", max_steps=3)
    program = f"""
from filelock import FileLock
lock = FileLock({str(outcome.root / ".lock")!r})
lock.acquire()
print("held", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunBusyError, match="in use by another onecard process"):
            runner.resume("busy")
        other.stdin.write("\n")
    runner.resume("busy")


def test_a_run_for_a_device_that_is_gone_is_refused(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = runner.start("moved", max_steps=3)
    shutil.rmtree(outcome.root / "checkpoints")
    (outcome.root / "events.jsonl").unlink()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = json.loads((outcome.root / "plan.json").read_text(encoding="utf-8"))
    (outcome.root / "plan.json").write_text(json.dumps(plan | {"device": "cuda:0"}), encoding="utf-8")
    with pytest.raises(InputError, match="device cuda:0 cannot be used"):
        runner.resume("moved")


def test_what_is_no_run_is_refused(runner: "Runner", tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        onecard.resume(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no plan\.json"):
        onecard.resume(tmp_path)
    with pytest.raises(InputError, match="no run folder under runs"):
        onecard.resume("latest")


def scripted(losses: list[float]) -> Callable[..., HeldoutLoss]:
    remaining: Iterator[float] = iter(losses)
    return lambda *_: HeldoutLoss(next(remaining), 0.0, 100)


STOPS_EARLY = {"max_steps": 12, "eval_steps": 2, "save_steps": 4, "early_stopping_patience": 2, "sample_steps": 0}


def test_patience_ends_a_run_and_a_resume_does_not_go_on(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted([3.0, 2.0, 2.5, 2.2]))
    outcome = runner.start("early", **STOPS_EARLY)
    finished = outcome.record[-1]
    assert (finished["reason"], finished["step"]) == ("early stopping", 8)
    assert (finished["loss"], finished["best_loss"], finished["best_step"]) == (2.2, 2.0, 4)
    assert outcome.checkpoints == ["step-000004", "step-000008"]
    before = outcome.record
    assert runner.resume("early").record == before


def test_killed_when_patience_ran_out(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [3.0, 2.0, 2.5, 2.2]
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted(losses))
    whole = runner.start("whole", **STOPS_EARLY)
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted(losses))
    runner.kill("killed", after_events=whole.kinds.index(("saved", 8)) + 1, **STOPS_EARLY)
    runner.resume("killed").assert_equals(whole)


def test_the_best_checkpoint_is_kept(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted([3.0, 2.0, 2.5, 2.2, 2.3, 2.1]))
    outcome = runner.start("best", max_steps=12, eval_steps=2, save_steps=3, save_total_limit=1)
    assert outcome.checkpoints == ["step-000004", "step-000012"]
    saved = [(event["step"], event["reason"]) for event in outcome.record if event["event"] == "saved"]
    assert saved == [(2, "best"), (3, "interval"), (4, "best"), (6, "interval"), (9, "interval"), (12, "final")]
    from onecard.run.folder import RunFolder

    folder = RunFolder.open(outcome.root)
    assert folder.find_checkpoint("best").name == "step-000004"
    assert folder.find_checkpoint("last").name == "step-000012"
    assert folder.find_checkpoint("4").name == "step-000004"
    with pytest.raises(CheckpointError, match="no checkpoint '5': use best, last, or one of 4, 12"):
        folder.find_checkpoint("5")
