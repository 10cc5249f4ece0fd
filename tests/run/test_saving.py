"""A disk that refuses costs checkpoints, never the run, and how a state is written never changes what is computed."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import onecard
from onecard.checkpoint import SMALL_FILES_BYTES, list_checkpoints, reading
from onecard.errors import CheckpointError, InputError
from onecard.evaluation.heldout import HeldoutLoss
from onecard.observe.events import CLOCK_REASONS, Event, SaveReason
from onecard.run import checkpoints, saver, space
from onecard.run.folder import RunFolder
from onecard.run.retention import remove_surplus
from onecard.run.wear import find_wear
from onecard.training.snapshot import restore as restore_state

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LEAST_BYTES_IN_BACKGROUND", 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_LAST_PAUSES_S", (0.0, 0.0))


def refusing(saves: set[int]) -> Callable[..., int]:
    """`write_checkpoint` on a disk that refuses these saves; numbers begin with 0."""
    write, numbers = saver.write_checkpoint, iter(range(1000))

    def attempt(*arguments: Any) -> int:
        if next(numbers) in saves:
            raise CheckpointError("no space left") from OSError(errno.ENOSPC, "full")
        return write(*arguments)

    return attempt


def test_saving_in_the_background_changes_nothing(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "LEAST_BYTES_IN_BACKGROUND", 1 << 60)
        plain = runner.start("plain", optim="adamw")
    writers, write = set[str](), saver.write_checkpoint

    def slow(*arguments: Any) -> int:
        writers.add(threading.current_thread().name)
        threading.Event().wait(0.05)  # some steps go by
        return write(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", slow)
    found = runner.start("background", optim="adamw")
    found.assert_equals(plain)
    assert found.checkpoints == plain.checkpoints
    assert writers == {"onecard-save", "MainThread"}  # the last one by the run itself
    for name in found.checkpoints:
        for file in ("model.safetensors", "optimizer.safetensors", "progress.json", "tokenizer_config.json"):
            paths = [outcome.root / "checkpoints" / name / file for outcome in (found, plain)]
            if file == "progress.json":
                documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
                assert documents[0] | {"elapsed_s": 0} == documents[1] | {"elapsed_s": 0}
            else:
                assert paths[0].read_bytes() == paths[1].read_bytes(), (name, file)


def test_killed_while_a_thread_writes(runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None) -> None:
    whole = runner.start("whole")
    may_write, write = threading.Event(), saver.write_checkpoint

    def stuck(*arguments: Any) -> int:
        may_write.wait(60)
        return write(*arguments)

    class Killed(BaseException):
        pass

    def die(event: Event) -> None:
        if event.event == "step" and event.step == 4:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_checkpoint", stuck)
        with pytest.raises(Killed):
            runner.start("killed", on_event=die, eval_steps=12, sample_steps=12)
        assert not list_checkpoints(runner.folder / "killed" / "checkpoints")
        # What was not saved is not told as saved.
        assert ("saved", 3) not in runner.outcome("killed").kinds
    # The thread of a process that is killed ends with it; here it must not write into the run that goes on.
    monkeypatch.setattr("onecard.checkpoint.folder.Path.mkdir", Path.mkdir)
    again = runner.start("again")
    again.assert_equals(whole)
    may_write.set()


@pytest.mark.parametrize("how", ["at once", "in the background"])
def test_refused_saves_are_told_and_the_run_goes_on(
    how: str, runner: "Runner", monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr(checkpoints, "LEAST_BYTES_IN_BACKGROUND", 0 if how == "in the background" else 1 << 60)
    whole = runner.start("whole", save_total_limit=10)
    monkeypatch.setattr(saver, "write_checkpoint", refusing({1, 2}))
    found = runner.start("full", save_total_limit=10)
    assert set(whole.checkpoints) - set(found.checkpoints) == set(whole.checkpoints[1:3])
    assert found.last_bytes("model.safetensors") == whole.last_bytes("model.safetensors")
    findings = found.findings
    assert [finding["step"] for finding in findings] == [int(name[5:]) for name in whole.checkpoints[1:3]]
    assert "could not be written; the run goes on" in findings[0]["symptom"]
    assert findings[0]["evidence"] == f"{whole.checkpoints[1]}: no space left"
    assert {finding["id"] for finding in findings} == {"checkpoint-not-written"}
    # A disk is no part of what a run repeats.
    assert found.record == [
        event for event in whole.record if event["event"] != "saved" or event["checkpoint"] in found.checkpoints
    ]


def test_the_last_save_is_tried_again(runner: "Runner", monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    whole = runner.start("whole", max_steps=3, save_steps=3)
    num_saves = len(whole.events("saved"))
    monkeypatch.setattr(saver, "write_checkpoint", refusing({num_saves - 1, num_saves}))
    runner.start("again", max_steps=3, save_steps=3).assert_equals(whole)


def test_a_run_whose_last_save_is_refused_says_so_and_can_be_resumed(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    whole = runner.start("whole", max_steps=6)
    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_checkpoint", refusing(set(range(1, 100))))
        with pytest.raises(CheckpointError, match="no space left"):
            runner.start("full", max_steps=6)
    assert runner.outcome("full").checkpoints == ["step-000003"]
    runner.resume("full").assert_equals(whole)


def test_a_defect_while_saving_is_no_full_disk(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(saver, "write_checkpoint", broken)
    with pytest.raises(ZeroDivisionError):
        runner.start("run")


def without_memory(saves: set[int]) -> Callable[..., int]:
    """`write_checkpoint` on a host that has no memory for these saves; numbers begin with 0."""
    write, numbers = saver.write_checkpoint, iter(range(1000))

    def attempt(*arguments: Any) -> int:
        if next(numbers) in saves:
            raise MemoryError
        return write(*arguments)

    return attempt


def test_a_thread_without_memory_loses_no_checkpoint(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    whole = runner.start("whole", save_total_limit=10)
    monkeypatch.setattr(saver, "write_checkpoint", without_memory({1}))
    found = runner.start("short", save_total_limit=10)
    (recovered,) = found.events("recovered")
    assert (recovered["during"], recovered["step"]) == ("checkpoint", whole.events("saved")[1]["step"])
    assert [event for event in found.record if event["event"] != "recovered"] == whole.record
    assert found.checkpoints == whole.checkpoints
    for name in found.checkpoints:
        for file in ("model.safetensors", "optimizer.safetensors"):
            paths = [outcome.root / "checkpoints" / name / file for outcome in (found, whole)]
            assert paths[0].read_bytes() == paths[1].read_bytes(), (name, file)


def test_a_checkpoint_for_which_there_is_no_memory_is_told_by_its_own_step(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    whole = runner.start("whole", save_total_limit=10)
    monkeypatch.setattr(saver, "write_checkpoint", without_memory({1, 2}))
    found = runner.start("short", save_total_limit=10)
    (finding,) = found.findings
    assert finding["evidence"].startswith("checkpoint: ")
    assert finding["step"] == whole.events("saved")[1]["step"]
    assert set(whole.checkpoints) - set(found.checkpoints) == {whole.checkpoints[1]}
    assert found.last_bytes("model.safetensors") == whole.last_bytes("model.safetensors")


def writers_of(runner: "Runner", name: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The threads that write the checkpoints of a run."""
    writers, write = set[str](), saver.write_checkpoint

    def note(*arguments: Any) -> int:
        writers.add(threading.current_thread().name)
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_checkpoint", note)
        runner.start(name, max_steps=6)
    return writers


