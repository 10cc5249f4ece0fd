"""Real runs with a disease, each found by its name; and healthy ones of many kinds, in which nothing is found."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sick_runs import DISEASES, HEALTHY, MACHINE, NEEDS_BITSANDBYTES, ONLY_LASTING, Findings, Kind, Place, pairs, run

import onecard
from onecard.errors import DivergedError
from onecard.observe.detectors import entries

if TYPE_CHECKING:
    from run.conftest import Runner

QUIET: dict[str, Any] = {"sample_steps": 0, "save_steps": 0, "eval_steps": 20, "save_total_limit": None}
QUIET |= {"optim": "adamw", "learning_rate": 3e-3, "dropout": 0.0, "max_steps": 80}


def test_each_finding_of_a_run_has_a_real_run_that_has_it() -> None:
    # A slow rank needs several processes: tests/run/test_lost_ranks.py.
    named = set().union(*(kind.finds for kind in DISEASES.values())) | {"slow-rank"}
    assert named == {entry.id for entry in entries().values() if entry.has_detector}


@pytest.mark.parametrize("name", DISEASES)
def test_a_disease_is_found_in_a_real_run_and_told_in_its_report(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = DISEASES[name]
    found = run(kind, place, monkeypatch)
    # A machine that stands still for half a minute, in the middle of a test, is rightly found to be slow.
    assert kind.finds <= set(found) <= kind.finds | kind.may_find | MACHINE
    told = " ".join(f"{found[id].evidence} {found[id].remedy}" for id in kind.finds)
    for words in kind.says:
        assert words in told
    # What to set, and what to expect of it.
    assert all(found[id].remedy.endswith(")") for id in kind.finds)
    pages = {lang: onecard.write_report(place.folder / "run", lang=lang).read_text("utf-8") for lang in ("en", "zh")}
    for id in kind.finds:
        assert entries()[id].texts["en"].cause.split(",")[0][:20] in pages["en"].replace("&#39;", "'")
        assert entries()[id].texts["zh"].cause[:10] in pages["zh"]
        # A run of English words would be a phrase that was not translated.
        _, evidence, remedy = _section(pages["zh"], entries()[id].texts["zh"].symptom)
        for text in (evidence, remedy):
            assert not re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", re.sub(r"`.*?`|\(.*?\)", "", text)), text


def _section(page: str, symptom: str) -> tuple[str, str, str]:
    """Symptom, evidence and remedy of a finding, as a page shows them."""
    text = page[page.index(symptom[:12]) :]
    terms = dict(re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", text[: text.index("</dl>")], re.DOTALL))
    return symptom, terms["证据"], terms["解决办法"]


def test_a_run_that_diverges_is_stopped(runner: "Runner") -> None:
    with pytest.raises(DivergedError, match=r"the loss runs away: .*start a new run") as caught:
        runner.start("run", **QUIET | {"learning_rate": 5.0, "max_grad_norm": None})
    outcome = runner.outcome("run")
    finding, *_, finished = outcome.record[-3:]
    assert finding["remedy"] in str(caught.value)
    assert (outcome.root / "report.html").exists()
    assert (finished["event"], finished["reason"]) == ("finished", "diverged")
    assert finished["step"] < 100
    assert finding["step"] <= finished["step"]


def test_a_run_that_diverged_stays_stopped(runner: "Runner", caplog: pytest.LogCaptureFixture) -> None:
    """Also where it was killed after its last checkpoint, which knows of the finding, and before its end."""
    sick = QUIET | {"learning_rate": 5.0, "max_grad_norm": None}
    with pytest.raises(DivergedError) as caught:
        runner.start("whole", **sick)
    whole = runner.outcome("whole")
    (finding,) = (finding for finding in whole.findings if finding["stops_run"])
    runner.kill("killed", after_events=len(whole.record) - 1, **sick)
    assert not runner.outcome("killed").events("finished")
    for _ in range(2):
        with pytest.raises(DivergedError) as again:
            runner.resume("killed")
        assert str(again.value) == str(caught.value)
        assert runner.outcome("killed").record[-1] == whole.record[-1]
    assert runner.outcome("killed").checkpoints == whole.checkpoints
    assert f"at step {finding['step']} the run was stopped: the loss runs away" in caplog.text


def test_weights_that_have_no_part_in_the_result_stop_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(DISEASES["adapters without a part"], place, monkeypatch)
    assert found["nothing-trains"].stops_run


def test_a_loss_that_comes_back_from_the_shock_of_its_rate_has_not_fallen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(DISEASES["a rate too high"], place, monkeypatch)["rate-too-high"]
    numbers = re.search(
        r"mean loss (.*?) in the first 20 steps, (.*?) in the last .*; it began at (.*?);", found.evidence
    )
    assert numbers is not None
    first, last, began = map(float, numbers.groups())
    assert began < last < first


def test_a_findings_place_is_the_same_after_a_resume(runner: "Runner", cache: Path) -> None:
    sick = QUIET | {"learning_rate": 1e-9, "save_steps": 15}
    whole = runner.start("whole", **sick)
    assert [event["id"] for event in whole.events("finding")] == ["rate-too-low"]
    runner.kill("killed", after_events=70, **sick)
    runner.resume("killed").assert_equals(whole)


@pytest.mark.parametrize("name", [name for name in HEALTHY if name not in ONLY_LASTING])
def test_healthy_runs_have_no_finding(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert set(run(HEALTHY[name], place, monkeypatch)) <= MACHINE


def test_the_same_letters_are_learned_at_a_usual_rate(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = DISEASES["a rate too high"]
    assert run(Kind({**kind.changes, "learning_rate": 3e-3}, text=pairs), place, monkeypatch) == {}


def test_chats_learned_by_heart_are_said_to_be(tuner: "Callable[..., Runner]") -> None:
    heard = Findings()
    tuner("llama", learning_rate=1e-3, max_steps=60).start("run", on_event=heard)
    assert list(heard.by_id) == ["data-repeated"]


def test_a_healthy_run_that_is_resumed_has_no_finding(runner: "Runner") -> None:
    runner.kill("run", after_events=50, **QUIET | {"save_steps": 20})
    heard = Findings()
    outcome = runner.resume("run", on_event=heard)
    assert heard.by_id == {}
    assert not outcome.events("finding")
