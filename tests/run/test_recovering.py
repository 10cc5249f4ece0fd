"""Memory that runs out and numbers that are none do not end a run, and do not show in its result."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load
from shortages import MESSAGE, FailsAt, failing

import onecard
from onecard.checkpoint import Checkpoint, read_checkpoint
from onecard.data import load_tokenizer
from onecard.errors import CheckpointError, DivergedError, DoesNotFitError, InputError
from onecard.run import milestones, retention, retreat, saver, stepping
from onecard.run.crew import Crew
from onecard.spec import Plan

if TYPE_CHECKING:
    from run.conftest import Outcome, Runner

# Without dropout, and with an epsilon above rounding: Adam would turn the noise of a zero gradient into a full step.
EXACT: dict[str, Any] = {"dropout": 0.0, "optim": "adamw", "adam_epsilon": 1e-4, "per_device_train_batch_size": 4}


def losses(outcome: "Outcome") -> list[float]:
    return [event["loss"] for event in outcome.events("step")]


def weights(outcome: "Outcome") -> dict[str, torch.Tensor]:
    return load(outcome.last_bytes("model.safetensors"))


def assert_close(one: "Outcome", other: "Outcome") -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    assert [event["loss"] for event in one.events("evaluated")] == pytest.approx(
        [event["loss"] for event in other.events("evaluated")], rel=1e-4
    )
    assert [event["step"] for event in one.events("step")] == [event["step"] for event in other.events("step")]
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(one)[name], tensor, rtol=0, atol=2e-4)


def plan_of(outcome: "Outcome") -> Plan:
    return Plan.model_validate_json(outcome.last_bytes("plan.json"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("num_operators", [0, 40, 300], ids=["at the start", "forward", "later"])
def test_a_step_without_room_is_made_in_smaller_parts(
    num_operators: int, optimizer: str, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EXACT | {"optim": optimizer, "max_steps": 6}
    whole = runner.start("whole", **settings)
    monkeypatch.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call == 3, num_operators))
    outcome = runner.start("short", **settings)
    assert_close(outcome, whole)
    (recovered,) = outcome.events("recovered")
    assert (recovered["step"], recovered["problem"], recovered["during"]) == (2, "out of memory", "step")
    assert recovered["settings"] == {"micro_batch_size": 2}
    assert "can't allocate memory" in recovered["evidence"]
    told = [json.loads(line) for line in (outcome.root / "events.jsonl").read_text("utf-8").splitlines()]
    held = next(event["held_bytes"] for event in told if event["event"] == "recovered")
    assert held["weights"] > 0
    assert held["moments"] >= held["weights"]
    assert (held["gradients"] > 0) == (num_operators == 300)
    assert (plan_of(outcome).micro_batch_size, plan_of(outcome).total_batch_size) == (2, 8)


def test_what_was_adopted_outlives_the_process(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and resumed after a shortage, the run equals one that was not killed, bit for bit."""

    def start(name: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call == 2, 50))
            if name == "killed":
                runner.kill(name, after_events=10)
            else:
                runner.start(name)

    start("whole")
    start("killed")
    whole, resumed = runner.outcome("whole"), runner.resume("killed")
    assert whole.events("recovered")
    resumed.assert_equals(whole)


def test_smaller_and_smaller_until_nothing_is_left(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call > 2, 0))
    with pytest.raises(DoesNotFitError, match="memory ran out at step 3 with the smallest step") as caught:
        runner.start("run", **EXACT)
    assert caught.value.exit_code == 3
    changes = [event["settings"] for event in runner.outcome("run").events("recovered")]
    sizes = [{"micro_batch_size": 2}, {"micro_batch_size": 1}]
    assert changes == [*sizes, {"gradient_checkpointing": True}, {"loss_chunk_size": 64}]


def test_a_step_that_needs_all_fallbacks_gives_the_same(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EXACT | {"max_steps": 6}
    whole = runner.start("whole", **settings)
    monkeypatch.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call in (3, 4, 5, 6), 60))
    outcome = runner.start("short", **settings)
    assert_close(outcome, whole)
    adopted = plan_of(outcome)
    assert (adopted.micro_batch_size, adopted.gradient_checkpointing, adopted.loss_chunk_size) == (1, True, 64)


