"""Rows of chat files: every one with its place, what is none told in its place, in memory that does not grow."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onecard.data.chats.examples import ExampleReader
from onecard.data.chats.rows import open_chat_files
from onecard.data.row_files import Row, RowProblem
from onecard.data.sources import Source
from onecard.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Hi 红楼梦"}, {"role": "assistant", "content": "Hello"}]}
TURNS = CHAT["messages"]


def rows_of(path: Path) -> list[tuple[str, object]]:
    """Place and value of each row, or place and kind of what is none."""
    return [
        (row.origin, row.value if isinstance(row, Row) else row.kind)
        for file in open_chat_files(Source(str(path)))
        for row in file.rows
    ]


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [CHAT, {"messages": TURNS[:1]}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows, indent=1).encode() if name.endswith(".json") else lines
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    places = [":1", ":2"] if "jsonl" in name else ["[0]", "[1]"]
    assert rows_of(path) == [(f"{name}{place}", row) for place, row in zip(places, rows, strict=True)]


def test_a_folder_gives_its_files_of_rows_and_leaves_the_others(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", json.dumps(CHAT).encode())
    write_lines(tmp_path / "a.json", json.dumps([CHAT]).encode())
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    assert [place for place, _ in rows_of(tmp_path)] == ["a.json[0]", "b.jsonl:1"]
    assert [place for place, _ in rows_of(tmp_path / "*.jsonl")] == ["b.jsonl:1"]
    with pytest.raises(DataError, match=r"chats are read from files of rows .* only README.md"):
        rows_of(tmp_path / "README.md")


def test_what_is_no_row_is_told_in_its_place_and_the_others_come(tmp_path: Path) -> None:
    good = json.dumps(CHAT).encode()
    path = write_lines(
        tmp_path / "a.jsonl",
        good,
        b'{"messages": [',
        b'{"messages": "caf\xe9"}',
        b"",
        b"null",
        b"7",
        good,
        b'{"a": 1, "a": 2}',
    )
    assert rows_of(path) == [
        ("a.jsonl:1", CHAT),
        ("a.jsonl:2", "broken JSON"),
        ("a.jsonl:3", "not UTF-8"),
        ("a.jsonl:5", None),
        ("a.jsonl:6", 7),
        ("a.jsonl:7", CHAT),
        ("a.jsonl:8", "broken JSON"),
    ]
    listed = tmp_path / "b.json"
    listed.write_bytes(b"[" + good + b', {"text": "caf\xe9"}, ' + good + b"]")
    assert rows_of(listed) == [("b.json[0]", CHAT), ("b.json[1]", "not UTF-8"), ("b.json[2]", CHAT)]


def test_a_broken_first_line_is_one_row_where_the_next_is_whole(tmp_path: Path) -> None:
    good = json.dumps(CHAT).encode()
    assert rows_of(write_lines(tmp_path / "a.jsonl", b'{"messages": [', good)) == [
        ("a.jsonl:1", "broken JSON"),
        ("a.jsonl:2", CHAT),
    ]
    with pytest.raises(DataError, match="goes on in the next"):
        rows_of(write_lines(tmp_path / "b.jsonl", b"{", b'"messages": []', b"}"))


def test_lines_that_are_lists_are_rows_too(tmp_path: Path) -> None:
    line = json.dumps(TURNS).encode()
    assert rows_of(write_lines(tmp_path / "a.jsonl", line, line)) == [("a.jsonl:1", TURNS), ("a.jsonl:2", TURNS)]
    assert rows_of(write_lines(tmp_path / "b.json", json.dumps([TURNS, TURNS]).encode())) == [
        ("b.json[0]", TURNS),
        ("b.json[1]", TURNS),
    ]


def test_a_parquet_cell_that_is_not_utf8_spoils_only_its_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": [1, 2, 3], "text": column}), tmp_path / "a.parquet")
    (file,) = open_chat_files(Source(str(tmp_path / "a.parquet")))
    rows = list(file.rows)
    assert rows[1] == RowProblem("a.parquet[1]", "not UTF-8", "'text' is not UTF-8 at byte 3")
    assert rows[2] == Row("a.parquet[2]", {"id": 3, "text": "good"})


def test_a_file_damaged_as_a_whole_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 999)[:-9])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "c.json").write_bytes(b"[{}, ")
    for name, message in {
        "a.jsonl.gz": "damaged archive",
        "b.parquet": "not a Parquet",
        "c.json": "broken JSON",
    }.items():
        with pytest.raises(DataError, match=message):
            rows_of(tmp_path / name)


def test_a_data_set_of_the_hub_comes_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onecard.data.row_files import read_hub_rows

    (tmp_path / "train.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT) + "\n", encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = list(read_hub_rows(str(tmp_path), None, "train"))
    assert [row.value for row in rows] == [CHAT, CHAT]
    assert rows[1].origin.endswith("[1]")


def test_a_file_has_one_format(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "response": "Hello"}
    content = [json.dumps(row).encode() for row in (CHAT, pair, {"unheard": 1}, CHAT)]
    write_lines(tmp_path / "a.jsonl", *content)
    write_lines(tmp_path / "b.jsonl", json.dumps(pair).encode())
    reader = ExampleReader(Source(str(tmp_path)))
    (batch,) = reader.batches()
    assert batch.origins == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:1"]
    assert [(origin, bad.kind) for origin, bad in batch.bad] == [
        ("a.jsonl:2", "mixed formats"),
        ("a.jsonl:3", "unknown format"),
    ]
    assert "'unheard'" in batch.bad[1][1].reason
    assert len(reader.formats) == 2


@pytest.mark.parametrize("num_unread", [0, 200])
def test_the_format_is_that_of_most_rows_at_the_beginning(tmp_path: Path, num_unread: int) -> None:
    odd, usual = json.dumps({"text": "x"}).encode(), json.dumps(CHAT).encode()
    write_lines(tmp_path / "a.jsonl", *[b'{"unheard": 1}'] * num_unread, odd, *[usual] * 100)
    reader = ExampleReader(Source(str(tmp_path)))
    (batch,) = reader.batches()
    assert reader.formats == ["messages"]
    assert len(batch.origins) == 100
    assert [origin for origin, bad in batch.bad if bad.kind == "mixed formats"] == [f"a.jsonl:{num_unread + 1}"]


def test_the_format_is_that_of_most_rows_of_the_whole_file(tmp_path: Path) -> None:
    odd, usual = json.dumps({"text": "x" * 200}).encode(), json.dumps(CHAT).encode()
    write_lines(tmp_path / "a.jsonl", *[odd] * 70, *[usual] * 1000)
    reader = ExampleReader(Source(str(tmp_path)))
    batches = list(reader.batches())
    assert reader.formats == ["messages"]
    assert sum(len(batch.origins) for batch in batches) == 1000
    odd_rows = [origin for batch in batches for origin, bad in batch.bad if bad.kind == "mixed formats"]
    assert odd_rows == [f"a.jsonl:{number}" for number in range(1, 71)]


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", json.dumps(CHAT).encode(), b'{"text": "x"}', b'{"text": "\\ud800"}')
    write_lines(tmp_path / "b.jsonl", b'{"text": "\\ud800"}', b'{"text": "x"}')
    (batch,) = ExampleReader(Source(str(tmp_path / "b.jsonl"))).batches()
    assert batch.origins == ["b.jsonl:2"]
    assert [origin for origin, _ in batch.bad] == ["b.jsonl:1"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for count in (4_000, 40_000):
        path = tmp_path / f"{count}.{suffix}"
        if suffix == "jsonl":
            path.write_bytes((json.dumps(CHAT).encode() + b"\n") * count)
        else:
            pq.write_table(pa.Table.from_pylist([CHAT] * count), path, row_group_size=1000)
        tracemalloc.start()
        for file in open_chat_files(Source(str(path))):
            for _ in file.rows:
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000