def test_a_host_with_little_memory_is_asked_for_no_copy(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert writers_of(runner, "plain", monkeypatch) == {"onecard-save", "MainThread"}
    assert "a copy of the state" not in caplog.text
    state_bytes = checkpoints.state_bytes
    sizes, machine = list[int](), checkpoints.probe_machine()

    def measure(state: Any) -> int:
        sizes.append(state_bytes(state))
        return sizes[-1]

    monkeypatch.setattr(checkpoints, "state_bytes", measure)
    monkeypatch.setattr(checkpoints, "probe_machine", lambda: replace(machine, free_ram_bytes=2 * sizes[-1]))
    assert writers_of(runner, "small", monkeypatch) == {"MainThread"}
    assert caplog.text.count("and a copy of the state takes") == 1
    runner.outcome("small").assert_equals(runner.outcome("plain"))


def test_a_system_that_refuses_a_thread_costs_time_only(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    plain = runner.start("plain")
    threads = SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=refuse))
    monkeypatch.setattr(saver, "threading", threads)
    found = runner.start("refused")
    found.assert_equals(plain)
    assert found.checkpoints == plain.checkpoints


def scripted(losses: list[float]) -> Callable[..., HeldoutLoss]:
    remaining = iter(losses)
    return lambda *_: HeldoutLoss(next(remaining), 0.0, 100)


