"""What a report says of what went wrong: findings, and troubles that a run got over."""

from collections.abc import Sequence
from dataclasses import dataclass

from onecard.observe.detectors import entries, in_chinese
from onecard.observe.events import FindingEvent, RecoveredEvent
from onecard.report.record import RunRecord
from onecard.report.words import Say


@dataclass(frozen=True)
class Found:
    """A finding in the words of a language, and when it was made; one that was made several times is told once."""

    symptom: str
    evidence: str
    cause: str
    remedy: str
    when: str
    stops_run: bool


def tell_findings(run: RunRecord, say: Say) -> tuple[Found, ...]:
    """Gathers the findings of a run, those that stopped it first."""
    by_name: dict[str, list[FindingEvent]] = {}
    for event in run.findings:
        by_name.setdefault(event.id or event.symptom, []).append(event)
    found = []
    for events in by_name.values():
        last, when = events[-1], _when([event.step for event in events], say)
        symptom, evidence, cause, remedy = _words_of(last, say)
        found.append(Found(symptom, evidence, cause, remedy, when, last.stops_run))
    return tuple(sorted(found, key=lambda row: not row.stops_run))


def _words_of(event: FindingEvent, say: Say) -> tuple[str, str, str, str]:
    """Symptom, evidence, cause and remedy; settings, which have no language, stay as they were recorded."""
    if say.language == "en" or event.id not in entries():
        return event.symptom, event.evidence, event.likely_cause, event.remedy
    text, (evidence, remedy) = entries()[event.id].texts["zh"], in_chinese(event.id, event.evidence, event.remedy)
    return text.symptom, evidence, text.cause, remedy


def tell_recoveries(run: RunRecord, say: Say) -> tuple[str, ...]:
    """Gathers what went wrong without ending the run, and how it went on; alike ones are counted."""
    groups: dict[tuple[str, str, str], list[RecoveredEvent]] = {}
    for event in run.of(RecoveredEvent):
        groups.setdefault((event.problem, event.during, event.remedy), []).append(event)
    return tuple(
        say(
            "{problem} ({during}), {when}: {remedy}",
            problem=say.term(problem),
            during=say.term(during, "during"),
            when=_when([event.returned_from or event.step for event in events], say),
            remedy=remedy,
        )
        for (problem, during, remedy), events in groups.items()
    )


def _when(steps: Sequence[int], say: Say) -> str:
    if len(steps) == 1:
        return say("at step {step}", step=f"{steps[0]:,}")
    first, last = f"{steps[0]:,}", f"{steps[-1]:,}"
    return say("{num} times, from step {first} to {last}", num=len(steps), first=first, last=last)
