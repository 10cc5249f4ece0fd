"""A run ends with a report, whatever its end; a report that fails harms no run."""

import logging
from pathlib import Path

import pytest

from onecard.run.folder import RunFolder
from onecard.run.reporting import reported


class Lost(Exception):
    """How a run ends badly."""


def test_a_run_that_fails_is_reported_too(write_run) -> None:
    root = write_run("a", [3.0])
    with pytest.raises(Lost), reported(RunFolder(root)):
        raise Lost
    html = (root / "report.html").read_text(encoding="utf-8")
    assert "Lost" not in html
    assert "<svg" in html


def test_a_run_in_which_nothing_happened_has_no_report(write_run) -> None:
    root = write_run("a", [])
    with reported(RunFolder(root)):
        pass
    assert not (root / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(write_run, caplog: pytest.LogCaptureFixture) -> None:
    root: Path = write_run("a", [3.0])
    (root / "report.html").mkdir()
    with caplog.at_level(logging.WARNING), reported(RunFolder(root)):
        pass
    assert "no report was written" in caplog.text
