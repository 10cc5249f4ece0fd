"""`onecard evaluate` shows scores as a table, and says how sure the best is."""

import json
from collections.abc import Callable
from typing import Any

import pytest

import onecard.api
from onecard.cli.evaluation_text import print_evaluation
from onecard.spec import CheckpointScores, Comparison, Evaluation, Score


def row(step: int, **values: float) -> CheckpointScores:
    scores = (Score(name=name, value=value, standard_error=0.02, n=541, protocol={}) for name, value in values.items())
    return CheckpointScores(name=f"step-{step:06d}", step=step, scores=tuple(scores))


def comparison(score: str, best: int, other: int, gain: float, p_value: float) -> Comparison:
    return Comparison(
        score=score,
        best=f"step-{best:06d}",
        other=f"step-{other:06d}",
        gain=gain,
        standard_error=0.011,
        p_value=p_value,
        corrected_p_value=min(1.0, 2 * p_value),
        num_comparisons=2,
        test="sign test",
        n=541,
    )


ACCURACY = "prompt_level_strict_acc"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of `api.evaluate`, which answers with three checkpoints."""
    evaluation = Evaluation(
        checkpoints=tuple(
            row(step, loss=loss, **{ACCURACY: accuracy})
            for step, loss, accuracy in ((40, 2.0, 0.2), (80, 1.5, 0.281), (120, 1.6, 0.25))
        ),
        best={"loss": "step-000080", ACCURACY: "step-000080"},
        comparisons=(
            comparison("loss", 80, 40, 0.5, 1e-9),
            comparison("loss", 80, 120, 0.1, 0.2),
            comparison(ACCURACY, 80, 40, 0.081, 0.4),
            comparison(ACCURACY, 80, 120, 0.031, 0.01),
        ),
        notes=(*(f"step-{step:06d}: few positions" for step in (40, 80, 120)), "step-000040: it never stops"),
    )
    found: list[dict[str, Any]] = []

    def evaluate(run: Any, tasks: Any, **settings: Any) -> Evaluation:
        found.append({"run": run, "tasks": tasks} | settings)
        return evaluation

    monkeypatch.setattr(onecard.api, "evaluate", evaluate)
    return found


def test_the_best_is_marked_and_told_from_the_others(run: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    assert run("evaluate", "runs/a").stdout.splitlines() == [
        "             loss             prompt_level_strict_acc",
        "step-000040  2.0000 ± 0.0200  20.0% ± 2.0",
        "step-000080  1.5000 ± 0.0200  28.1% ± 2.0              best loss, prompt_level_strict_acc",
        "step-000120  1.6000 ± 0.0200  25.0% ± 2.0",
        "",
        "loss: step-000080 is better than, but not to be told from, the last, step-000120, by 0.1000 ± 0.0110, "
        "p = 0.4 after 2 looks (p = 0.2 for one), sign test over 541 held-out blocks.",
        "prompt_level_strict_acc: step-000080 beats the last, step-000120, by 3.1 ± 1.1 points, "
        "p = 0.02 after 2 looks (p = 0.01 for one), sign test over 541 prompts.",
        "  Not to be told from the best by these items: step-000040.",
        "note: few positions",
        "step-000040: it never stops",
    ]


def test_flags_reach_the_function(run: Callable[..., Any], calls: list[dict[str, Any]]) -> None:
    words = "--tasks loss,ifeval --checkpoints 40,80 --limit 7 --ifeval_data f.jsonl --max_new_tokens 9 --batch_size 2"
    document = json.loads(run("evaluate", "runs/a", *words.split(), "--device", "cpu", "--json").stdout)
    assert Evaluation.model_validate(document).best[ACCURACY] == "step-000080"
    (asked,) = calls
    assert (asked["run"], asked["tasks"], str(asked["ifeval_data"])) == ("runs/a", ["loss", "ifeval"], "f.jsonl")
    settings = {name: asked[name] for name in ("checkpoints", "limit", "max_new_tokens", "batch_size", "device")}
    assert settings == {"checkpoints": "40,80", "limit": 7, "max_new_tokens": 9, "batch_size": 2, "device": "cpu"}


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "give a run folder or a model folder"), (("r", "--responses", "f.jsonl"), "leave one out")],
)
def test_a_model_or_responses(run: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    done = run("evaluate", *words)
    assert done.code == 2
    assert message in done.stderr


def test_equals_are_not_called_better(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tuple(row(step, **{ACCURACY: value}) for step, value in ((40, 0.25), (80, 0.1), (120, 0.25)))
    others = comparison(ACCURACY, 40, 80, 0.15, 0.001), comparison(ACCURACY, 40, 120, 0.0, 1.0)
    print_evaluation(Evaluation(checkpoints=rows, best={ACCURACY: "step-000040"}, comparisons=others))
    shown = capsys.readouterr().out
    assert "step-000040 and step-000120 are equally good over 541 prompts; the first counts as best." in shown
    assert [line.endswith(f"best {ACCURACY} (tie)") for line in shown.splitlines()[1:4]] == [True, False, True]
    assert "better" not in shown


def test_a_tie_that_the_last_has_no_part_in(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tuple(row(step, **{ACCURACY: value}) for step, value in ((40, 0.25), (80, 0.25), (120, 0.1)))
    others = comparison(ACCURACY, 40, 80, 0.0, 1.0), comparison(ACCURACY, 40, 120, 0.15, 0.001)
    print_evaluation(Evaluation(checkpoints=rows, best={ACCURACY: "step-000040"}, comparisons=others))
    shown = capsys.readouterr().out
    assert "step-000040 and step-000080 are equally good" in shown
    assert "step-000040 beats the last, step-000120" in shown
    assert "Not to be told" not in shown
