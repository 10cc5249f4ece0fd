"""The catalogue of findings: what each says, in English and Chinese, for the console and the pages."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from onecard.observe.detectors.phrases import phrase, phrasebook
from onecard.observe.events import FindingEvent
from onecard.spec import Finding

Language = Literal["en", "zh"]

_FILE = Path(__file__).with_name("catalogue.toml")


@dataclass(frozen=True)
class Text:
    """What a finding says in one language; `effect` is what to expect of the remedy where no figure is known."""

    symptom: str
    cause: str
    remedy: str
    effect: str


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


def make_finding(id: str, evidence: str, setting: str, effect: str = "", *, stops_run: bool = False) -> Finding:
    """Makes the finding `id` of the catalogue: its words, the figures that show it, and what to set with what effect.

    Without an effect that is the one of the catalogue. Raises `KeyError` for an id that the catalogue lacks.
    """
    text = entries()[id].texts["en"]
    effect = effect or text.effect
    remedy = f"{text.remedy}: {setting}" if setting else text.remedy
    return Finding(
        id=id,
        symptom=text.symptom,
        evidence=evidence,
        likely_cause=text.cause,
        remedy=f"{remedy} ({effect})" if effect else remedy,
        stops_run=stops_run,
    )


def instead(key: str, value: object, now: object) -> str:
    """Names a setting and the one it takes the place of."""
    return phrase("instead", key=key, value=value, now=now)


def in_chinese(id: str, evidence: str, remedy: str) -> tuple[str, str]:
    """Translates what `make_finding` recorded; settings to be typed, and what others said, stay as they are."""
    english, chinese = (entries()[id].texts[language] for language in ("en", "zh"))
    rest = remedy.removeprefix(english.remedy)
    if rest == remedy:
        return phrasebook().translate(evidence), remedy
    found = re.fullmatch(r"(?:: (?P<setting>.*?))?(?: \((?P<effect>.*)\))?", rest, re.DOTALL)
    setting, effect = (found["setting"] or "", found["effect"] or "") if found else (rest, "")
    effect = chinese.effect if effect == english.effect else phrasebook().translate(effect)
    told = f"{chinese.remedy}：{phrasebook().translate(setting)}" if setting else chinese.remedy
    return phrasebook().translate(evidence), f"{told}（{effect}）" if effect else told


def as_event(finding: Finding, step: int, elapsed_s: float) -> FindingEvent:
    """Turns a finding of the catalogue into what a run records of it."""
    timed = entries()[finding.id].is_timed
    return FindingEvent(step=step, elapsed_s=elapsed_s, **finding.model_dump(), is_timed=timed)


def _entry(id: str, row: dict[str, Any]) -> Entry:
    texts: dict[Language, Text] = {
        "en": Text(row["symptom"], row["cause"], row["remedy"], row.get("effect", "")),
        "zh": Text(row["symptom_zh"], row["cause_zh"], row["remedy_zh"], row.get("effect_zh", "")),
    }
    return Entry(id, row["section"], texts, bool(row.get("timed")), bool(row.get("detector")))


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))