def tear_update(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets memory run out in the midst of an update."""
    train_step, calls = stepping.train_step, [0]

    def tear(state: Any, *args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] != step:
            return train_step(state, *args, **keywords)
        masters = state.optimizer.masters
        before = {name: master.detach().clone() for name, master in masters.items()}

        def is_torn() -> bool:
            return any(not torch.equal(masters[name], tensor) for name, tensor in before.items())

        with FailsAt(0, is_torn):
            return train_step(state, *args, **keywords)

    monkeypatch.setattr(stepping, "train_step", tear)


@pytest.mark.parametrize("step", [2, 8], ids=["before the first checkpoint", "after one"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_torn_update_is_taken_back(
    optimizer: str, step: int, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EXACT | {"optim": optimizer}
    whole = runner.start("whole", **settings)
    tear_update(step, monkeypatch)
    outcome = runner.start("torn", **settings)
    assert_close(outcome, whole)
    (recovered,) = outcome.events("recovered")
    assert (recovered["during"], recovered["returned_from"]) == ("update", step - 1)
    # A new best of the evaluation at 4 is saved, too.
    assert recovered["step"] == (0 if step == 2 else 6)


def runs_out(*_: Any, **__: Any) -> None:
    raise RuntimeError(MESSAGE)


def cannot_be_read(*_: Any) -> None:
    raise CheckpointError("the share is gone")


def stale_newest(folder: Path) -> Checkpoint:
    if folder.name == "step-000006":
        raise CheckpointError("the share is away") from OSError(errno.ESTALE, "Stale file handle")
    return read_checkpoint(folder)


def has_no_page_file(*_: Any) -> None:
    raise OSError("The paging file is too small for this operation to complete. (os error 1455)")


@pytest.mark.parametrize(
    ("what", "fails", "error", "told"),
    [
        (
            "onecard.model.folder.AutoModelForCausalLM.from_pretrained",
            runs_out,
            DoesNotFitError,
            "no checkpoint is lost",
        ),
        ("onecard.run.retreat.restore", has_no_page_file, DoesNotFitError, "no checkpoint is lost"),
        ("onecard.run.retreat.read_checkpoint", cannot_be_read, CheckpointError, "the share is gone"),
        ("onecard.run.retreat.read_checkpoint", stale_newest, CheckpointError, "the share is away"),
    ],
    ids=["no memory", "no page file", "no share", "a share that may come back"],
)
def test_a_way_back_that_fails_sets_no_checkpoint_aside(
    what: str, fails: Any, error: type[Exception], told: str, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner.start("whole", **EXACT)
    with monkeypatch.context() as patched:
        tear_update(8, patched)
        patched.setattr(what, fails)
        with pytest.raises(error, match=told):
            runner.start("torn", **EXACT)
    torn = runner.outcome("torn")
    assert torn.checkpoints[-1] == "step-000006"
    assert not list(torn.root.glob("checkpoints/superseded-*"))
    runner.resume("torn").assert_equals(whole)


def test_gradients_are_gone_before_a_checkpoint_is_restored(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they take the room that the way back needs."""
    restore, seen = retreat.restore, list[bool]()

    def look(state: Any, checkpoint: Any) -> None:
        seen.append(any(master.grad is not None for master in state.optimizer.masters.values()))
        restore(state, checkpoint)

    monkeypatch.setattr(retreat, "restore", look)
    tear_update(8, monkeypatch)
    runner.start("torn", **EXACT)
    assert seen == [False]


def test_an_evaluation_without_room_takes_fewer_rows(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EXACT | {"per_device_eval_batch_size": 6, "eval_batches": 2, "max_steps": 8}
    whole = runner.start("whole", **settings)
    measure = failing(Crew.measure_heldout_loss, lambda call: call in (1, 2), 30)
    monkeypatch.setattr(Crew, "measure_heldout_loss", measure)
    outcome = runner.start("short", **settings)
    assert_close(outcome, whole)
    changes = [event["settings"] for event in outcome.events("recovered")]
    assert changes == [{"eval_batch_size": 3, "eval_batches": 4}, {"eval_batch_size": 1, "eval_batches": 12}]
    targets = [{event["num_target_tokens"] for event in run.events("evaluated")} for run in (outcome, whole)]
    assert targets[0] == targets[1]


def test_an_evaluation_that_never_fits_is_left_out(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 4, "eval_steps": 2, "dropout": 0.1}
    whole = runner.start("whole", **settings)
    monkeypatch.setattr(Crew, "measure_heldout_loss", failing(Crew.measure_heldout_loss, bool, 30))
    outcome = runner.start("short", **settings)
    # Dropout is on again after it.
    assert losses(outcome) == losses(whole)
    assert not outcome.events("evaluated")
    assert outcome.findings[0]["id"] == "left-out"
    assert outcome.findings[0]["evidence"].startswith("evaluation: ")
    assert outcome.record[-1]["reason"] == "completed"


def test_samples_without_room_are_written_one_by_one(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "complete", failing(milestones.complete, lambda call: call == 1, 30))
    outcome = runner.start("short", max_steps=6)
    (recovered,) = outcome.events("recovered")
    assert (recovered["during"], recovered["remedy"]) == ("samples", "repeated with 1 of the prompts at once")
    sampled = outcome.events("sampled")
    assert [[sample["prompt"] for sample in event["samples"]] for event in sampled] == [["the ", "lazy"]] * 2


def failing_save(fails: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    number, write = [0], saver.write_checkpoint

    def save(*args: Any) -> int:
        number[0] += 1
        if fails(number[0]):
            raise MemoryError
        return write(*args)

    monkeypatch.setattr(saver, "write_checkpoint", save)


def test_a_save_is_tried_again(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.start("whole")
    failing_save(lambda number: number == 2, monkeypatch)
    outcome = runner.start("short")
    (recovered,) = outcome.events("recovered")
    assert recovered["during"] == "checkpoint"
    assert [event for event in outcome.record if event["event"] != "recovered"] == whole.record
    assert outcome.last_bytes("model.safetensors") == whole.last_bytes("model.safetensors")


def test_a_save_that_fails_twice_is_made_up_for_later(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    failing_save(lambda number: number in (1, 2), monkeypatch)
    outcome = runner.start("short", eval_steps=0)
    assert outcome.findings[0]["evidence"].startswith("checkpoint: ")
    assert [event["step"] for event in outcome.events("saved")] == [6, 9, 12]


def test_a_last_save_that_fails_is_an_error(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.start("whole")
    with monkeypatch.context() as patched:
        failing_save(lambda number: number > 3, patched)
        with pytest.raises(DoesNotFitError, match="no memory to save step 12"):
            runner.start("short", eval_steps=0)
    assert whole.events("finished")
    assert runner.resume("short").record[-1]["reason"] == "completed"


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Any, float], bool]) -> None:
    """Makes the loss of some steps infinite, as told by the state and the learning rate."""
    train_step = stepping.train_step

    def train(state: Any, micro_batches: Any, learning_rate: float, **keywords: Any) -> Any:
        if is_bad(state, learning_rate):
            state.loss_scale.value.fill_(float("inf"))
        stats = train_step(state, micro_batches, learning_rate, **keywords)
        state.loss_scale.value.fill_(1.0)
        return stats

    monkeypatch.setattr(stepping, "train_step", train)


LONG = {"max_steps": 24, "eval_steps": 0, "sample_steps": 0, "save_steps": 6, "save_total_limit": 9}


def test_bad_samples_are_skipped(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    bad = range(8 * 9, 8 * 14)  # the samples of steps 10 to 14, at whatever step they come
    spoil(monkeypatch, lambda state, rate: state.progress.position in bad)
    outcome = runner.start("run", **LONG)
    (recovered,) = outcome.events("recovered")
    assert recovered["remedy"] == "back to step 6, going on after the 64 samples that led here"
    assert (recovered["step"], recovered["returned_from"], recovered["position"]) == (6, 14, 8 * 14)
    steps = outcome.events("step")
    assert [event["step"] for event in steps] == list(range(1, 25))
    assert all(event["is_finite"] for event in steps)
    assert outcome.record[-1]["reason"] == "completed"


def test_a_rate_that_is_too_high_is_lowered(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.step >= 9 and state.progress.rate_factor > 0.3)
    outcome = runner.start("run", on_nonfinite="lower_rate", **LONG)
    recovered = outcome.events("recovered")
    # The first one, at half of the rate, was cut from the record when it had not helped.
    assert [event["remedy"] for event in recovered] == ["back to step 6, at 0.25 of the learning rate"]
    rates = [event["learning_rate"] for event in outcome.events("step")]
    assert rates[6] == pytest.approx(0.25 * rates[5])
    assert outcome.record[-1]["reason"] == "completed"


def test_a_lowered_rate_is_kept_by_a_resume(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(state: Any, rate: float) -> bool:
        return bool(state.progress.step >= 9 and state.progress.rate_factor > 0.6)

    settings = LONG | {"on_nonfinite": "lower_rate"}
    spoil(monkeypatch, bad)
    whole = runner.start("whole", **settings)
    runner.kill("killed", after_events=38, **settings)
    resumed = runner.resume("killed")
    resumed.assert_equals(whole)


def test_a_run_that_stays_not_finite_ends_with_exit_code_4(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.step >= 15)
    with pytest.raises(DivergedError, match="going back 3 times did not help") as caught:
        runner.start("run", **LONG)
    assert caught.value.exit_code == 4
    outcome = runner.outcome("run")
    assert outcome.record[-1]["reason"] == "diverged"
    named, last = outcome.events("finding")
    # Going back cut off what was said before: the last words lead to the texts, too.
    for remedy in (named["remedy"], last["remedy"], str(caught.value)):
        assert "`onecard replay RUN --step 16`" in remedy
    assert not next(event for event in outcome.events("step") if event["step"] == 16)["is_finite"]


# Good until step 9, which is saved; the samples of steps 10 to 14 are refused, at whatever step they come.
RARE = LONG | {"save_steps": 9}
REFUSED = range(8 * 9, 8 * 14)


def before_going_back(do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    go_back = retreat.Retreat.go_back

    def after(self: Any, trouble: Any) -> Any:
        do()
        return go_back(self, trouble)

    monkeypatch.setattr(retreat.Retreat, "go_back", after)


def test_a_disk_that_fails_on_the_way_back_loses_nothing(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose checkpoints cannot be read must not begin again and set them aside."""
    spoil(monkeypatch, lambda state, rate: state.progress.position in REFUSED)
    whole = runner.start("whole", **RARE)

    def lose(root: Path) -> None:
        root.rename(root.with_name("elsewhere"))

    def damage(root: Path) -> None:
        for path in root.rglob("*.json"):
            path.rename(path.with_suffix(".gone"))

    def mend(root: Path) -> None:
        if not root.exists():
            root.with_name("elsewhere").rename(root)
        for path in root.rglob("*.gone"):
            path.rename(path.with_suffix(".json"))

    def empty(root: Path) -> None:
        (root / "step-000009" / "progress.json").rename(root / "step-000009" / "progress.gone")

    for name, fail in {"lost": lose, "damaged": damage, "one file": empty}.items():
        root = runner.folder / name / "checkpoints"
        with monkeypatch.context() as patched:
            before_going_back(lambda root=root, fail=fail: fail(root), patched)
            with pytest.raises(CheckpointError, match=r"go back from step 14 \(5 updates in a row were refu") as caught:
                runner.start(name, **RARE)
        assert caught.value.exit_code == 2
        mend(root)
        stopped = runner.outcome(name)
        assert stopped.checkpoints == ["step-000009"]
        assert [event["step"] for event in stopped.events("step")] == list(range(1, 15))
        runner.resume(name).assert_equals(whole)


@pytest.mark.parametrize("is_remade", [False, True], ids=["gone", "made anew"])
def test_a_share_that_is_gone_on_the_way_back_is_no_beginning(
    is_remade: bool, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run folder vanishes; what is there instead may hold the newest checkpoint, of refused steps."""
    settings = LONG | {"save_steps": 3}
    spoil(monkeypatch, lambda state, rate: state.progress.position in REFUSED)
    whole = runner.start("whole", **settings)
    run, away = runner.folder / "run", runner.folder / "away"

    def vanish() -> None:
        run.rename(away)
        if is_remade:
            (run / "checkpoints").mkdir(parents=True)
            shutil.copytree(away / "checkpoints" / "step-000012", run / "checkpoints" / "step-000012")

    with monkeypatch.context() as patched:
        before_going_back(vanish, patched)
        with pytest.raises(CheckpointError, match=r"go back from step 14 .*step-000009 was saved and is gone"):
            runner.start("run", **settings)
    assert [path.name for path in run.glob("checkpoints/*")] == ["step-000012"] * is_remade
    shutil.rmtree(run, ignore_errors=True)
    away.rename(run)
    assert runner.outcome("run").checkpoints == ["step-000003", "step-000006", "step-000009", "step-000012"]
    runner.resume("run").assert_equals(whole)


def test_a_disk_that_turns_read_only_on_the_way_back_loses_nothing(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.position in REFUSED)
    settings = RARE | {"save_steps": 3}
    whole = runner.start("whole", **settings)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(source))

    with monkeypatch.context() as patched:
        patched.setattr(retention, "move", refuse)
        with pytest.raises(CheckpointError, match=r"Read-only file system.*go on with .*onecard resume") as caught:
            runner.start("run", **settings)
    assert caught.value.exit_code == 2
    assert runner.outcome("run").checkpoints == ["step-000003", "step-000006", "step-000009", "step-000012"]
    runner.resume("run").assert_equals(whole)


def test_going_back_begins_anew_before_the_first_good_checkpoint(
    runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that refuses everything until it is sent back equals one that began with the samples after those."""
    bad = range(8 * 5)
    spoil(monkeypatch, lambda state, rate: state.progress.position in bad)
    outcome = runner.start("run", **LONG)
    (recovered,) = outcome.events("recovered")
    assert (recovered["step"], recovered["position"]) == (0, 40)
    assert outcome.record[-1]["reason"] == "completed"


@pytest.mark.parametrize("save_steps", [1, 24], ids=["at intervals", "by the clock"])
def test_refused_updates_push_out_no_good_checkpoint(
    save_steps: int, runner: "Runner", monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.position in range(8 * 9, 8 * 14))
    settings = LONG | {"save_steps": save_steps, "save_total_limit": 2}
    outcome = runner.start("run", **settings | ({"save_minutes": 1e-9} if save_steps == 24 else {}))
    (recovered,) = outcome.events("recovered")
    assert (recovered["step"], recovered["returned_from"]) == (9, 14)
    assert outcome.checkpoints == (["step-000023", "step-000024"] if save_steps == 1 else ["step-000024"])


def test_killed_on_the_way_back_to_the_beginning(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.position in range(8 * 5))
    settings = LONG | {"save_steps": 2}
    whole = runner.start("whole", **settings)
    assert [event["step"] for event in whole.events("recovered")] == [0]

    class Killed(BaseException):
        pass

    set_aside_after = retreat.set_aside_after

    def die(folder: Any) -> None:
        set_aside_after(folder)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(retreat, "set_aside_after", die)
        with pytest.raises(Killed):
            runner.start("killed", **settings)
    assert not runner.outcome("killed").checkpoints
    runner.resume("killed").assert_equals(whole)


def test_the_texts_of_a_step_are_shown(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda state, rate: state.progress.position in range(72, 112))
    outcome = runner.start("run", **LONG)
    seen: list[torch.Tensor] = []
    train_step = stepping.train_step

    def remember(state: Any, micro_batches: Any, *args: Any, **keywords: Any) -> Any:
        if state.progress.step == 9:
            seen.extend(row for batch in micro_batches for row in batch.ids)
        return train_step(state, micro_batches, *args, **keywords)

    monkeypatch.setattr(stepping, "train_step", remember)
    again = runner.start("again", **LONG)
    assert again.events("recovered")
    shown = onecard.replay(outcome.root, 10, with_loss=True)
    assert shown.position == 112 + 8 * 3
    assert shown.weights == "step-000006"
    texts = ["".join(text for text, _ in sample.spans) for sample in shown.samples]
    decode = load_tokenizer(outcome.last).decode
    assert [text[:-1] for text in texts] == [decode(row) for row in seen[-8:]]
    assert all(sample.loss is not None and 2 < sample.loss < 6 for sample in shown.samples)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "apart"])
def test_chats_are_split_too(
    packing: bool, method: str, tuner: Callable[..., "Runner"], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"packing": packing, "optim": "adamw", "adam_epsilon": 1e-4, "per_device_train_batch_size": 4}
    runner = tuner("llama", method=method, **settings)
    whole = runner.start("whole")
    monkeypatch.setattr(stepping, "train_step", failing(stepping.train_step, lambda call: call in (3, 4), 60))
    outcome = runner.start("short")
    assert losses(outcome) == pytest.approx(losses(whole), rel=1e-4)
    assert plan_of(outcome).micro_batch_size == 1
    shown = onecard.replay(outcome.root, 4, with_loss=True)
    assert shown.weights == "the beginning"
    assert len(shown.samples) == 8
    for sample in shown.samples:
        assert sample.place.startswith("conversation ")
        asked, answered = ("".join(text for text, counts in sample.spans if counts is what) for what in (False, True))
        assert "What is the" in asked
        assert answered.strip()
        assert sample.loss is not None


def test_a_step_that_was_not_made_is_refused(runner: "Runner") -> None:
    outcome = runner.start("run", max_steps=3)
    with pytest.raises(InputError, match=r"--step 4: .* has made no such step, its steps are 1 to 3"):
        onecard.replay(outcome.root, 4)
