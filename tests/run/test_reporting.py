"""A run ends with a report, whatever its end; a report that fails harms no run."""

import logging
from pathlib import Path

import pytest

from onecard.run.folder import RunFolder
from onecard.run.reporting import reported


class Lost(Exception):
    """How a run ends badly."""


def tell_more(root: Path) -> None:
    record = root / "events.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join([*lines, lines[-1]]))


def lose(root: Path) -> None:
    tell_more(root)
    raise Lost


def test_a_run_that_fails_is_reported_too(write_run) -> None:
    root = write_run("a", [3.0])
    with pytest.raises(Lost), reported(RunFolder(root)):
        lose(root)
    html = (root / "report.html").read_text(encoding="utf-8")
    assert "Lost" not in html
    assert "<svg" in html


def test_a_run_in_which_nothing_happened_has_no_report(write_run) -> None:
    root = write_run("a", [])
    with reported(RunFolder(root)):
        pass
    assert not (root / "report.html").exists()


def test_a_run_that_is_refused_keeps_its_report(write_run) -> None:
    root = write_run("a", [3.0])
    (root / "report.html").write_text("of before", encoding="utf-8")
    with pytest.raises(Lost), reported(RunFolder(root)):
        raise Lost
    assert (root / "report.html").read_text(encoding="utf-8") == "of before"


def test_a_report_that_cannot_be_written_is_a_warning(write_run, caplog: pytest.LogCaptureFixture) -> None:
    root: Path = write_run("a", [3.0])
    (root / "report.html").mkdir()
    with caplog.at_level(logging.WARNING), reported(RunFolder(root)):
        tell_more(root)
    assert "no report was written" in caplog.text
