"""What happens when a run cannot begin or cannot go on."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import onecard
from onecard.errors import CheckpointError, DeviceLostError, DivergedError, InputError
from onecard.observe.events import Event
from onecard.run.folder import RunFolder, free_folder

if TYPE_CHECKING:
    from run.conftest import Runner


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_run_is_not_overwritten(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=2)
    before = contents(outcome.root)
    with pytest.raises(InputError, match=r"already holds a run: continue it with `onecard resume"):
        runner.start("run", max_steps=2)
    assert contents(outcome.root) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_other_files_are_not_overwritten(kind: str, runner: "Runner") -> None:
    target = runner.folder / "notes"
    (target if kind == "folder" else runner.folder).mkdir(parents=True)
    path = target / "notes.txt" if kind == "folder" else target
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists and is not empty"):
        runner.start("notes", max_steps=2)
    assert contents(runner.folder) == {path.relative_to(runner.folder).as_posix(): b"mine"}


def test_a_recipe_that_cannot_work_leaves_no_folder(runner: "Runner") -> None:
    for changes in ({"warmup_steps": 100}, {"max_seq_length": 10**6}, {"precision": "fp16"}, {"hidden_size": 34}):
        with pytest.raises(InputError):
            runner.start("run", **changes)
    assert not runner.folder.exists()


def test_a_diverged_run_says_so_and_stops(runner: "Runner") -> None:
    with pytest.raises(DivergedError, match="5 updates in a row were refused") as caught:
        runner.start(
            "run", on_nonfinite="stop", learning_rate=1e38, optim="adamw", max_steps=60, save_steps=10, sample_steps=0
        )
    assert caught.value.exit_code == 4
    outcome = runner.outcome("run")
    assert "onecard replay RUN --step" in outcome.events("finding")[0]["remedy"]
    finding, finished = outcome.record[-2:]
    assert (finished["event"], finished["reason"]) == ("finished", "diverged")
    assert (finding["event"], finding["stops_run"]) == ("finding", True)
    steps = [event for event in outcome.record if event["event"] == "step"]
    refused = [event["is_finite"] for event in steps].count(False)
    assert refused == 5
    assert steps[-1]["step"] == finding["step"] == len(steps) < 60
    with pytest.raises(DivergedError):
        runner.resume("run")
    assert runner.outcome("run").record == outcome.record


def test_one_refused_update_is_no_divergence(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.run import stepping

    def spoil_every_other(state: Any, *args: Any, **keywords: Any) -> Any:
        if state.progress.step % 2:
            state.loss_scale.value.fill_(float("inf"))
        stats = train_step(state, *args, **keywords)
        state.loss_scale.value.fill_(1.0)
        return stats

    train_step = stepping.train_step
    monkeypatch.setattr(stepping, "train_step", spoil_every_other)
    outcome = runner.start("run", max_steps=60, eval_steps=0, sample_steps=0, save_steps=0)
    steps = [event["is_finite"] for event in outcome.record if event["event"] == "step"]
    assert steps == [True, False] * 30


def failing_compiler(fails_in: str) -> Callable[..., Callable[..., Any]]:
    """`torch.compile` on a machine where it does not work: in the forward pass, or only when the backward begins."""

    def broken(_: Tensor) -> None:
        raise TorchDynamoException("no Triton\nfor you")

    def compile_module(module: torch.nn.Module, **_: Any) -> Callable[..., Any]:
        def run(**keywords: Any) -> Any:
            if fails_in == "forward":
                raise TorchDynamoException("no Triton\nfor you")
            output = module(**keywords)
            output.last_hidden_state.register_hook(broken)
            return output

        return run

    return compile_module


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_a_compiler_that_fails_is_given_up(fails_in: str, runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runner.start("plain", max_steps=4)
    monkeypatch.setattr("onecard.planner.choose.find_compiler_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", failing_compiler(fails_in))
    compiled = runner.start("compiled", max_steps=4, torch_compile=True)
    finding, *rest = compiled.record
    assert finding["event"] == "finding"
    assert finding["id"] == "compile-failed"
    assert finding["evidence"] == "no Triton"
    assert rest == plain.record
    assert compiled.last_bytes("model.safetensors") == plain.last_bytes("model.safetensors")


def test_a_second_interrupt_does_not_wait(runner: "Runner") -> None:
    import signal

    def press(_: Event) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runner.start("run", on_event=press)
    assert signal.getsignal(signal.SIGINT) is before


def test_termination_stops_as_an_interrupt_does(runner: "Runner") -> None:
    import signal

    def terminate(event: Event) -> None:
        if event.event == "step" and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    outcome = runner.start("run", on_event=terminate)
    assert outcome.record[-1]["reason"] == "interrupted"
    assert outcome.checkpoints == ["step-000002"]


def test_sources_are_mixed_and_all_targets_count(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=3)
    losses = [event["loss"] for event in outcome.record if event["event"] == "step"]
    # Bytes at random cost log(257) nats each.
    assert losses[0] == pytest.approx(5.55, abs=0.1)
    assert losses[2] < losses[0]


def test_an_unfinished_run_folder_is_explained(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=2)
    (outcome.root / "plan.json").write_text('{"device": "cpu"}', encoding="utf-8")

    onecard.resume(outcome.root)  # goes on under the plan of its checkpoint
    shutil.rmtree(outcome.root / "checkpoints")
    outcome.root.joinpath("events.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be read as a plan .*: start a new run"):
        onecard.resume(outcome.root)


@pytest.mark.parametrize("content", [bytes(range(256)) * 4, b"1\n2\n"])
def test_a_record_of_which_nothing_can_be_read_is_named_and_ends_no_run(
    runner: "Runner", content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = runner.start("run", max_steps=4)
    record = outcome.root / "events.jsonl"
    # As long as it was: a checkpoint knows the length, and the run goes on behind it.
    record.write_bytes((content * 400)[: record.stat().st_size - 1] + b"\n")
    for read in (onecard.write_report, lambda run: onecard.replay(run, 2), lambda run: onecard.verify(run, 1)):
        with pytest.raises(InputError, match=r"events\.jsonl cannot be read as the record of a run"):
            read(outcome.root)
    with caplog.at_level("WARNING", "onecard.run"):
        onecard.resume(outcome.root)
    assert "lines of it could not be read" in caplog.text


def test_a_start_that_fails_leaves_no_folder_in_the_way(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.run import session

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("there is no such curve")

    with monkeypatch.context() as patched:
        patched.setattr(session, "make_sinks", refuse)
        with pytest.raises(InputError, match="no such curve"):
            runner.start("run", max_steps=2)
    assert not (runner.folder / "run").exists()
    runner.start("run", max_steps=2)


def test_a_run_that_fails_later_keeps_its_folder(runner: "Runner") -> None:
    def fail(_: Event) -> None:
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        runner.start("run", on_event=fail)
    assert (runner.folder / "run" / "events.jsonl").stat().st_size


def test_a_folder_that_cannot_be_written_is_named(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan, recipe = onecard.plan(runner.recipe(max_steps=2)), runner.recipe(max_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match=r"run folder .*run cannot be made \(No space left"):
            RunFolder.create(runner.folder / "run", recipe, plan)
    assert not (runner.folder / "run").exists()


def test_a_run_too_short_for_the_limit_diverges_too(runner: "Runner") -> None:
    with pytest.raises(DivergedError, match=r"3 updates in a row were refused.*start a new run with half"):
        runner.start("run", learning_rate=1e38, optim="adamw", max_steps=6, sample_steps=1)


def test_a_compiler_once_given_up_stays_given_up(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.planner.choose.find_compiler_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", failing_compiler("forward"))
    outcome = runner.start("run", max_steps=4, torch_compile=True)
    for name, is_compiled in (("", True), (f"checkpoints/{outcome.checkpoints[-1]}", False)):
        plan = json.loads((outcome.root / name / "plan.json").read_text(encoding="utf-8"))
        assert plan["torch_compile"] is is_compiled
    onecard.resume(outcome.root / "checkpoints" / outcome.checkpoints[0])
    assert [event["event"] for event in runner.outcome("run").record].count("finding") == 1


@pytest.mark.parametrize("keeps", ["folders", "nothing"])
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(keeps: str, runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=3)
    if keeps == "nothing":
        shutil.rmtree(outcome.root / "checkpoints")
    else:
        for manifest in outcome.root.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
    before = contents(outcome.root)
    with pytest.raises(CheckpointError, match="restore them, or start a new run"):
        runner.resume("run")
    assert contents(outcome.root) == before


@pytest.mark.parametrize(
    "changes", [{"step": "three"}, {"elapsed_s": None}, {"extra": 1}, {"position": 1.5}], ids=lambda c: next(iter(c))
)
def test_progress_that_cannot_be_is_explained(changes: dict[str, Any], runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=2, save_total_limit=1)
    folder = outcome.root / "checkpoints" / outcome.checkpoints[-1]
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if "extra" in changes:
        del progress["step"]
    (folder / "progress.json").write_text(json.dumps(progress | changes), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    content = (folder / "progress.json").read_bytes()
    manifest["files"]["progress.json"] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    before = outcome.record
    with pytest.raises(CheckpointError, match="does not say where the run stood"):
        onecard.resume(outcome.root)
    assert outcome.record == before


def test_two_starts_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    made = [free_folder(tmp_path / "runs" / "demo") for _ in range(3)]
    assert [path.name for path in made] == ["demo", "demo-2", "demo-3"]


def test_a_taken_folder_is_refused_before_the_text_is_read(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = runner.start("run", max_steps=2)
    monkeypatch.setattr("onecard.data.prepare", None)
    with pytest.raises(InputError, match="already holds a run"):
        onecard.train(runner.recipe(max_steps=2), output_dir=outcome.root)


def test_a_family_that_is_no_decoder_is_refused(runner: "Runner") -> None:
    with pytest.raises(InputError, match="electra"):
        runner.start("run", model_config={"model_type": "electra"}, num_key_value_heads=None, max_steps=2)


@pytest.mark.parametrize("step", [0, 5])
def test_a_lost_device_is_explained_and_the_run_goes_on(
    step: int, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecard.run import stepping

    whole, train_step = runner.start("whole"), stepping.train_step

    def lose(state: Any, *args: Any, **keywords: Any) -> Any:
        if state.progress.step == step:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return train_step(state, *args, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(stepping, "train_step", lose)
        with pytest.raises(
            DeviceLostError, match=rf"after step {step} \(CUDA error: unspecified launch failure\)"
        ) as lost:
            runner.start("run")
    assert lost.value.exit_code == 5
    runner.resume("run").assert_equals(whole)


def test_a_disk_that_is_full_at_the_end_does_not_fail_the_run(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_outcome", full)
    outcome = runner.start("run", max_steps=4)
    assert outcome.record[-1]["reason"] == "completed"
    assert "could not be written down: [Errno 28] No space left" in caplog.text
