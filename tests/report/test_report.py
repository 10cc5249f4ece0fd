"""The report of a run is one page that tells all of its record and needs nothing else."""

import ast
import dataclasses
import itertools
import math
import random
import re
import string
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import onecard.report
from onecard.observe.detectors import as_event, entries, make_finding
from onecard.observe.events import (
    EvaluatedEvent,
    FindingEvent,
    RecoveredEvent,
    Sample,
    SampledEvent,
    SavedEvent,
    ScoredEvent,
    StepEvent,
)
from onecard.observe.lines import to_json_line
from onecard.report.differences import GROUPS
from onecard.report.record import RunRecord, read_runs
from onecard.report.scale import Scale, round_values
from onecard.report.spending import time_of
from onecard.report.thin import thin
from onecard.report.words import _CHINESE, Say
from onecard.report.write import render_report, write_report

SOURCES = Path(onecard.report.__file__).parent
_VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page: refuses tags that are not closed, keeps attributes and the text that people see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def read(root: Path) -> RunRecord:
    return read_runs([root])[0]


def step_event(step: int, **changes: Any) -> StepEvent:
    values: dict[str, Any] = {
        "step": step,
        "elapsed_s": step * 0.5,
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "num_target_tokens": 8,
        "tokens_seen": 8 * step,
        "is_finite": True,
        "step_s": 0.5,
        "tokens_per_s": 16.0,
        "wait_s": 0.1,
    }
    return StepEvent(**values | changes)


def append(root: Path, *events: Any) -> None:
    with (root / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{to_json_line(event)}\n" for event in events)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_needs_nothing_but_itself(write_run: Callable[..., Path], language: Any) -> None:
    page = Page(render_report(read(write_run("a", [3.0, 2.5])), language))
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href", "srcset", "onload", "onclick")]
    style = (SOURCES / "report.css").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style
    assert ("lang", "zh-CN" if language == "zh" else "en") in page.attributes


def test_the_page_tells_losses_steps_and_settings(write_run: Callable[..., Path]) -> None:
    root = write_run("tidy-run", [3.0, 2.5], learning_rate=1.25e-3)
    text = Page(render_report(read(root), "en")).text
    for told in ("tidy-run", "completed", "2.5000 ± 0.0100", "of 20", "0.00125", "Nothing was found", "Training text"):
        assert told in text, told


def test_what_a_model_wrote_is_text_and_no_page(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0, 2.5])
    sample = Sample(prompt="<b>你好</b>", completion="</div><script>alert(1)</script>\x1b[31m\x00")
    append(root, SampledEvent(step=20, elapsed_s=1.0, samples=(sample,), seconds=0.1))
    html = render_report(read(root), "en")
    assert "<script>alert" not in html
    assert not re.search("[\x00-\x08\x0e-\x1f]", html)
    text = Page(html).text
    assert "<b>你好</b>" in text
    assert "</div><script>alert(1)</script>\ufffd[31m\ufffd" in text


