"""Pieces of text are whole characters, and together they are the text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from onecard.data import train_tokenizer
from onecard.data.tokenizer import as_transformers
from onecard.handover.text_stream import StopStrings, Stripped, TextStream

TEXT = "I say 你好，世界! It's 🙂👩‍👩‍👧, naïve  and\n\nnew."


def sentence_pieces() -> PreTrainedTokenizerBase:
    """Like Llama's: a space belongs to its word, what is unknown becomes bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Isaynditrewv", "▁a"]
    backend = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return as_transformers(backend, "<s>")


TOKENIZERS = {
    "bytes": train_tokenizer("bytes", ()),
    "bpe": train_tokenizer("bpe", [TEXT] * 3, 270),
    "sentencepiece": sentence_pieces(),
}


def pieces_of(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    return [*(stream.add(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_whole_characters(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("say", f"say {TEXT}"))
    pieces = pieces_of(tokenizer, before, whole[len(before) :])
    assert "".join(pieces) == f" {TEXT}"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""
    assert sum(map(bool, pieces)) > len(TEXT) / 3  # and do come one by one


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(numbers=st.lists(st.integers(0, 10**6), max_size=30))
def test_whatever_ids_a_model_writes_are_told_as_they_decode(name: str, numbers: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [number % len(tokenizer) for number in numbers]
    before = tokenizer.encode("ab", add_special_tokens=False)
    assert "ab" + "".join(pieces_of(tokenizer, before, ids)) == tokenizer.decode(
        [*before, *ids], skip_special_tokens=True
    )


@given(
    text=st.text("ab", max_size=12),
    sizes=st.lists(st.integers(1, 3), min_size=12, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, sizes: list[int], stops: list[str]) -> None:
    gate, passed, place = StopStrings(stops), "", 0
    for size in sizes:
        passed += gate.add(text[place : place + size])
        place += size
        assert not any(stop in passed for stop in stops)
        if gate.is_found:
            break
    passed += gate.finish()
    ends = [text[:place].find(stop) for stop in stops if stop in text[:place]]
    assert gate.is_found == bool(ends)
    assert passed == (text[: min(ends)] if ends else text)


def test_text_that_cannot_be_a_stop_string_is_not_held_back() -> None:
    gate = StopStrings(["\nUser:"])
    assert [gate.add(piece) for piece in ("Hi", "\n", "Us", "b", "\nUser: x")] == ["Hi", "", "", "\nUsb", ""]
    assert gate.is_found


@given(parts=st.lists(st.text(" \na", max_size=3), max_size=8))
def test_stripped_pieces_are_the_stripped_text(parts: list[str]) -> None:
    stripped = Stripped()
    assert "".join(stripped.add(part) for part in parts) == "".join(parts).strip()


def test_bytes_that_never_make_a_character_are_told_as_they_come() -> None:
    tokenizer = TOKENIZERS["bytes"]
    (broken,) = {tokenizer.encode("é", add_special_tokens=False)[-1]}
    pieces = pieces_of(tokenizer, [], [broken] * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert sum(map(bool, pieces[:-1])) > 100
