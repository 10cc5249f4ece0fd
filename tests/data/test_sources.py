"""Every kind of source gives the same documents, in order; every kind of bad input gives one clear message."""

import errno
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onecard.data import text_files
from onecard.data.fingerprint import fingerprint_source
from onecard.data.readers import read_hub
from onecard.data.sources import Source, list_files, open_documents
from onecard.data.text_files import Document
from onecard.errors import DataError

ROWS = ["first text", "第二个文本", "third\r\n"]


def texts(source: Source) -> list[str]:
    return ["".join(document.pieces()) for document in open_documents(source)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_text_file_is_utf8_without_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "one\r\n二\r\nthree\rfour\r".encode())
    assert texts(Source(str(path))) == ["one\n二\nthree\rfour\r"]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 1000])
def test_pieces_join_to_the_text_wherever_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.txt"
    text = "红楼梦\r\n第一回 no newline for a while \U0001f600\r\nend"
    path.write_bytes(text.encode("utf-8"))
    pieces = list(text_files.read_text_pieces(path))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert all(pieces)


def test_large_file_streams_in_pieces_cut_at_newlines(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("some line of text\n" * 100_000, encoding="utf-8", newline="\n")
    pieces = list(text_files.read_text_pieces(path))
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece) <= text_files.PIECE_BYTES + 20 for piece in pieces)


def test_row_files_of_every_kind_give_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8")))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in ROWS]), encoding="utf-8")
    (tmp_path / "d.json").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ROWS}), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet"):
        assert texts(Source(str(tmp_path / name))) == ROWS, name


def test_tar_shard_groups_members_by_key(tmp_path: Path) -> None:
    members = {
        "./x/000.txt": b"plain",
        "./x/000.json": b'{"text": "metadata of 000"}',
        "./x/001.jpg": b"\xff\xd8",
        "./x/001.en.txt": b"two",
        "./x/001.zh.txt": b"texts",
        "./x/001.meta.json": b"{}",
        "../../002.json": '{"text": "由 json"}'.encode(),
    }
    write_tar(tmp_path / "shard.tar", members)
    documents = list(open_documents(Source(str(tmp_path / "shard.tar"))))
    assert ["".join(document.pieces()) for document in documents] == ["plain", "two", "texts", "由 json"]
    assert documents[0].origin == "shard.tar:x/000.txt"


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}\n', encoding="utf-8")
    assert texts(Source(str(tmp_path / "a.jsonl"), text_column="content")) == ["x"]


def test_folder_is_read_in_order_without_hidden_empty_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.txt", ".hidden.txt", ".git/c.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n', encoding="utf-8")
    assert texts(Source(str(tmp_path))) == ["a.txt", "a/z.md", "b.txt", "row"]
    assert list_files(Source(str(tmp_path))).num_empty == 1


def test_glob_matches_any_depth_and_any_suffix(tmp_path: Path) -> None:
    for name in ("1.story", "deep/2.story", "3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert texts(Source(str(tmp_path / "**" / "*.story"))) == ["1.story", "deep/2.story"]


def test_standard_library_is_there_without_tests_and_site_packages() -> None:
    listing = list_files(Source("python-stdlib"))
    labels = [file.label for file in listing.files]
    assert 400 < len(labels) < 1200
    assert "argparse.py" in labels
    assert not [label for label in labels if "/test/" in label or "site-packages" in label or label.startswith("test/")]
    first: Document = next(open_documents(Source("python-stdlib")))
    assert first.size_bytes == listing.files[0].path.stat().st_size
    assert "".join(first.pieces()) == listing.files[0].path.read_text(encoding="utf-8")


def test_hub_reader_uses_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS), encoding="utf-8")
    documents = list(read_hub(str(tmp_path), None, "train", "text"))
    assert ["".join(document.pieces()) for document in documents] == ROWS
    with pytest.raises(DataError, match="no column 'txt' among 'text'; did you mean 'text'"):
        list(read_hub(str(tmp_path), None, "train", "txt"))
    with pytest.raises(DataError, match="split 'nope'"):
        list(read_hub(str(tmp_path), None, "nope", "text"))


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.txt", "x" * 300 + ".txt", "a\0.txt"])
def test_a_path_that_cannot_be_is_not_there(path: str) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        texts(Source(path))


def test_a_missing_file_says_where_it_can_be_fetched() -> None:
    with pytest.raises(DataError, match=r"Fetch it from https://example\.org/novel\.txt and save it there"):
        texts(Source("data/novel.txt", url="https://example.org/novel.txt"))


