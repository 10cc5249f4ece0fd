"""Held-out text: the rules, and that no text is on both sides."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.data import text_files
from onecard.data.sources import Source, open_documents
from onecard.data.split import Split, split_document
from onecard.data.text_files import Document
from onecard.errors import DataError


def document(text: str) -> Document:
    return Document("x", partial(text_files.cut_text, text))


def sides(text: str, split: Split) -> tuple[str, str]:
    parts = list(split_document(document(text), split))
    train = "".join(part.text for part in parts if not part.is_heldout)
    return train, "".join(part.text for part in parts if part.is_heldout)


@given(text=st.text(max_size=300), fraction=st.floats(0, 0.99))
def test_tail_cuts_at_the_byte_moved_back_to_a_character(text: str, fraction: float) -> None:
    train, heldout = sides(text, Split(fraction, "tail"))
    assert train + heldout == text
    cut = int(len(text.encode("utf-8")) * (1 - fraction))
    assert len(train.encode("utf-8")) <= cut
    assert not heldout or len((train + heldout[0]).encode("utf-8")) > cut


def test_tail_is_the_same_wherever_pieces_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "红楼梦 one two\nthree " * 50
    whole = sides(text, Split(0.3, "tail"))
    monkeypatch.setattr(text_files, "PIECE_BYTES", 7)
    assert sides(text, Split(0.3, "tail")) == whole


def test_a_document_goes_to_one_side_by_its_content() -> None:
    split = Split(0.3, "documents")
    first = [sides(f"document {index}", split) for index in range(1000)]
    assert all(not train or not heldout for train, heldout in first)
    assert 240 < sum(bool(heldout) for _, heldout in first) < 360
    assert first == [sides(f"document {index}", split) for index in range(1000)]
    assert first != [sides(f"document {index}", Split(0.3, "documents", seed=1)) for index in range(1000)]


def test_duplicates_stay_together_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{index} " + "long\n" * 30_000 for index in range(12)]
    split = Split(0.5, "documents")
    before = [bool(sides(text, split)[1]) for text in texts]
    assert len(set(before)) == 2
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    assert [bool(sides(text, split)[1]) for text in texts] == before


def test_auto_takes_tails_of_few_documents(many_files: Path, one_file: Path) -> None:
    auto = Split(0.1, "auto", seed=3)
    assert auto.resolve(open_documents(Source(str(many_files)))) == Split(0.1, "documents", 3)
    assert auto.resolve(open_documents(Source(str(one_file)))) == Split(0.1, "tail", 0)


@pytest.mark.parametrize(("fraction", "rule"), [(1.0, "auto"), (-0.1, "tail"), (float("nan"), "tail"), (0.1, "head")])
def test_impossible_splits_are_refused(fraction: float, rule: str) -> None:
    with pytest.raises(DataError, match=r"eval_fraction|eval_split"):
        Split(fraction, rule)
