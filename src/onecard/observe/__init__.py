"""What happened: events and those who hear about them. No torch."""

from onecard.observe.console import ConsoleSink
from onecard.observe.events import (
    CLOCK_FIELDS,
    DeviceEvent,
    EvaluatedEvent,
    Event,
    FindingEvent,
    FinishedEvent,
    FinishReason,
    RecoveredEvent,
    Sample,
    SampledEvent,
    SavedEvent,
    SaveReason,
    StepEvent,
    depends_on_clock,
)
from onecard.observe.jsonl import JsonlSink
from onecard.observe.lines import parse_event, to_json_line
from onecard.observe.sinks import Sink, make_sinks

__all__ = [
    "CLOCK_FIELDS",
    "ConsoleSink",
    "DeviceEvent",
    "EvaluatedEvent",
    "Event",
    "FindingEvent",
    "FinishReason",
    "FinishedEvent",
    "JsonlSink",
    "RecoveredEvent",
    "Sample",
    "SampledEvent",
    "SaveReason",
    "SavedEvent",
    "Sink",
    "StepEvent",
    "depends_on_clock",
    "make_sinks",
    "parse_event",
    "to_json_line",
]
