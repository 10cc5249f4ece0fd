"""The catalogue of findings: what each says, in English and Chinese, for the console and the pages."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from onecard.observe.events import FindingEvent
from onecard.spec import Finding

Language = Literal["en", "zh"]

_FILE = Path(__file__).with_name("catalogue.toml")


@dataclass(frozen=True)
class Text:
    """What a finding says in one language."""

    symptom: str
    cause: str
    remedy: str


@dataclass(frozen=True)
class Entry:
    """One finding: `section` is its chapter in the pages; `is_timed` says that it rests on clocks or sensors.

    `has_detector` is false for what errors and other parts of a run say.
    """

    id: str
    section: str
    texts: dict[Language, Text]
    is_timed: bool
    has_detector: bool


@cache
def entries() -> dict[str, Entry]:
    """All findings by id, in the order of the catalogue."""
    return {id: _entry(id, row) for id, row in _read()["findings"].items()}


@cache
def sections() -> dict[str, dict[Language, str]]:
    """Headings of the chapters by name, in the order of the catalogue."""
    titles: dict[str, dict[Language, str]] = _read()["sections"]
    return titles


def make_finding(id: str, evidence: str, setting: str, *, effect: str = "", stops_run: bool = False) -> Finding:
    """Makes the finding `id` of the catalogue: its words, the figures that show it, and what to set with what effect.

    Raises `KeyError` for an id that the catalogue lacks.
    """
    text = entries()[id].texts["en"]
    remedy = f"{text.remedy}: {setting}" if setting else text.remedy
    return Finding(
        id=id,
        symptom=text.symptom,
        evidence=evidence,
        likely_cause=text.cause,
        remedy=f"{remedy} ({effect})" if effect else remedy,
        stops_run=stops_run,
    )


def as_event(finding: Finding, step: int, elapsed_s: float) -> FindingEvent:
    """Turns a finding of the catalogue into what a run records of it."""
    timed = entries()[finding.id].is_timed
    return FindingEvent(step=step, elapsed_s=elapsed_s, **finding.model_dump(), is_timed=timed)


def _entry(id: str, row: dict[str, Any]) -> Entry:
    texts: dict[Language, Text] = {
        "en": Text(row["symptom"], row["cause"], row["remedy"]),
        "zh": Text(row["symptom_zh"], row["cause_zh"], row["remedy_zh"]),
    }
    return Entry(id, row["section"], texts, bool(row.get("timed")), bool(row.get("detector")))


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))
