from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.observe import JsonlSink, parse_event


def steps_in(path: Path) -> list[int]:
    return [parse_event(line).step for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def write_steps(sink: JsonlSink, make, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.receive(make(step))


def test_each_event_is_in_the_file_at_once(record: Path, step_event) -> None:
    sink = JsonlSink(record)
    for step in (1, 2, 3):
        sink.receive(step_event(step))
        assert steps_in(record) == list(range(1, step + 1))
        assert sink.num_bytes == record.stat().st_size
    sink.close()


def test_a_record_that_is_cut_goes_on_as_one_that_was_not(record: Path, tmp_path: Path, step_event) -> None:
    whole, sink = JsonlSink(tmp_path / "whole.jsonl"), JsonlSink(record)
    write_steps(whole, step_event, 1, 6)
    write_steps(sink, step_event, 1, 3)
    remembered = sink.num_bytes
    write_steps(sink, step_event, 4, 5)
    sink.cut(remembered)
    assert sink.num_bytes == remembered == record.stat().st_size
    write_steps(sink, step_event, 4, 6)
    assert record.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    sink.cut(0)
    assert record.read_bytes() == b""
    whole.close()
    sink.close()


def test_a_resumed_record_equals_an_uninterrupted_one(record: Path, tmp_path: Path, step_event) -> None:
    whole = JsonlSink(tmp_path / "whole.jsonl")
    write_steps(whole, step_event, 1, 6)
    whole.close()

    first = JsonlSink(record)
    write_steps(first, step_event, 1, 3)
    remembered = first.num_bytes
    write_steps(first, step_event, 4, 5)
    first.close()
    second = JsonlSink(record, truncate_at=remembered)
    assert second.num_bytes == remembered
    write_steps(second, step_event, 4, 6)
    second.close()

    assert record.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_without_a_mark_the_record_goes_on(record: Path, step_event) -> None:
    for first, last in ((1, 2), (3, 4)):
        sink = JsonlSink(record)
        write_steps(sink, step_event, first, last)
        sink.close()
    assert steps_in(record) == [1, 2, 3, 4]


@pytest.mark.parametrize("truncate_at", [None, 10**9])
def test_a_torn_last_line_is_dropped(record: Path, step_event, truncate_at: int | None) -> None:
    sink = JsonlSink(record)
    write_steps(sink, step_event, 1, 3)
    sink.close()
    record.write_bytes(record.read_bytes()[:-5])
    sink = JsonlSink(record, truncate_at=truncate_at)
    sink.receive(step_event(3))
    sink.close()
    assert steps_in(record) == [1, 2, 3]


@given(st.binary(max_size=300), st.integers(0, 400))
def test_only_whole_lines_are_kept(tmp_path_factory, content: bytes, truncate_at: int) -> None:
    path = tmp_path_factory.mktemp("record") / "events.jsonl"
    path.write_bytes(content)
    JsonlSink(path, truncate_at=truncate_at).close()
    kept = path.read_bytes()
    assert content.startswith(kept)
    assert kept == b"" or kept.endswith(b"\n")
    assert b"\n" not in content[len(kept) : truncate_at]


def test_a_last_line_longer_than_a_read_block_is_found(record: Path) -> None:
    record.parent.mkdir()
    record.write_bytes(b"first\n" + b"x" * 200_000)
    JsonlSink(record).close()
    assert record.read_bytes() == b"first\n"


def test_a_prompt_in_a_broken_encoding_does_not_end_the_run(record: Path, sampled) -> None:
    sample = type(sampled.samples[0])(prompt="caf\udce9", completion="")
    sink = JsonlSink(record)
    sink.receive(type(sampled)(step=1, elapsed_s=0.0, samples=(sample,), seconds=0.0))
    sink.close()
    assert parse_event(record.read_text(encoding="utf-8")).samples[0].prompt == "caf?"


def test_lines_end_the_same_on_every_platform(record: Path, step_event) -> None:
    sink = JsonlSink(record)
    sink.receive(step_event(1))
    sink.close()
    assert record.read_bytes().endswith(b"}\n")
