"""An event as one line of strict JSON, and back: what `events.jsonl` is made of."""

import dataclasses
import json
import math
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from onecard.errors import CheckpointError
from onecard.observe.events import ChosenEvent, DeviceEvent, Event, RanksEvent, Sample, SampledEvent

_EVENT_TYPES: dict[str, type[Event]] = {kind.event: kind for kind in get_args(Event)}
_FIELD_NAMES = {kind: tuple(field.name for field in dataclasses.fields(kind)) for kind in get_args(Event)}
_TYPES = {kind: {field.name: field.type for field in dataclasses.fields(kind)} for kind in get_args(Event)}
_REQUIRED_FLOATS = {
    kind: tuple(field.name for field in dataclasses.fields(kind) if field.type is float) for kind in get_args(Event)
}


def to_json_line(event: Event) -> str:
    """Writes an event as one line of strict JSON without the line break; non-finite numbers become null."""
    record: dict[str, Any] = {"event": event.event}
    for name in _FIELD_NAMES[type(event)]:
        record[name] = getattr(event, name)
    if isinstance(event, SampledEvent):
        record["samples"] = [dataclasses.asdict(sample) for sample in event.samples]
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number that JSON has no word for
        finite = {name: None if _is_non_finite(value) else value for name, value in record.items()}
        return json.dumps(finite, ensure_ascii=False, allow_nan=False)


def parse_event(line: str) -> Event:
    """Reads one line of `events.jsonl`; null in a field that is always a number comes back as NaN.

    Raises `CheckpointError` for a line that is no event.
    """
    try:
        record = json.loads(line)
        kind = _EVENT_TYPES[record.pop("event")]
        for name in _REQUIRED_FLOATS[kind]:
            if record[name] is None:
                record[name] = math.nan
        if wrong := next((name for name, value in record.items() if not _fits(value, _TYPES[kind][name])), None):
            raise TypeError(f"{wrong} is of another type")
        if kind is SampledEvent:
            record["samples"] = tuple(Sample(**sample) for sample in record["samples"])
        if kind is DeviceEvent:
            record["throttled_by"] = tuple(record["throttled_by"])
        if kind is ChosenEvent:
            record |= {name: tuple(record[name]) for name in ("finalists", "undecided")}
        if kind is RanksEvent:
            record |= {name: tuple(map(float, record[name])) for name in ("forward_s", "data_s", "num_tokens")}
        return kind(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"not an event of this version of onecard: {line.strip()[:120]!r} ({error}); "
            "the record is damaged, or was written by a newer version: upgrade onecard, or delete the line"
        ) from error


def _fits(value: object, kind: Any) -> bool:
    """Whether a plain value is of a type; what is made of several values is left to those who make it."""
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, kind) if kind in (str, bool, type(None)) else True


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
