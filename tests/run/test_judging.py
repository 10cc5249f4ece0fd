"""A run scores its checkpoints by a task, keeps what may be best, and marks it, whatever interrupts it."""

import errno
import json
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from light_tasks import PROMPTS, LettersTask

import onecard
from onecard.errors import InputError
from onecard.observe.events import Event
from onecard.run import judge
from onecard.run import tasks as run_tasks
from onecard.run.folder import RunFolder
from onecard.run.judge import NUM_FINALISTS

if TYPE_CHECKING:
    from run.conftest import Runner

JUDGED: dict[str, Any] = {
    "eval_tasks": "ifeval",
    "eval_limit": 12,
    "eval_max_new_tokens": 6,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_fraction": 0.05,
}


@pytest.fixture
def before() -> list[Callable[[], None]]:
    """What happens before a measurement: tests put something else there."""
    return [lambda: None]


@pytest.fixture
def judged(runner: "Runner", before: Any, monkeypatch: pytest.MonkeyPatch) -> "Runner":
    monkeypatch.setattr(
        run_tasks, "make_task", lambda name, settings, report=None: LettersTask(settings, report, lambda: before[0]())
    )
    return type(runner)(runner.folder, runner.values | JUDGED)


def test_every_save_is_scored_and_the_best_is_marked(judged: "Runner") -> None:
    outcome = judged.start("run")
    parts = [event for event in outcome.events("scored") if not event["is_whole"]]
    assert [(event["step"], event["n"]) for event in parts] == [(step, 12) for step in (2, 4, 6, 8, 10, 12)]
    values = [event["scores"]["letters"] for event in parts]
    assert len(set(values)) > 2
    assert [event["is_best"] for event in parts] == [v > max(values[:i], default=-1) for i, v in enumerate(values)]
    # What is scored has been saved.
    kinds = [kind for kind in outcome.kinds if kind[0] in ("saved", "scored")]
    assert kinds.index(("scored", 4)) > kinds.index(("saved", 4))

    (chosen,) = outcome.events("chosen")
    wholes = [event for event in outcome.events("scored") if event["is_whole"]]
    assert [event["checkpoint"] for event in wholes] == chosen["finalists"]
    assert 1 <= len(wholes) <= NUM_FINALISTS
    assert chosen["num_scored"] == 6
    assert chosen["n"] == len(PROMPTS)
    best = max(wholes, key=lambda event: event["scores"]["letters"])
    assert (chosen["checkpoint"], chosen["value"]) == (best["checkpoint"], best["scores"]["letters"])
    assert outcome.kinds[-2:] == [("chosen", 12), ("finished", 12)]
    folder = RunFolder.open(outcome.root)
    assert folder.find_checkpoint("best").name == chosen["checkpoint"]
    mark = json.loads((outcome.root / "best.json").read_text(encoding="utf-8"))
    assert mark["tasks"]["ifeval"]["checkpoint"] == chosen["checkpoint"]

    lines = (outcome.root / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(parts) + len(wholes)
    assert (outcome.root / "responses" / f"ifeval-whole-{chosen['checkpoint']}.jsonl").exists()


def test_training_is_what_it_is_without(judged: "Runner") -> None:
    scored = judged.start("scored", save_total_limit=100)
    plain = judged.start("plain", save_total_limit=100, eval_tasks=None, eval_limit=None, eval_max_new_tokens=None)
    others = [event for event in scored.record if event["event"] not in ("scored", "chosen")]
    assert others == plain.record
    assert scored.last_bytes("model.safetensors") == plain.last_bytes("model.safetensors")
    # The mark of the task, not the loss, is what `best` means, unless the recipe says so.
    by_loss = judged.start("by loss", metric_for_best_model="eval_loss", save_total_limit=100)
    assert RunFolder.open(by_loss.root).best_step() == RunFolder.open(plain.root).best_step()
    assert by_loss.events("chosen") == scored.events("chosen")


def test_leaders_survive_the_limit_of_checkpoints(judged: "Runner") -> None:
    kept = judged.start("kept", save_total_limit=100)
    few = judged.start("few", save_total_limit=1)
    assert few.events("chosen") == kept.events("chosen")
    loss_best = f"step-{few.record[-1]['best_step']:06d}"
    assert set(few.checkpoints) <= {few.events("chosen")[0]["checkpoint"], loss_best, "step-000012"}


@pytest.mark.parametrize("measurement", [1, 3, 6, 7])
def test_killed_while_it_scores_and_resumed(measurement: int, judged: "Runner", before: Any) -> None:
    from run.conftest import Killed

    whole = judged.start("whole")
    assert len(whole.events("scored")) >= 7
    calls = iter(range(1, 100))

    def die() -> None:
        if next(calls) == measurement:
            raise Killed

    before[0] = die
    with pytest.raises(Killed):
        judged.start("killed")
    before[0] = lambda: None
    resumed = judged.resume("killed")
    resumed.assert_equals(whole)
    assert resumed.checkpoints == whole.checkpoints
    assert (resumed.root / "best.json").read_bytes() == (whole.root / "best.json").read_bytes()
    # Done is done: nothing is measured again.
    before[0] = die_at_once
    judged.resume("killed").assert_equals(whole)


def die_at_once() -> None:
    raise AssertionError("measured again")


@pytest.mark.parametrize("measurement", [2, 6, 7])
def test_stopped_while_it_scores_and_resumed(measurement: int, judged: "Runner", before: Any) -> None:
    whole = judged.start("whole")
    calls = iter(range(1, 100))

    def press() -> None:
        if next(calls) == measurement:
            signal.raise_signal(signal.SIGINT)

    before[0] = press
    stopped = judged.start("stopped")
    assert stopped.record[-1]["reason"] == "interrupted"
    assert len(stopped.events("scored")) == measurement - 1
    resumed = judged.resume("stopped")
    resumed.assert_equals(whole)


def test_a_resume_from_an_earlier_checkpoint_forgets_later_scores(judged: "Runner") -> None:
    whole = judged.start("run", save_total_limit=100)
    onecard.resume(whole.root / "checkpoints" / "step-000006")
    again = judged.outcome("run")
    again.assert_equals(whole)


def test_an_adapter_and_its_earlier_checkpoints_are_scored(
    tuner: Any, before: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tasks, "make_task", lambda name, s, report=None: LettersTask(s, report, lambda: None))
    settings = JUDGED | {"eval_fraction": 0.0}
    outcome = tuner("llama", method="lora", learning_rate=2e-2).start("run", **settings)
    (chosen,) = outcome.events("chosen")
    wholes = {event["checkpoint"]: event["scores"] for event in outcome.events("scored") if event["is_whole"]}
    assert chosen["checkpoint"] in wholes
    # Each finalist's weights were put into the model: where all items are scored at once, none has to be.
    at_once = tuner("llama", method="lora", learning_rate=2e-2).start("once", **settings | {"eval_limit": 1000})
    parts = {event["checkpoint"]: event["scores"] for event in at_once.events("scored")}
    assert all(scores == parts[name] for name, scores in wholes.items())
    assert len(wholes) > 1
    assert RunFolder.open(outcome.root).find_checkpoint("best").name == chosen["checkpoint"]
    lines = (outcome.root / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["protocol"]["adapter"] for line in lines} == {"attached"}


def test_a_finalist_that_is_damaged_is_left_out(judged: "Runner") -> None:
    whole = judged.start("whole")
    (chosen,) = whole.events("chosen")
    damaged, *others = chosen["finalists"]
    assert others

    def damage(event: Event) -> None:
        if event.event == "scored" and event.step == 12 and not event.is_whole:
            path = judged.folder / "damaged" / "checkpoints" / damaged / "model.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    outcome = judged.start("damaged", on_event=damage, save_total_limit=100)
    (chosen,) = outcome.events("chosen")
    assert chosen["finalists"] == others
    (finding,) = outcome.events("finding")
    assert finding["id"] == "finalist-damaged"
    assert finding["evidence"].startswith(f"{damaged}, which led by ifeval: ")
    assert "model.safetensors has other content" in finding["evidence"]
    # Nor is it in the way of a run that is done.
    before = outcome.record
    assert judged.resume("damaged").record == before


def test_what_is_missing_is_said_before_training(runner: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecard.evaluation.ifeval.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"(?s)onecard\[eval\].*--eval_tasks none"):
        runner.start("run", eval_tasks="ifeval", ifeval_data=str(runner.text))
    assert not (runner.folder / "run").exists()
    with pytest.raises(InputError, match=r"eval_limit 5 has no effect: it needs eval_tasks"):
        runner.start("run", eval_limit=5)
    with pytest.raises(InputError, match=r"metric_for_best_model 'ifeval' is not measured: use auto, loss"):
        runner.start("run", metric_for_best_model="ifeval")


def test_scores_that_a_full_disk_refuses_do_not_end_a_run(judged: "Runner", monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told, known to the run all the same, and written down once there is room."""
    whole = judged.start("whole")
    is_full, plain = [True], {name: getattr(judge, name) for name in ("record_scores", "write_mark")}

    def refusing(name: str) -> Callable[..., None]:
        def write(*arguments: Any) -> None:
            if is_full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            plain[name](*arguments)

        return write

    def free_some(event: Event) -> None:
        is_full[0] = event.step < 9

    for name in plain:
        monkeypatch.setattr(judge, name, refusing(name))
    found = judged.start("full", on_event=free_some)
    told = [event for event in found.findings if event["id"] == "score-not-written"]
    assert {event["step"] for event in told} == {2, 4, 6, 8}
    assert "step-000002 by ifeval: [Errno 28] No space left on device" in told[0]["evidence"]
    assert found.record == whole.record
    lines = [(outcome.root / "scores.jsonl").read_text(encoding="utf-8").splitlines() for outcome in (found, whole)]
    scores = [[(row["step"], row["n"], row["value"]) for row in map(json.loads, rows)] for rows in lines]
    assert scores[0] == scores[1]
    names = [sorted(path.name for path in (root / "evaluations").iterdir()) for root in (found.root, whole.root)]
    assert names[0] == names[1]
    marked = [json.loads((root / "best.json").read_text(encoding="utf-8")) for root in (found.root, whole.root)]
    assert marked[0]["step"] == marked[1]["step"]
