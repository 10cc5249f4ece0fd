import dataclasses
import json
import math

import pytest

from onecard.errors import CheckpointError
from onecard.observe import CLOCK_FIELDS, DeviceEvent, Event, depends_on_clock, parse_event, to_json_line


@pytest.fixture(
    params=["step", "evaluated", "sampled", "saved", "scored", "chosen", "finding", "recovered", "finished"]
)
def event(request: pytest.FixtureRequest) -> Event:
    if request.param == "step":
        return request.getfixturevalue("step_event")(7, share_of_peak=0.4, memory_bytes=123)
    return request.getfixturevalue(request.param)


def test_an_event_survives_its_line(event: Event) -> None:
    line = to_json_line(event)
    assert "\n" not in line
    assert parse_event(line) == event


def test_a_line_starts_with_event_step_and_time(event: Event) -> None:
    assert list(json.loads(to_json_line(event)))[:3] == ["event", "step", "elapsed_s"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_line_is_strict_json_whatever_the_loss(step_event, number: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = to_json_line(step_event(1, loss=number))
    assert json.loads(line, parse_constant=refuse)["loss"] is None
    assert math.isnan(parse_event(line).loss)


def test_absent_numbers_stay_absent(step_event, evaluated) -> None:
    assert parse_event(to_json_line(step_event(1))).share_of_peak is None
    without = dataclasses.replace(evaluated, bits_per_byte=None)
    assert parse_event(to_json_line(without)) == without


def test_text_stays_readable_in_the_record(sampled) -> None:
    assert "你好" in to_json_line(sampled)


def test_clock_fields_are_fields_of_events(step_event, recovered, finished) -> None:
    names = {field.name for event in (step_event(1), recovered, finished) for field in dataclasses.fields(event)}
    assert names >= CLOCK_FIELDS
    assert {"loss", "step", "tokens_seen", "learning_rate"}.isdisjoint(CLOCK_FIELDS)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '"step"', "{}", '{"event": "born"}', '{"event": "step", "step": 1}', '{"event": ["step"]}']
)
def test_a_line_that_is_no_event_is_reported(line: str) -> None:
    with pytest.raises(CheckpointError, match="not an event"):
        parse_event(line)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens_per_s", {}), ("loss", "2.5"), ("step", 2.5), ("step", True), ("is_finite", 1), ("memory_bytes", "x")],
)
def test_a_field_of_another_type_is_reported(step_event, field: str, value: object) -> None:
    record = json.loads(to_json_line(step_event(3))) | {field: value}
    with pytest.raises(CheckpointError, match=f"{field} is of another type"):
        parse_event(json.dumps(record))


@pytest.mark.parametrize("value", [1e308, "no reason", ["completed"]])
def test_a_word_that_is_none_of_those_known_is_reported(finished, value: object) -> None:
    record = json.loads(to_json_line(finished)) | {"reason": value}
    with pytest.raises(CheckpointError, match="reason is of another type"):
        parse_event(json.dumps(record))


def test_a_field_of_a_newer_version_is_reported(saved) -> None:
    record = json.loads(to_json_line(saved)) | {"colour": "red"}
    with pytest.raises(CheckpointError, match="colour"):
        parse_event(json.dumps(record))


def test_a_reading_comes_back_as_it_was(step_event, finding) -> None:
    reading = DeviceEvent(step=3, elapsed_s=1.5, gpu_share=0.5, throttled_by=("sw_thermal",), num_others=1)
    assert parse_event(to_json_line(reading)) == reading
    assert depends_on_clock(reading)
    assert depends_on_clock(dataclasses.replace(finding, is_timed=True))
    assert not depends_on_clock(finding)
    assert not depends_on_clock(step_event(1))


def test_a_finding_of_an_older_record_has_no_name(finding) -> None:
    record = json.loads(to_json_line(finding))
    del record["id"], record["is_timed"]
    assert parse_event(json.dumps(record)) == finding