def test_the_best_that_is_there_stays_where_a_better_one_could_not_be_written(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = [2.2, 2.0, 2.5, 2.6, 2.3, 2.4]
    monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted(losses))
    monkeypatch.setattr(saver, "write_checkpoint", refusing({2}))
    outcome = runner.start("run", eval_steps=2, save_steps=3, save_total_limit=1)
    assert outcome.record[-1]["best_step"] == 4
    assert outcome.checkpoints == ["step-000002", "step-000012"]
    assert RunFolder.open(outcome.root).find_checkpoint("best").name == "step-000002"
    assert "step 4, the best of" in caplog.text
    assert "has no checkpoint: step-000002 is the best there is" in caplog.text


def without_clock(outcome: "Outcome") -> list[dict[str, Any]]:
    return [event for event in outcome.record if event["event"] != "saved" or event["reason"] not in CLOCK_REASONS]


def test_the_clock_asks_for_checkpoints_that_take_no_other_ones_place(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runner.start("plain", eval_steps=12, sample_steps=12, save_steps=5)
    settings = {"eval_steps": 12, "sample_steps": 12, "save_steps": 5, "save_minutes": 1e-9}
    found = runner.start("clock", **settings)
    saved = [(event["step"], event["reason"]) for event in found.events("saved")]
    assert [step for step, reason in saved if reason == "clock"] == [1, 2, 3, 4, 6, 7, 8, 9, 11]
    assert without_clock(found) == plain.record
    assert found.checkpoints == plain.checkpoints
    # Killed after one of them, the run goes on from there.
    runner.kill("killed", after_events=16, **settings)
    steps = [step for kind, step in runner.outcome("killed").kinds if kind == "step"]
    assert runner.outcome("killed").checkpoints[-1] == f"step-{steps[-1]:06d}"
    resumed = runner.resume("killed")
    assert without_clock(resumed) == plain.record
    assert resumed.last_bytes("model.safetensors") == plain.last_bytes("model.safetensors")


def test_a_run_that_ends_early_ends_the_same_where_the_clock_has_just_saved(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"eval_steps": 2, "save_steps": 4, "sample_steps": 0, "early_stopping_patience": 2}
    outcomes = []
    for name, minutes in (("plain", None), ("clock", 1e-9)):
        monkeypatch.setattr("onecard.run.crew.Crew.measure_heldout_loss", scripted([2.0, 2.5, 2.2]))
        outcomes.append(runner.start(name, save_minutes=minutes, **settings))
    plain, found = outcomes
    assert (plain.record[-1]["reason"], plain.record[-1]["step"]) == ("early stopping", 6)
    assert plain.events("saved")[-1]["reason"] == "final"
    assert without_clock(found) == plain.record
    before = found.record
    assert runner.resume("clock").record == before


def test_what_is_read_is_not_removed(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=9, eval_steps=9, save_total_limit=10)
    root = outcome.root / "checkpoints"
    assert outcome.checkpoints == ["step-000003", "step-000006", "step-000009"]
    with reading(root / "step-000003"):
        remove_surplus(root, 1, {9})
        assert outcome.checkpoints == ["step-000003", "step-000009"]
    remove_surplus(root, 1, {9})
    assert outcome.checkpoints == ["step-000009"]


def test_what_is_repeated_or_replayed_is_not_removed(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does that trains on meanwhile."""
    outcome = runner.start("run", max_steps=9, eval_steps=9, save_total_limit=10)
    root = outcome.root / "checkpoints"
    kept: list[str] = []

    def restore(state: Any, checkpoint: Any) -> None:
        remove_surplus(root, 1, {9})
        kept.append(checkpoint.folder.name)
        restore_state(state, checkpoint)

    monkeypatch.setattr("onecard.run.verify.restore", restore)
    monkeypatch.setattr("onecard.run.replay.restore", restore)
    assert onecard.verify(root / "step-000003", 2).is_same
    onecard.replay(outcome.root, 5, with_loss=True)
    assert kept == ["step-000003", "step-000003"]
    remove_surplus(root, 1, {9})
    assert outcome.checkpoints == ["step-000009"]


def test_a_disk_without_room_for_one_checkpoint_is_refused(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Disk:
        free = 1000

    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: Disk)
    with pytest.raises(InputError, match=r"has 1000 B free, and a checkpoint of this run takes .*another disk"):
        runner.start("run")
    assert not (runner.folder / "run").exists()
    Disk.free = SMALL_FILES_BYTES + 500_000
    runner.start("small", max_steps=1)
    assert "lower save_total_limit" in caplog.text


def test_a_record_that_cannot_be_written_is_written_later(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.observe.jsonl import JsonlSink

    whole = runner.start("whole")
    write, calls = JsonlSink.write_all, iter(range(1000))

    def refuse(self: JsonlSink) -> None:
        if 3 <= next(calls) < 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self)

    monkeypatch.setattr(JsonlSink, "write_all", refuse)
    runner.start("full").assert_equals(whole)


def test_wear_is_found_when_it_is_absurd(runner: "Runner") -> None:
    terabyte, plan = 10**12, onecard.plan(runner.recipe(save_steps=2, eval_steps=4, save_minutes=1.5, max_steps=40))
    assert find_wear(terabyte, 599, plan, "interval") is None
    assert find_wear(terabyte // 100, 3600, plan, "interval") is None
    settings: dict[SaveReason, str] = {
        "interval": "save_steps: 10 instead of 2",
        "best": "eval_steps: 20 instead of 4",
        "clock": "save_minutes: 7.5 instead of 1.5",
    }
    for reason, setting in settings.items():
        finding = find_wear(terabyte, 3600, plan, reason)
        assert finding is not None
        assert finding.evidence == "931.3 GiB an hour; a drive rated for 600 TB is worn after 25 days of it"
        # A fifth of it is below 200 GiB an hour.
        assert finding.remedy.endswith(f": {setting} (after 125 days then)")
    finding = find_wear(100 * terabyte, 3600, plan, "interval")
    assert finding is not None
    assert "save_steps: 0 instead of 2" in finding.remedy


def test_wear_is_no_part_of_what_a_run_repeats(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runner.start("plain", max_steps=3)
    monkeypatch.setattr(checkpoints, "find_wear", lambda *known: find_wear(10**13, 3600, *known[2:]))
    runner.start("worn", max_steps=3).assert_equals(plain)
    assert "wear the drive" in (runner.folder / "worn" / "events.jsonl").read_text("utf-8")


def test_a_checkpoint_never_reaches_the_disk_before_the_record_it_counts(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("tells names of open files by /proc")
    forced, fsync = list[str](), os.fsync

    def note(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name in ("events.jsonl", "manifest.json"):
            forced.append(name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    outcome = runner.start("run")
    assert forced == ["events.jsonl", "manifest.json"] * len(outcome.events("saved"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "onecard-save":
            thread.join(10)


def test_names_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.checkpoint import Parts, folder_of_step, write_checkpoint

    forced, fsync = set[str](), os.fsync

    def note(descriptor: int) -> None:
        forced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("tells names of open files by /proc")
    monkeypatch.setattr(os, "fsync", note)
    write_checkpoint(folder_of_step(tmp_path, 1), Parts({}, {"progress": 1}, lambda folder: None))
    names = {Path(name).name for name in forced}
    assert names == {"progress.json", "manifest.json", ".step-000001.partial", tmp_path.name}


def test_a_disk_of_windows_is_known_under_wsl() -> None:
    kernel = "5.15.153.1-microsoft-standard-WSL2"
    assert space.is_windows_disk_of_wsl(Path("/mnt/c/runs"), kernel)
    assert not space.is_windows_disk_of_wsl(Path("/mnt/c/runs"), "6.8.0-generic")
    assert not space.is_windows_disk_of_wsl(Path("/mnt/data/runs"), kernel)
    assert not space.is_windows_disk_of_wsl(Path("/home/me/mnt/c/runs"), kernel)
