import dataclasses
import io
import math
import re
import time

import pytest

from onecard.observe import ConsoleSink
from onecard.observe.prose import list_findings
from onecard.spec import Plan, SchedulePlan


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def plan() -> Plan:
    """The part of a plan that the console reads."""
    schedule = SchedulePlan(name="wsd", num_steps=40, num_warmup_steps=0, num_decay_steps=0, min_lr_ratio=0.0)
    return Plan.model_construct(schedule=schedule, max_hours=None)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def plain_lines(plan: Plan, events, **settings) -> list[str]:
    stream = io.StringIO()
    sink = ConsoleSink(plan, stream=stream, **settings)
    for event in events:
        sink.receive(event)
    sink.close()
    return stream.getvalue().splitlines()


def test_elsewhere_than_in_a_terminal_there_is_a_line_every_few_steps(plan, step_event) -> None:
    lines = plain_lines(plan, [step_event(step) for step in range(1, 41)], logging_steps=10)
    assert lines[1] == "step 10/40  loss 2.5000  lr 3.0e-03  2.00K tokens/s  0:15 left"
    assert [line.split()[1] for line in lines] == ["1/40", "10/40", "20/40", "30/40", "40/40"]


def test_a_known_share_of_the_peak_is_shown(plan, step_event) -> None:
    assert "2.00K tokens/s (41% of peak)" in plain_lines(plan, [step_event(1, share_of_peak=0.41)])[0]


def test_refused_updates_are_not_hidden(plan, step_event) -> None:
    assert "1 not finite, skipped" in plain_lines(plan, [step_event(1, is_finite=False)])[0]


def test_every_other_event_has_its_lines(plan, evaluated, sampled, saved, finding, finished) -> None:
    assert plain_lines(plan, [evaluated, sampled, saved, finding, finished]) == [
        "step 20  held-out loss 1.7500 +/- 0.0125  1.2500 bits per byte  best so far",
        "step 20  samples",
        "  def [bold]add(a, b):",
        "      return a  # [/bold]",
        "  你好，世界",
        "step 20  saved step-20 (best, 3.0 MiB, 0.1 s)",
        "step 20  a fifth of the time goes into waiting for data",
        "  evidence: wait_s is 0.1 of 0.5",
        "  likely cause: one worker cannot keep up",
        "  remedy: dataloader_num_workers: 4",
        "completed: 40 steps, 40.0K tokens in 1:05, 2.00K tokens/s",
        "best held-out loss 1.7500 at step 20",
        "found:",
        "  step 20  a fifth of the time goes into waiting for data",
    ]


def test_findings_of_the_catalogue_are_named_at_the_end(plan, finding, finished) -> None:
    named = dataclasses.replace(finding, id="starved-by-data")
    *_, last = plain_lines(plan, [named, dataclasses.replace(named, id="on-battery"), finished])
    assert last == "  more: docs/troubleshooting.md, starved-by-data, on-battery"


def test_a_run_that_recovered_says_from_what(plan, recovered, step_event) -> None:
    assert plain_lines(plan, [recovered]) == [
        "step 2  out of memory (step): repeated with micro_batch_size 4 -> 2",
        "  evidence: CUDA out of memory. Tried to allocate 1.50 GiB",
        "  memory: tensors 3.0 GiB, weights 512.0 MiB",
    ]
    back = dataclasses.replace(recovered, step=1, returned_from=9, held_bytes={})
    lines = plain_lines(plan, [step_event(9, loss=math.nan), back, step_event(10, loss=2.0)])
    assert lines[1] == "step 1  out of memory (step) at step 9: repeated with micro_batch_size 4 -> 2"
    assert "loss 2.0000" in lines[-1]


def test_scores_have_their_lines(plan, scored, chosen) -> None:
    assert plain_lines(plan, [scored, chosen]) == [
        "step 20  step-20  ifeval, 64 items: strict 0.2500 +/- 0.0625  (1:15)  best so far",
        "step 40  best by ifeval: step-20 of 2 (strict 0.2500 +/- 0.0186, 541 items); not to be told from it: step-40",
    ]