def test_a_pattern_without_a_meaning_is_refused() -> None:
    with pytest.raises(DataError, match="this is no pattern"):
        texts(Source("folder/**a/*.txt"))


def test_an_unknown_name_tells_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no file, no folder and no pattern.*Hub data set.*cannot be loaded"):
        texts(Source("nobody/has-this-data-set"))


@pytest.mark.parametrize("path", ["missing.txt", "./nothing here", "../up/there", "missing.parquet"])
def test_a_missing_path_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(DataError, match="no such file or folder"):
        texts(Source(path))


# A sound header, then a block of a kind that there is not.
_BROKEN_DEFLATE = gzip.compress(b"")[:10] + b"\xff" * 40
BAD_FILES = {
    "gb.txt": ("黛玉葬花".encode("gb18030"), r"not UTF-8: byte 0xF7 at offset 0 .*GB18030"),
    "late.txt": (b"plain ascii\n" * 30_000 + "caf\u00e9 ol\u00e9".encode("cp1252"), r"byte 0xE9 at offset 360,003 "),
    "utf16.txt": ("hello".encode("utf-16"), r"It is UTF-16 by its first bytes"),
    "utf16le.txt": ("hello, world".encode("utf-16-le"), r"not UTF-8 but UTF-16LE"),
    "program.txt": (
        b"\x7fELF\x02\x01\0\0\0\x03" + bytes(range(256)) * 9,
        r"binary file \(NUL byte at offset 6\)|no text",
    ),
    "cut.txt": ("红楼梦".encode()[:-1], r"the end of the file at offset|byte 0xE6 at offset 6"),
    "empty.txt": (b"", "the file is empty"),
    "half.txt.gz": (gzip.compress(b"text " * 999)[:-9], "damaged gzip"),
    "not.txt.gz": (b"no gzip at all", "damaged gzip"),
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": \n{"text": 7}\n["x"]\n',
        r"(?s)broken.jsonl:2: broken JSON.*:3: .*int '7'.*:4: ",
    ),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl:1: 'text' is null, not a string"),
    "column.jsonl": (b'{"txt": "a", "id": 1}\n', r"no column 'text' among 'txt', 'id'; did you mean 'txt'"),
    "pair.jsonl": (b'{"text": "\\ud800"}\n', "surrogate"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', r"latin.jsonl:1: not UTF-8 at byte 13"),
    "list.json": (b'[{"text": "a"},\n', r"list.json:2: broken JSON"),
    "deflate.txt.gz": (_BROKEN_DEFLATE, "damaged gzip"),
    "deflate.jsonl.gz": (_BROKEN_DEFLATE, "damaged archive"),
    "deflate.tar.gz": (_BROKEN_DEFLATE, "damaged archive"),
    "deflate.tgz": (_BROKEN_DEFLATE, "damaged archive"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, r"deep.jsonl:2: JSON that is nested too deeply"),
    "deep.json": (b"[" * 100_000, r"deep.json: JSON that is nested too deeply"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", r"digits.jsonl:1: JSON with a number of too many digits"),
    "digits.json": (b"[" + b"1" * 5000 + b"]", r"digits.json: JSON with a number of too many digits"),
    "pretty.json": (
        b'{\n  "text": "a",\n  "id": 1\n}\n',
        r"pretty.json: the object that begins in its first line goes on",
    ),
    "torn.jsonl": (b'{"text": ', r"torn.jsonl:1: broken JSON"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), r"wide.jsonl: not UTF-8 but UTF-16, by"),
    "widele.json": ('[{"text": "a"}]\n'.encode("utf-16-le"), r"widele.json: not UTF-8 but UTF-16LE"),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', r"nul.jsonl:1: 'text' has a NUL at character 1: it is no text"),
    "middle.txt": (
        b"plain ascii\n" * 30_000 + "caf\u00e9 ol\u00e9\n".encode("cp1252"),
        r"offset 360,003 .* It may be CP1252: save it",
    ),
    "mended.txt": (
        "第一回 甄士隐梦幻识通灵\n".encode() * 9_000 + b"\xe9 \n",
        r"The text before it is UTF-8: mend the file there",
    ),
    "late-nul.txt": (b"plain ascii\n" * 30_000 + b"\0", r"a binary file \(NUL byte at offset 360,000\)"),
    "bad.parquet": (b"PAR1 no", "not a Parquet file"),
    "bad.tar": (b"no tar " * 200, "damaged archive"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_place_and_remedy(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(Source(str(tmp_path / name)))


@pytest.mark.parametrize("piece_bytes", [3, 4, 5, 9, 100])
def test_the_offset_of_a_bad_byte_is_right_wherever_pieces_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf12345\xe6x")
    with pytest.raises(DataError, match=r"byte 0xE6 at offset 8 "):
        texts(Source(str(tmp_path / "a.txt")))


def test_no_document_comes_after_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{}\n{"text": "b"}\n', encoding="utf-8")
    documents = open_documents(Source(str(tmp_path / "a.jsonl")))
    assert "".join(next(documents).pieces()) == "a"
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(documents)


def test_bad_parquet_and_tar_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    write_tar(tmp_path / "c.tar", {"1.json": b'{"body": "x"}'})
    write_tar(tmp_path / "d.tar", {"1.jpg": b"x"})
    for name, message in {
        "a.parquet": "no column 'text' among 'body'",
        "b.parquet": r"b.parquet\[1\]: 'text' is null",
        "c.tar": r"c.tar:1.json: no column 'text' among 'body'",
        "d.tar": "no member of this archive is a .txt or .json file",
    }.items():
        with pytest.raises(DataError, match=message):
            texts(Source(str(tmp_path / name)))


def test_folder_or_pattern_without_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no file in it has a suffix known as text"):
        texts(Source(str(tmp_path)))
    with pytest.raises(DataError, match="no file matches this pattern"):
        texts(Source(str(tmp_path / "*.txt")))
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match="all 2 files are empty"):
        texts(Source(str(tmp_path)))


def test_bad_members_of_a_tar_are_told(tmp_path: Path) -> None:
    members = {"a.json": b"[" * 100_000, "b.txt": b"a\0b", "c.json": b'{"text": ' + b"1" * 5000 + b"}"}
    write_tar(tmp_path / "bad.tar", members)
    message = r"(?s)a\.json: JSON that is nested too deeply.*b\.txt: 'text' has a NUL.*c\.json: .*too many digits"
    with pytest.raises(DataError, match=message):
        texts(Source(str(tmp_path / "bad.tar")))


@pytest.mark.parametrize("length", [512, 1024, 1100, 1536, 2000])
def test_a_tar_that_breaks_off_loses_no_member_in_silence(tmp_path: Path, length: int) -> None:
    write_tar(tmp_path / "a.tar", {"1.txt": b"one", "2.txt": b"two"})
    content = (tmp_path / "a.tar").read_bytes()
    assert texts(Source(str(tmp_path / "a.tar"))) == ["one", "two"]
    (tmp_path / "cut.tar").write_bytes(content[:length])
    with pytest.raises(DataError, match=r"cut\.tar: damaged archive"):
        texts(Source(str(tmp_path / "cut.tar")))
    (tmp_path / "flipped.tar").write_bytes(content[:1030] + b"\xff" + content[1031:])
    with pytest.raises(DataError, match="damaged at byte 1,024"):
        texts(Source(str(tmp_path / "flipped.tar")))


def test_chats_taken_for_text_are_told_as_chats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match="for chats task to sft"):
        texts(Source(str(tmp_path / "a.jsonl")))


def test_a_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet\[1\]: 'text' is not UTF-8 at byte 3"):
        texts(Source(str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize("pattern", ["", "*/*.txt", "**/*.txt", "*/a.txt", "pri*/**/*.txt"])
def test_a_folder_that_may_not_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in ("private", "public"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text", encoding="utf-8")
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"private: cannot be read \(Permission denied\)\. Check who may read it\."):
        texts(Source(str(tmp_path / pattern)))
    assert texts(Source(str(tmp_path / "pub*" / "*.txt"))) == ["text"]


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)\. Check who may read it"):
        texts(Source(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("end", ["gone.txt", "a.txt"])
def test_a_link_that_leads_nowhere_is_named_with_where_it_leads(tmp_path: Path, end: str) -> None:
    (tmp_path / "b.txt").write_text("text", encoding="utf-8")
    try:
        (tmp_path / "a.txt").symlink_to(tmp_path / end)  # to nothing, or to itself
    except OSError:
        pytest.skip("this system lets nobody make links")
    with pytest.raises(DataError, match=rf"a\.txt: a link to .*{end}, .*Restore that file, or delete the link\."):
        texts(Source(str(tmp_path)))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    documents = open_documents(Source(str(tmp_path)))
    first = next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt: it was there when the files were listed"):
        next(documents)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(first.pieces())


def test_all_bad_files_of_a_folder_are_told_at_once(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("good", encoding="utf-8")
    (folder / "gb.txt").write_bytes("黛玉葬花".encode("gb18030"))
    (folder / "late.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 of 4 files cannot be used \(and 1 empty\).*gb\.txt.*late\.txt"):
        fingerprint_source(Source(str(folder)), cache)
