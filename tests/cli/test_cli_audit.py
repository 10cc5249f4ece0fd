"""The mask audit as people read it."""

import io

import pytest

from onecard.cli.audit_text import audit_rows, print_samples
from onecard.cli.rows import format_rows
from onecard.spec.mask_audit import BadPlace, MaskAudit, RowLengths, SampleRow, SkippedRows, SourceFormats

CLEAN = MaskAudit(
    template="chatml",
    formats=(SourceFormats(path="a.jsonl", formats=("messages",)), SourceFormats(path="b", formats=("alpaca",))),
    num_rows=1200,
    num_tokens=40_000,
    num_target_tokens=10_000,
    num_heldout_rows=60,
    num_heldout_target_tokens=500,
    lengths=RowLengths(median=33, percentile_95=80, longest=512),
    samples=(
        SampleRow(origin="a.jsonl:1", spans=(("User: Hi\nAssistant:", False), (" Hello\x1b[2J", True), ("\n", False))),
    ),
)
FLAWED = CLEAN.model_copy(
    update={
        "skipped": (SkippedRows(kind="unknown role", num_rows=7, places=(BadPlace(origin="a.jsonl:3", reason="no"),)),),
        "num_cut_rows": 3,
        "num_dropped_rounds": 4,
        "num_lost_tokens": 999,
        "num_double_bos_rows": 5,
        "num_rows_without_stop": 6,
        "num_partial_rows": 2,
        "num_empty_system_rows": 11,
        "num_spared_rows": 10,
        "new_tokens": ("<|im_start|>", "<|im_end|>"),
        "num_duplicate_rows": 8,
        "num_rows_in_heldout": 9,
    }
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_clean_set_is_told_in_few_lines() -> None:
    text = "\n".join(format_rows(audit_rows(CLEAN), None))
    assert "1,200 conversations to train on, 60 held out, read as alpaca, messages" in text
    assert "25.0% of the tokens: 10.0K of 40.0K" in text
    assert "median 33 tokens, 95% up to 80, longest 512" in text
    for word in ("stop token", "double", "duplicates", "overlap", "left out", "lost"):
        assert word not in text


def test_every_flaw_has_its_line() -> None:
    lines = format_rows(audit_rows(FLAWED), None)
    for expected in (
        "shortened      4 old rounds dropped, 3 conversations cut inside a turn: 999 tokens lost",
        "no stop token  6 ",
        "not shown      2 conversations with a system prompt",
        "empty system   11 ",
        "spared         10 ",
        "new tokens     <|im_start|>, <|im_end|>",
        "double BOS     5 ",
        "duplicates     8 ",
        "overlap        9 ",
        "left out       7 rows",
        "               7 x unknown role, the first:",
        "                 a.jsonl:3: no",
    ):
        assert any(line.startswith(expected) for line in lines), expected


def test_a_terminal_gets_colour_and_a_file_gets_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file, terminal = io.StringIO(), Terminal()
    print_samples(CLEAN, file)
    assert "User: Hi\nAssistant:« Hello" in file.getvalue()
    assert "\x1b" not in file.getvalue(), "what a sample says to a terminal is not handed on"
    print_samples(CLEAN, terminal)
    assert "«" not in terminal.getvalue().replace("« »", "")
    assert "\x1b[2J" not in terminal.getvalue()
    assert " Hello" in terminal.getvalue()


def test_samples_stand_apart_by_one_empty_line_and_are_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for stream in (io.StringIO(), Terminal()):
        print_samples(CLEAN.model_copy(update={"samples": CLEAN.samples * 3}), stream)
        shown = stream.getvalue()
        assert (shown.count("\n\n"), shown.count("what counts"), "\n\n\n" in shown) == (2, 1, False)


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    one = dict.fromkeys(("num_rows", "num_cut_rows", "num_dropped_rounds", "num_duplicate_rows"), 1)
    skipped = FLAWED.skipped[0].model_copy(update={"num_rows": 1})
    lines = format_rows(audit_rows(FLAWED.model_copy(update={**one, "skipped": (skipped,)})), None)
    text = "\n".join(lines)
    for expected in (
        "1 conversation to train on",
        "1 old round dropped, 1 conversation cut",
        "duplicates     1 conversation ",
        "left out       1 row\n",
        "1 x unknown role:\n",
    ):
        assert expected in text, expected


def test_a_place_that_cannot_be_printed_is_written_out() -> None:
    assert BadPlace(origin="caf\udce9.jsonl:1", reason="\ud800").origin == "caf\\udce9.jsonl:1"


def test_an_audit_survives_its_way_through_json() -> None:
    assert MaskAudit.model_validate_json(FLAWED.model_dump_json()) == FLAWED