def test_findings_come_with_evidence_and_remedy_and_those_that_stop_come_first(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    for step, symptom, stops in ((3, "slow", False), (5, "slow", False), (9, "lost", True)):
        parts = {"evidence": f"seen {step}", "likely_cause": "why <that>", "remedy": "set x: 1"}
        append(root, FindingEvent(step=step, elapsed_s=1.0, symptom=symptom, stops_run=stops, **parts))
    text = " ".join(Page(render_report(read(root), "en")).text.split())
    assert text.index("lost") < text.index("slow")
    assert "2 times, from step 3 to 5" in text
    assert "seen 5" in text
    assert "why <that>" in text


def test_findings_are_told_in_the_language_of_the_page(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    finding = make_finding("starved-by-data", "40% of the time", "dataloader_num_workers: 2", effect="0.3 s a step")
    append(root, as_event(finding, 3, 1.0))
    append(root, dataclasses.replace(as_event(finding, 4, 1.0), id="of-another-version", symptom="something new"))
    chinese, english = entries()["starved-by-data"].texts["zh"], entries()["starved-by-data"].texts["en"]
    text = Page(render_report(read(root), "zh")).text
    for told in (chinese.symptom, chinese.cause, "40% of the time", "something new"):
        assert told in text, told
    assert f"{chinese.remedy}：dataloader_num_workers: 2（0.3 s a step）" in text
    assert english.symptom not in text
    assert english.symptom in Page(render_report(read(root), "en")).text


def test_what_a_run_got_over_is_told(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    parts = {"problem": "out of memory", "during": "step", "evidence": "full", "elapsed_s": 1.0}
    for step in (3, 7):
        append(root, RecoveredEvent(step=step, remedy="repeated with micro_batch_size 8 -> 4", **parts))
    append(root, RecoveredEvent(step=2, remedy="back to step 2", returned_from=9, **parts | {"problem": "not finite"}))
    text = Page(render_report(read(root), "en")).text
    assert "out of memory (step), 2 times, from step 3 to 7: repeated with micro_batch_size 8 -> 4" in text
    assert "not finite (step), at step 9: back to step 2" in text
    assert "Nothing was found" not in text
    assert "内存或显存不足（训练步）" in Page(render_report(read(root), "zh")).text


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kept", ["none", "one", "not finite", "one evaluation"])
def test_a_run_that_has_hardly_begun_has_a_report(write_run: Callable[..., Path], kept: str, language: Any) -> None:
    root = write_run("a", [])
    nan = {"loss": math.nan, "grad_norm": math.nan, "is_finite": False}
    evaluated = {"bits_per_byte": None, "standard_error": math.nan, "num_target_tokens": 1, "is_best": False}
    events = {
        "none": [],
        "one": [step_event(1)],
        "not finite": [step_event(step, **nan) for step in range(1, 30)],
        "one evaluation": [EvaluatedEvent(step=0, elapsed_s=0.0, loss=3.0, seconds=0.1, **evaluated)],
    }[kept]
    append(root, *events)
    html = render_report(read(root), language)
    Page(html)
    assert "nan" not in re.findall(r'points="([^"]*)"', html)


def test_a_long_run_stays_a_small_file_and_keeps_its_extremes(write_run: Callable[..., Path]) -> None:
    run = read(write_run("a", [3.0]))
    steps = [
        step_event(step, loss=2.0 + math.sin(step), grad_norm=50.0 if step == 7777 else 0.5) for step in range(1, 20001)
    ]
    samples = tuple(Sample(prompt=f"{index}", completion="x" * 9000) for index in range(30))
    sampled = [SampledEvent(step=step, elapsed_s=1.0, samples=samples, seconds=0.1) for step in range(0, 20000, 400)]
    html = render_report(dataclasses.replace(run, events=(*steps, *sampled)), "en")
    assert len(html.encode()) < 1_000_000
    assert "8 of 30 prompts are shown" in html
    # The one high norm decides the scale of its chart.
    tops = [float(frame.split()[6]) for frame in re.findall(r'data-frame="([^"]*)"', html)]
    assert any(top > 50 for top in tops)


def test_bins_hold_every_value_between_their_edges() -> None:
    chance = random.Random(3)
    for count in (1, 59, 60, 61, 999, 12345):
        points = [(float(x), chance.gauss(0, 1)) for x in range(count)]
        found = thin(points)
        assert len(found.mean) <= 210
        starts = [-1.0, *(x for x, _ in found.mean)]
        for index, (end, low, high) in enumerate(found.band):
            inside = [y for x, y in points if starts[index] < x <= end]
            assert (min(inside), max(inside)) == (low, high)
            assert low <= found.mean[index][1] <= high
        weights = [len([1 for x, _ in points if a < x <= b]) for a, b in itertools.pairwise(starts)]
        total = sum(weight * mean for weight, (_, mean) in zip(weights, found.mean, strict=True))
        assert total == pytest.approx(sum(y for _, y in points))


def test_values_that_are_not_finite_become_gaps() -> None:
    found = thin([(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 4.0)])
    assert (found.mean, found.gaps) == (((1.0, 2.0), (4.0, 4.0)), (2.0, 3.0))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-7, 3e-7), (-5, 1e6), (2.999, 3.001), (0, 7e30)])
def test_ticks_lie_within_the_scale_and_are_few(low: float, high: float) -> None:
    values = round_values(low, high, 4)
    assert 2 <= len(values) <= 9
    assert all(low - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low) for value in values)
    scale = Scale(low, high, 100, 0)
    places = [scale.place(value) for value in values]
    assert places == sorted(places, reverse=True)


