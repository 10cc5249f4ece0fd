"""Tokenizers give text back exactly, are ordinary Hugging Face folders, and never drop a character in silence."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecard.data import tokenizer as module
from onecard.data.tokenizer import (
    END_OF_TEXT,
    encode_pieces,
    limit_threads,
    separator_id,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from onecard.data.tokenizer_files import load_tokenizer, save_tokenizer
from onecard.errors import DataError, InputError

TEXT = "The quick brown fox.\n\tjumps  over\n第一回 甄士隐梦幻识通灵，贾雨村风尘怀闺秀。\n" * 20
KINDS = {"bpe": 320, "char": None, "bytes": None}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return train_tokenizer(request.param, [TEXT], KINDS[request.param])


def test_text_comes_back_exactly(trained: PreTrainedTokenizerFast) -> None:
    (ids,) = encode_pieces(trained, [TEXT])
    assert trained.decode(ids) == TEXT
    assert ids.max() < vocabulary_size(trained) == len(trained)


def test_saved_folder_is_the_same_tokenizer_for_transformers(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert again(TEXT)["input_ids"] == trained(TEXT)["input_ids"]
        assert again.decode(again(TEXT)["input_ids"]) == TEXT
        assert again.eos_token == END_OF_TEXT
        assert tokenizer_hash(again) == tokenizer_hash(trained)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_spelt_out_special_token_is_ordinary_text(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [TEXT], KINDS[kind])
    text = f"before{END_OF_TEXT}after"
    (ids,) = encode_pieces(tokenizer, [text])
    assert separator_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == text
    assert not tokenizer.backend_tokenizer.encode_special_tokens, "outside corpora special tokens keep their meaning"


def test_the_hash_is_about_text_to_ids_only() -> None:
    first, second = train_tokenizer("char", ["ab"]), train_tokenizer("char", ["ac"])
    assert tokenizer_hash(first) != tokenizer_hash(second)
    before = tokenizer_hash(first)
    first.backend_tokenizer.enable_truncation(5)
    assert tokenizer_hash(first) == before


@given(st.text(max_size=80))
def test_bytes_encode_any_text(text: str) -> None:
    tokenizer = _BYTES
    (ids,) = encode_pieces(tokenizer, [text])
    assert len(ids) == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


_BYTES = train_tokenizer("bytes", [])


def test_bpe_training_is_deterministic(many_files: Path) -> None:
    pieces = [path.read_text(encoding="utf-8") for path in sorted(many_files.iterdir())]
    first, second = (train_tokenizer("bpe", pieces, 350) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_character_tokenizer_has_one_id_per_character() -> None:
    tokenizer = train_tokenizer("char", ["ba", "c第"])
    assert tokenizer.get_vocab() == {END_OF_TEXT: 0, "a": 1, "b": 2, "c": 3, "第": 4}
    assert [ids.tolist() for ids in encode_pieces(tokenizer, ["abc", "第"])] == [[1, 2, 3], [4]]


def test_character_tokenizer_names_what_it_does_not_know() -> None:
    tokenizer = train_tokenizer("char", ["abc"])
    with pytest.raises(DataError, match=r"does not know 'x' \(U\+0078\), 'é' \(U\+00E9\): "):
        encode_pieces(tokenizer, ["abc", "aéx"])


def test_a_vocabulary_larger_than_the_corpus_supports_names_the_size_it_does() -> None:
    with pytest.raises(DataError, match=r"vocab_size 9,999: this corpus supports at most (\d+) tokens") as caught:
        train_tokenizer("bpe", ["abab cdcd abab"], 9999)
    supported = int(str(caught.value).split("at most ")[1].split()[0])
    assert len(train_tokenizer("bpe", ["abab cdcd abab"], supported)) == supported


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bpe", None, "needs at least 257"),
        ("bpe", 256, "needs at least 257"),
        ("char", 50, "exactly 4 tokens"),
        ("bytes", 256, "exactly 257 tokens"),
        ("words", 10, "kinds are bpe, char, bytes"),
    ],
)
def test_a_size_or_kind_that_cannot_be_is_refused(kind: str, vocab_size: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(kind, ["abc"], vocab_size)


def test_a_bare_tokenizer_file_loads_and_its_truncation_is_switched_off(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bytes", [])
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert [len(ids) for ids in encode_pieces(loaded, ["x" * 20, "y"])] == [20, 1]
        assert separator_id(loaded) == 0


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"none of the kinds to train.*cannot load it"):
        load_tokenizer("nobody/has-this-tokenizer")
    (tmp_path / "tokenizer.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_folder_is_not_taken_for_a_name(tmp_path: Path, name: str) -> None:
    train_tokenizer("bytes", ()).save_pretrained(tmp_path)
    (tmp_path / name).write_text('{"cut', encoding="utf-8")
    with pytest.raises(DataError, match=rf"tokenizer folder .* its {name} is no JSON or breaks off .*Copy or download"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"there is no tokenizer\.json in it\."),
        ("[]", r"its tokenizer\.json is JSON but no tokenizer's\."),
        ("{}", r"its tokenizer\.json is JSON but no tokenizer's\."),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told_in_plain_words(tmp_path: Path, content: str | None, told: str) -> None:
    train_tokenizer("bytes", ()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink() if content is None else (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=rf"tokenizer folder .*: `transformers` cannot load it: {told} Copy") as caught:
        load_tokenizer(tmp_path)
    assert "backend" not in str(caught.value)
    (tmp_path / "tokenizer.model").write_bytes(b"of sentencepiece")
    if content is None:
        with pytest.raises(DataError, match=r"to read tokenizer\.model takes the package sentencepiece"):
            load_tokenizer(tmp_path)


def test_a_folder_with_a_models_config_alone_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"none of merges\.txt, tokenizer\.json, vocab\.json in it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["T5Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_of_which_only_the_kind_is_there_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers would load it, with a hundred tokens of its own."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"names a {kind}, but its vocabulary is missing: .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_needs_no_files_is_whole(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}', encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("a", add_special_tokens=False) == [ord("a") + 3]


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text, begin, separator or padding token"):
        load_tokenizer(tmp_path)


def test_ids_are_the_same_with_one_thread() -> None:
    tokenizer = train_tokenizer("bpe", [TEXT], 300)
    pieces = [TEXT, TEXT[:50], "", "第"]
    with limit_threads(1):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        alone = encode_pieces(tokenizer, pieces)
    for one, other in zip(alone, encode_pieces(tokenizer, pieces), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_pool_size", None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "0")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    return


@pytest.mark.usefixtures("fresh_pool")
def test_the_environment_s_number_of_threads_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for senseless in ("abc", "-1", "2.5"):
        monkeypatch.setenv("RAYON_NUM_THREADS", senseless)
        with pytest.raises(InputError, match=rf"RAYON_NUM_THREADS='{senseless}'.*unset it"), limit_threads(None):
            pass
    monkeypatch.setenv("RAYON_NUM_THREADS", "")
    with limit_threads(None):
        pass


def test_a_tokenizer_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bytes", [])
    # A folder in the way of the file is what the Rust side cannot write.
    (tmp_path / "bytes.partial" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"bytes: the tokenizer cannot be saved \(.*Is the disk full\?"):
        save_tokenizer(tokenizer, tmp_path / "bytes")


@pytest.mark.usefixtures("fresh_pool")
def test_a_number_of_threads_is_honoured_or_refused() -> None:
    with limit_threads(3):
        assert os.environ["RAYON_NUM_THREADS"] == "3"
    with limit_threads(3), limit_threads(1):
        pass
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    with pytest.raises(InputError, match="already runs its tokenizer with 3 threads"), limit_threads(4):
        pass
    with pytest.raises(InputError, match="num_proc 0"), limit_threads(0):
        pass
