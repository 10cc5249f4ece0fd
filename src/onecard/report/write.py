"""The report of a run: one HTML file that needs no network, no script and no other file."""

import time
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from onecard.errors import InputError
from onecard.report.page import make_page
from onecard.report.record import RunRecord
from onecard.report.words import Language, Say
from onecard.spec.moving import move

if TYPE_CHECKING:
    from jinja2 import Template

REPORT = "report.html"


def write_report(run: RunRecord, language: Language) -> Path:
    """Writes report.html into the folder of a run, in place of an older one, and returns it.

    Raises:
        InputError: a folder has that name.
        OSError: the run's folder cannot be written to; an older report is untouched.
    """
    target = run.root / REPORT
    if target.is_dir():
        raise InputError(f"{target} is a folder, so no report can be written there: move or rename it")
    beside = target.with_name(f".{REPORT}")
    # What a terminal or a broken file left of half a character has no place in UTF-8.
    content = render_report(run, language).encode("utf-8", errors="replace")
    try:
        beside.write_bytes(content)
        move(beside, target)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    return target


def render_report(run: RunRecord, language: Language) -> str:
    """Renders a run, finished or in training, as a page."""
    say = Say(language)
    return _template().render(
        page=make_page(run, say),
        say=say,
        language=language,
        style=_text("report.css"),
        script=_text("report.js"),
        date=time.strftime("%Y-%m-%d %H:%M"),
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined  # here: those who only compare runs do not need it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text("report.html.jinja"))


def _text(name: str) -> str:
    return files("onecard.report").joinpath(name).read_text(encoding="utf-8")