def test_shares_of_time_add_up_to_the_run(write_run: Callable[..., Path]) -> None:
    run = read(write_run("a", [3.0, 2.5]))
    scored = ScoredEvent(
        step=20,
        elapsed_s=10.0,
        checkpoint="step-000020",
        task="t",
        metric="m",
        scores={"m": 0.5},
        standard_error=0.1,
        n=4,
        is_whole=False,
        is_best=True,
        seconds=5.0,
    )
    steps = [step_event(step, step_s=4.5 if step == 1 else 0.5) for step in range(1, 20)]
    found = time_of(dataclasses.replace(run, events=(*steps, scored)), Say("en"))
    assert found is not None
    amounts = {name: amount for _, name, amount, _ in found.rows}
    assert amounts["first step: compiling, warming up"] == "4.0 s"
    assert amounts["waiting for data"] == "1.9 s"
    assert amounts["training"] == "7.6 s"
    assert amounts["scoring checkpoints"] == "5.0 s"
    assert sum(float(share.rstrip("%")) for *_, share in found.rows) == pytest.approx(100, abs=0.3)


def test_saving_in_the_background_takes_as_long_as_training_stood_still(write_run: Callable[..., Path]) -> None:
    run = read(write_run("a", [3.0]))
    steps = [step_event(step, wait_s=0.0) for step in range(1, 21)]
    saved = {"elapsed_s": 9.9, "checkpoint": "c", "reason": "clock", "num_bytes": 1}
    events = [*steps, SavedEvent(step=9, seconds=9.0, wait_s=1.5, **saved), SavedEvent(step=20, seconds=2.0, **saved)]
    found = time_of(dataclasses.replace(run, events=tuple(events)), Say("en"))
    assert found is not None
    # The second is from before waiting was counted: nothing went on meanwhile.
    assert {name: amount for _, name, amount, _ in found.rows}["saving"] == "3.5 s"


def test_paths_of_the_machine_stay_on_it(write_run: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "my-stories.txt"
    text.write_text("x", encoding="utf-8")
    root = write_run("a", [3.0], recipe={"dataset": str(text), "tokenizer": str(tmp_path)})
    html = render_report(read(root), "en")
    assert "my-stories.txt" in html
    assert str(tmp_path) not in html


def test_a_report_replaces_the_one_before_and_leaves_nothing_else(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    before = {path.name for path in root.iterdir()}
    write_report(read(root), "en")
    path = write_report(read(root), "zh")
    assert {entry.name for entry in root.iterdir()} - before == {"report.html"}
    assert "如何复现" in path.read_text(encoding="utf-8")


def test_every_sentence_is_there_in_chinese_with_the_same_values() -> None:
    said = {text for path in SOURCES.glob("*.py") for text in _said_in(path)}
    template = (SOURCES / "report.html.jinja").read_text(encoding="utf-8")
    said |= set(re.findall(r'say\("([^"]+)"', template))
    assert len(said) > 80
    assert not said - set(_CHINESE)
    for english, chinese in _CHINESE.items():
        assert _values_in(english) == _values_in(chinese), english


def test_what_a_plan_or_a_record_calls_something_is_there_in_chinese() -> None:
    say, planner = Say("zh"), SOURCES.parent / "planner"
    assert all(not say.term(group, "settings").isascii() for group in GROUPS)
    assert (say.term("batch", "settings"), say.term("batch")) == ("批次", "批数据")
    assert (say.term("optimizer", "settings"), say.term("optimizer")) == ("优化器", "优化器状态")
    assert Say("en").term("batch", "settings") == "batch"
    kinds = {"step", "steps", "update", "evaluation", "samples", "checkpoint"}
    assert all(not say.term(kind, "during").isascii() for kind in kinds)
    parts = set(re.findall(r'breakdown\["([^"]+)"\] =', (planner / "on_cpu.py").read_text(encoding="utf-8")))
    assert parts > {"malloc"}
    assert all(not say.term(part).isascii() for part in parts)


def _values_in(text: str) -> set[str]:
    return {part[1] for part in string.Formatter().parse(text) if part[1]}


def _said_in(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "say"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    ]
