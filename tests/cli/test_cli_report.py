"""`onecard report`, `monitor` and `doctor`, as people call them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import onecard.api
from onecard.cli.monitor_text import card_text, frame_lines, sparkline
from onecard.diagnose.check import Check
from onecard.observe.events import DeviceEvent, RecoveredEvent
from onecard.observe.lines import to_json_line
from onecard.report.live import Follower
from onecard.report.record import read_runs
from onecard.report.write import write_report
from onecard.units import GIB


def test_a_report_is_written_into_the_run_and_named(run: Callable[..., Any], write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0, 2.0])
    done = run("report", str(root), "--lang", "zh")
    assert (done.code, done.stdout.strip()) == (0, str(root / "report.html"))
    assert 'lang="zh-CN"' in (root / "report.html").read_text(encoding="utf-8")
    assert json.loads(run("report", str(root), "--json").stdout) == {"report": str(root / "report.html")}


def test_latest_is_the_run_written_to_last(
    run: Callable[..., Any], write_run: Callable[..., Path], monkeypatch
) -> None:
    root = write_run("a", [3.0])
    monkeypatch.chdir(root.parent.parent)
    assert run("report", "latest").code == 0
    assert (root / "report.html").exists()


@pytest.mark.parametrize("words", [["report", "gone"], ["report", "a", "--lang", "fr"], ["monitor", "gone"]])
def test_mistakes_are_told_without_a_traceback(
    run: Callable[..., Any], write_run: Callable[..., Path], monkeypatch, words: list[str]
) -> None:
    monkeypatch.chdir(write_run("a", [3.0]).parent)
    done = run(*words)
    assert done.code == 2
    assert "fr" in done.stderr or "gone" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_in_the_place_of_a_report_is_named_and_nothing_is_left(
    run: Callable[..., Any], write_run: Callable[..., Path]
) -> None:
    root = write_run("a", [3.0])
    (root / "report.html").mkdir()
    before = sorted(root.iterdir())
    done = run("report", str(root))
    assert done.code == 2
    assert "report.html is a folder" in done.stderr
    assert "move or rename it" in done.stderr
    assert sorted(root.iterdir()) == before


def test_a_report_that_cannot_take_its_place_leaves_the_old_one_alone(
    write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_runs([write_run("a", [3.0])])[0]
    write_report(record, "en")
    before = sorted((path.name, path.stat().st_size) for path in record.root.iterdir())
    monkeypatch.setattr("onecard.report.write.move", _refuse_to_move)
    with pytest.raises(PermissionError):
        write_report(record, "zh")
    assert sorted((path.name, path.stat().st_size) for path in record.root.iterdir()) == before


def _refuse_to_move(*_: object) -> None:
    raise PermissionError(13, "somebody has it open")


def test_one_frame_says_how_a_run_stands(run: Callable[..., Any], write_run: Callable[..., Path]) -> None:
    shown = run("monitor", str(write_run("a", [3.0])), "--once").stdout
    assert "10 of 20" in shown
    assert "3.0000 +/- 0.0100 at 10, best" in shown
    assert "left" in shown


def test_without_a_terminal_lines_follow_until_the_run_ends(
    run: Callable[..., Any], write_run: Callable[..., Path]
) -> None:
    lines = run("monitor", str(write_run("a", [3.0, 2.0]))).stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 20/20  loss 3.8450  held-out 2.0000")
    assert lines[0].endswith("completed")


def test_a_monitor_waits_for_a_share_that_does_not_answer(
    run: Callable[..., Any], write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_run("a", [3.0, 2.0])
    away = root.rename(root.with_name("away"))
    monkeypatch.setattr(onecard.api, "monitor", lambda _: Follower(replace(read_runs([away])[0], root=root)))
    root.write_text("no folder")

    def come_back(_: float) -> None:
        root.unlink(missing_ok=True)
        away.rename(root)

    monkeypatch.setattr("onecard.cli.monitor.time.sleep", come_back)
    lines = run("monitor", str(root)).stdout.splitlines()
    assert lines[0].startswith("the record cannot be read now (")
    assert lines[-1].endswith("completed")


def test_a_frame_says_that_a_share_does_not_answer(write_run: Callable[..., Path]) -> None:
    view = Follower(read_runs([write_run("a", [3.0])])[0]).look()
    lines = [text for _, text, _ in frame_lines(replace(view, problem="Input/output error"), 80, "utf-8")]
    assert lines[1] == "the record cannot be read now (Input/output error): looking again"
    assert any("10 of 20" in line for line in lines)


def test_a_frame_fits_its_terminal_and_its_encoding(write_run: Callable[..., Path]) -> None:
    root = write_run("a", [3.0])
    read = {"card_bytes": 3 * GIB, "card_total_bytes": 8 * GIB, "gpu_share": 0.97}
    reading = DeviceEvent(step=9, elapsed_s=9.0, temperature_c=71.0, power_w=95.0, **read)
    trouble = {"problem": "out of memory", "during": "step", "evidence": "full", "remedy": "repeated with less"}
    with (root / "events.jsonl").open("a", encoding="utf-8") as record:
        for event in (reading, RecoveredEvent(step=9, elapsed_s=9.0, **trouble)):
            record.write(to_json_line(event) + "\n")
    view = Follower(read_runs([root])[0]).look()
    for encoding in ("utf-8", "cp1252", "ascii"):
        lines = frame_lines(view, 60, encoding)
        assert all(len(text) <= 50 for _, text, _ in lines)
        "".join(text for _, text, _ in lines).encode(encoding)
    shown = {label: text for label, text, _ in lines}
    # As the run read it: this machine may have other cards, or none.
    assert shown["card"] == "3.0 GiB of 8.0 GiB, 97% busy, 71 C, 95 W"
    assert shown["trouble"] == "out of memory (step)"
    assert card_text(DeviceEvent(step=9, elapsed_s=9.0, cpu_share=0.5)) == ""


def test_a_sparkline_falls_with_the_loss_and_marks_what_is_not_finite() -> None:
    levels = "01234567"
    drawn = sparkline([10.0, *(4 - step / 50 for step in range(100)), float("nan")], 34, levels)
    assert drawn[0] == "7"
    assert drawn[-1] == "!"
    assert list(drawn[:-1]) == sorted(drawn[:-1], reverse=True)


def test_the_doctor_ends_with_one_where_something_is_bad(run: Callable[..., Any], monkeypatch) -> None:
    checks = [Check("first", "good", "fine"), Check("second", "warning", "slow", "do [this]")]
    monkeypatch.setattr(onecard.api, "examine", lambda _: iter(checks))
    done = run("doctor")
    assert done.code == 0
    assert "second: slow" in done.stdout
    assert "-> do [this]" in done.stdout
    assert "1 good, 1 to look at, 0 bad" in done.stdout
    checks.append(Check("third", "bad", "lost", "buy another"))
    done = run("doctor", "--json")
    assert done.code == 1
    assert json.loads(done.stdout)["checks"][2]["remedy"] == "buy another"
