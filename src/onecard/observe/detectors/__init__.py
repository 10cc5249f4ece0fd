"""Detectors: pure functions from a run's recent events to a `Finding`, or None.

events ──► History ──► detectors ──► Watch: found several times in a row, said once ──► FindingEvent
"""

from onecard.observe.detectors.catalogue import as_event, entries, in_chinese, make_finding, sections
from onecard.observe.detectors.history import Foresee, History, Surroundings
from onecard.observe.detectors.phrases import Phrasebook, phrase
from onecard.observe.detectors.watch import DETECTORS, Watch

__all__ = [
    "DETECTORS",
    "Foresee",
    "History",
    "Phrasebook",
    "Surroundings",
    "Watch",
    "as_event",
    "entries",
    "in_chinese",
    "make_finding",
    "phrase",
    "sections",
]