def test_a_run_that_stopped_early_says_where(plan, finished) -> None:
    stopped = dataclasses.replace(finished, step=17, num_steps=40, reason="interrupted", best_loss=None)
    assert plain_lines(plan, [stopped]) == ["interrupted: step 17 of 40, 40.0K tokens in 1:05, 2.00K tokens/s"]


def test_long_lines_stay_whole_in_a_log(plan, finding) -> None:
    long = dataclasses.replace(finding, evidence="many words " * 50)
    assert len(plain_lines(plan, [long])) == 4


def test_what_the_model_writes_cannot_steer_the_terminal(plan, sampled, terminal) -> None:
    sample = dataclasses.replace(sampled.samples[0], completion="\x1b[2J\x07ok")
    sink = ConsoleSink(plan, stream=terminal)
    sink.receive(dataclasses.replace(sampled, samples=(sample,)))
    sink.close()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "?[2J?ok" in without_escapes(terminal.getvalue())


def test_prompts_are_dimmed_and_completions_not(plan, sampled, terminal) -> None:
    sink = ConsoleSink(plan, stream=terminal)
    sink.receive(sampled)
    sink.close()
    assert "\x1b[2m  你好\x1b[0m，世界" in terminal.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_with_a_code_page_shows_question_marks(plan, sampled, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    sink = ConsoleSink(plan, stream=stream)
    sink.receive(sampled)
    sink.close()
    assert stream.buffer.getvalue().decode(encoding).splitlines()[-1] == "  ?????"


@pytest.mark.parametrize(
    ("columns", "shown", "hidden"),
    [
        (80, ["12/40", "━", "loss 2.5000", "2.00K tokens/s (41% of peak)", "0:14 left"], []),
        (64, ["12/40", "━", "loss 2.5000", "2.00K tokens/s", "0:14 left"], ["peak"]),
        (40, ["12/40", "loss 2.5000", "0:14 left"], ["━", "tokens"]),
    ],
)
def test_the_bar_fits_the_terminal(plan, step_event, terminal, monkeypatch, columns, shown, hidden) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("onecard.observe.console._REDRAW_INTERVAL_S", 0.0)
    sink = ConsoleSink(plan, stream=terminal)
    for step in range(1, 13):
        sink.receive(step_event(step, share_of_peak=0.41))
    sink.close()
    bar = [line for line in re.split(r"[\r\n]", without_escapes(terminal.getvalue())) if "12/40" in line][-1]
    assert len(bar) <= columns
    assert [text for text in shown if text not in bar] == []
    assert [text for text in hidden if text in bar] == []


def test_only_events_draw(plan, step_event, terminal) -> None:
    # A thread that draws by itself would take the interpreter from the training loop.
    sink = ConsoleSink(plan, stream=terminal)
    sink.receive(step_event(1))
    size = len(terminal.getvalue())
    time.sleep(0.3)
    assert len(terminal.getvalue()) == size
    sink.close()


def test_close_gives_the_cursor_back(plan, step_event, terminal) -> None:
    sink = ConsoleSink(plan, stream=terminal)
    sink.receive(step_event(1))
    assert terminal.getvalue().count("\x1b[?25l") == 1
    sink.close()
    sink.close()
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_a_fast_run_is_not_slowed_by_watching_it(plan, step_event, terminal) -> None:
    # The bound is 0.2 ms per step; redrawing at every step would take twice that.
    events = [step_event(step) for step in range(1, 2001)]
    sink = ConsoleSink(plan, stream=terminal)
    started = time.process_time()
    for event in events:
        sink.receive(event)
    assert (time.process_time() - started) / len(events) < 0.2e-3
    sink.close()


def test_the_pages_of_findings_are_named_once(finding) -> None:
    twice = [dataclasses.replace(finding, id="update-refused", step=step) for step in (3, 9)]
    lines = list_findings([*twice, finding])
    assert lines[-1] == "  more: docs/troubleshooting.md, update-refused"
    assert len(lines) == 1 + 3 + 1
