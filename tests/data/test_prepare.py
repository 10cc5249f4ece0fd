"""Prepared corpora: right, reused, rebuilt, restarted, and clear about what is wrong."""

import errno
import gzip
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from onecard.data import build
from onecard.data.cache import cache_folder, explained_disk_errors, locked
from onecard.data.corpus import Corpus, CorpusRequest, prepare, training_pieces
from onecard.data.sources import Source
from onecard.data.split import Split
from onecard.data.token_file import Manifest, TokenFile, hash_samples
from onecard.errors import DataError


def request(cache: Path, *paths: Path, **settings: object) -> CorpusRequest:
    sources = tuple(Source(str(path)) for path in paths)
    return replace(CorpusRequest(sources, tokenizer="char", eval_fraction=0.1, cache_dir=cache), **settings)  # type: ignore[arg-type]


def documents_of(file: TokenFile, corpus: Corpus) -> list[str]:
    """Reads a token file back: it must be SEP text SEP text … SEP."""
    ids = file[:]
    borders = np.flatnonzero(ids == corpus.separator_id)
    assert borders[0] == 0
    assert borders[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(ids[start + 1 : end]) for start, end in pairwise(borders)]


def built_folders(cache: Path) -> list[Path]:
    return sorted(path.parent for path in (cache / "corpora").glob("*/manifest.json"))


def change(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8", newline="\n")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("tokenizer", [("bpe", 300), ("char", None), ("bytes", None)])
def test_documents_come_back_from_the_token_files(
    many_files: Path, cache: Path, tokenizer: tuple[str, int | None]
) -> None:
    corpus = prepare(request(cache, many_files, tokenizer=tokenizer[0], vocab_size=tokenizer[1]))
    train, heldout = documents_of(corpus.train[0], corpus), documents_of(corpus.heldout[0], corpus)
    originals = [path.read_text(encoding="utf-8") for path in sorted(many_files.iterdir())]
    assert sorted(train + heldout) == sorted(originals)
    assert len(heldout) > 1
    assert [text for text in originals if text in train] == train, "order is kept"
    assert corpus.train_bytes == sum(len(text.encode()) for text in train)
    assert corpus.heldout_bytes == sum(len(text.encode()) for text in heldout)
    assert (corpus.num_train_tokens, corpus.num_heldout_tokens) == (len(corpus.train[0]), len(corpus.heldout[0]))
    assert corpus.train[0][:].dtype == np.dtype("<u2")


def test_duplicates_never_straddle(many_files: Path, cache: Path) -> None:
    for path in sorted(many_files.iterdir()):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    corpus = prepare(request(cache, many_files, eval_fraction=0.3))
    train, heldout = documents_of(corpus.train[0], corpus), documents_of(corpus.heldout[0], corpus)
    assert len(train) + len(heldout) == 120
    assert not set(train) & set(heldout)


def test_a_single_text_is_cut_as_nanogpt_cuts_it(one_file: Path, cache: Path) -> None:
    corpus = prepare(request(cache, one_file))
    text = one_file.read_text(encoding="utf-8")
    assert corpus.train_bytes == len(text.encode()[: int(len(text.encode()) * 0.9)].decode("utf-8", "ignore").encode())
    assert documents_of(corpus.train[0], corpus)[0] + documents_of(corpus.heldout[0], corpus)[0] == text


def test_an_unchanged_corpus_is_reused_and_a_touched_one_too(one_file: Path, cache: Path) -> None:
    first = prepare(request(cache, one_file))
    written = first.train[0].path.stat().st_mtime_ns
    os.utime(one_file, ns=(1, 1))
    second = prepare(request(cache, one_file))
    assert second.train[0].path.stat().st_mtime_ns == written
    assert second.fingerprint == first.fingerprint


def test_a_corpus_that_moved_is_still_the_same(one_file: Path, cache: Path) -> None:
    first = prepare(request(cache, one_file))
    moved = one_file.rename(one_file.with_name("moved.txt"))
    assert prepare(request(cache, moved)).fingerprint == first.fingerprint
    change(moved)
    assert prepare(request(cache, moved)).fingerprint != first.fingerprint


def test_a_changed_corpus_is_rebuilt_aloud(one_file: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(request(cache, one_file, tokenizer="bytes"))
    old = first.train[0][:].copy()
    change(one_file)
    with caplog.at_level(logging.WARNING, "onecard.data"):
        second = prepare(request(cache, one_file, tokenizer="bytes"))
    assert "has changed since it was prepared" in caplog.text
    assert second.fingerprint != first.fingerprint
    assert (
        documents_of(second.train[0], second)[0]
        == one_file.read_text(encoding="utf-8")[: len(documents_of(second.train[0], second)[0])]
    )
    np.testing.assert_array_equal(first.train[0][:], old, err_msg="a run that has the old files open keeps them")


def test_settings_that_matter_give_another_folder(many_files: Path, cache: Path) -> None:
    base = request(cache, many_files, tokenizer="bytes")
    fingerprints = {
        prepare(entry).fingerprint
        for entry in (base, replace(base, eval_fraction=0.2), replace(base, seed=1), replace(base, eval_split="tail"))
    }
    assert len(fingerprints) == len(built_folders(cache)) == 4


def test_two_sources_share_a_tokenizer_and_keep_their_weights(many_files: Path, one_file: Path, cache: Path) -> None:
    asked = request(cache, many_files, one_file)
    asked = replace(asked, sources=(asked.sources[0], replace(asked.sources[1], weight=3.0)))
    corpus = prepare(asked)
    assert corpus.weights == (1.0, 3.0)
    assert len(corpus.train) == len(corpus.heldout) == 2
    assert len(documents_of(corpus.train[1], corpus)) == 1
    assert corpus.fingerprint != prepare(request(cache, many_files, one_file)).fingerprint
    assert len({Manifest.read(folder).tokenizer_hash for folder in built_folders(cache)}) == 1


def test_eval_sources_replace_the_split(many_files: Path, one_file: Path, cache: Path) -> None:
    corpus = prepare(request(cache, many_files, eval_sources=(Source(str(one_file)),)))
    assert len(documents_of(corpus.train[0], corpus)) == 60
    assert documents_of(corpus.heldout[0], corpus) == [one_file.read_text(encoding="utf-8")]
    assert corpus.heldout_bytes == one_file.stat().st_size


def test_nothing_is_held_out_when_nothing_is_asked(many_files: Path, cache: Path) -> None:
    corpus = prepare(request(cache, many_files, eval_fraction=0.0))
    assert corpus.heldout == ()
    assert (corpus.num_heldout_tokens, corpus.heldout_bytes) == (0, 0)


def test_heldout_text_does_not_shape_the_tokenizer(one_file: Path) -> None:
    split = Split(0.5, "tail")
    text = one_file.read_text(encoding="utf-8")
    learnt = "".join(training_pieces([(Source(str(one_file)), split)]))
    assert text.startswith(learnt)
    assert 0.49 < len(learnt) / len(text) < 0.51


def test_no_more_text_than_the_limit_is_read_for_the_tokenizer(many_files: Path) -> None:
    (many_files / "01.txt").write_bytes(b"\xff")
    split = Split(0.5, "tail")
    assert len(list(training_pieces([(Source(str(many_files)), split)], limit_bytes=1))) == 1
    large = many_files.parent / "large.txt"
    large.write_bytes(b"text\n" * 100_000 + b"\xff")
    whole = Split(0.0).resolve(())
    assert len(list(training_pieces([(Source(str(large)), whole)], limit_bytes=1))) == 1
    with pytest.raises(DataError, match="not UTF-8"):
        list(training_pieces([(Source(str(many_files)), split)]))


def test_a_tokenizer_is_trained_once_per_text(one_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(cache, one_file, tokenizer="bpe", vocab_size=300)
    save = PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted(save))
    with pytest.raises(KeyboardInterrupt):
        prepare(asked)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    prepare(asked)
    (folder,) = (path for path in (cache / "tokenizers").iterdir() if path.is_dir())
    written = folder.stat().st_mtime_ns
    prepare(replace(asked, eval_fraction=0.1))
    assert folder.stat().st_mtime_ns == written
    prepare(replace(asked, eval_fraction=0.2))
    assert len([path for path in (cache / "tokenizers").iterdir() if path.is_dir()]) == 2


def interrupted(save: Callable[..., object]) -> Callable[..., None]:
    def saves_half_and_dies(tokenizer: object, folder: Path) -> None:
        save(tokenizer, folder)
        (folder / "tokenizer.json").unlink()
        raise KeyboardInterrupt

    return saves_half_and_dies


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(build, "SAVE_EVERY_BYTES", 2000)


def interrupt_after(calls: int) -> Callable[[str, int, int | None], None]:
    def progress(stage: str, done_bytes: int, total_bytes: int | None) -> None:
        nonlocal calls
        calls -= stage == "tokenizing"
        if calls == 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("calls", [1, 2, 11, 25])
def test_a_killed_build_goes_on_and_ends_the_same(many_files: Path, tmp_path: Path, calls: int) -> None:
    whole = prepare(request(tmp_path / "whole", many_files))
    with pytest.raises(KeyboardInterrupt):
        prepare(request(tmp_path / "killed", many_files), interrupt_after(calls))
    (partial,) = (tmp_path / "killed").glob("corpora/*/tokens.bin.partial")
    with partial.open("ab") as stream:
        stream.write(b"bytes written after the last save")
    done = list[int]()
    again = prepare(request(tmp_path / "killed", many_files), lambda stage, count, total: done.append(count))
    assert again.train[0].path.read_bytes() == whole.train[0].path.read_bytes()
    assert again.heldout[0].path.read_bytes() == whole.heldout[0].path.read_bytes()
    assert (again.train_bytes, again.heldout_bytes) == (whole.train_bytes, whole.heldout_bytes)
    assert again.fingerprint == whole.fingerprint
    if calls > 10:
        assert min(done) > whole.train_bytes // 10, "what was saved is not encoded again"
    assert sorted(path.name for path in again.train[0].path.parent.iterdir()) == [
        "heldout.bin",
        "manifest.json",
        "tokenizer",
        "tokens.bin",
    ]


@pytest.mark.usefixtures("small_batches")
def test_a_killed_build_of_text_that_changed_starts_over(many_files: Path, cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(request(cache, many_files, tokenizer="bytes"), interrupt_after(11))
    change(many_files / "00.txt")
    corpus = prepare(request(cache, many_files, tokenizer="bytes", eval_split="auto"))
    texts = documents_of(corpus.train[0], corpus) + documents_of(corpus.heldout[0], corpus)
    assert sorted(texts) == sorted(path.read_text(encoding="utf-8") for path in many_files.iterdir())


def test_a_second_process_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order, inside = list[str](), threading.Event()

    def second() -> None:
        inside.wait()
        with locked(tmp_path / "corpus"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with locked(tmp_path / "corpus"):
        inside.set()
        while "another process prepares corpus: waiting" not in caplog.text:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("place", ["tokenizers/*/tokenizer.json", "corpora/*/tokenizer/tokenizer.json"])
def test_a_damaged_tokenizer_is_made_again(
    one_file: Path, cache: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    first = prepare(request(cache, one_file))
    (file,) = cache.glob(place)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        caplog.clear()
        again = prepare(request(cache, one_file))
        assert "is damaged" in caplog.text
        assert (again.fingerprint, file.read_bytes()) == (first.fingerprint, whole)


def test_a_file_that_changes_while_it_is_prepared_is_refused(one_file: Path, cache: Path) -> None:
    def change_now(stage: str, *_: object) -> None:
        if stage == "tokenizing":
            change(one_file)

    with pytest.raises(DataError, match=r"novel\.txt: it has changed while it was prepared"):
        prepare(request(cache, one_file), change_now)
    assert built_folders(cache) == []
    assert prepare(request(cache, one_file)).num_train_tokens > 0


def assert_built_again(asked: CorpusRequest, first: Corpus, whole: bytes) -> None:
    again = prepare(asked)
    assert again.train[0].path.read_bytes() == whole
    assert (again.fingerprint, again.separator_id) == (first.fingerprint, first.separator_id)
    assert (again.train_bytes, again.num_heldout_tokens) == (first.train_bytes, first.num_heldout_tokens)


@pytest.mark.parametrize("name", ["tokens.bin", "heldout.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole + b"x", "it has .* bytes where its manifest says"),
        (lambda whole: bytes(len(whole)), "it is not what was written"),
        (lambda whole: b"\xff" * len(whole), "it is not what was written"),
        (lambda whole: whole[:-2] + b"\1\0", "it is not what was written"),
        (None, "it is missing"),
    ],
)
def test_a_damaged_token_file_is_built_again_aloud(
    one_file: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    first = prepare(request(cache, one_file))
    whole, file = first.train[0].path.read_bytes(), first.train[0].path.with_name(name)
    damaged = damage(file.read_bytes()) if damage else None
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    assert_built_again(request(cache, one_file), first, whole)
    assert re.search(f"{name}: {message}.*preparing it again", caplog.text)


@pytest.mark.parametrize("change_content", ["separator_id", "vocab_size", "dtype", "train", "source", "samples"])
def test_a_manifest_changed_by_hand_is_built_again(one_file: Path, cache: Path, change_content: str) -> None:
    first = prepare(request(cache, one_file))
    whole, file = first.train[0].path.read_bytes(), first.train[0].path.with_name("manifest.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    for wrong in ("x", -1, None, {}, 3):
        found["content"][change_content] = wrong
        file.write_text(json.dumps(found), encoding="utf-8")
        assert_built_again(request(cache, one_file), first, whole)


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 1}', "[" * 100_000, '{"content": null}'])
@pytest.mark.parametrize("place", ["corpora/*/manifest.json", "sources/*.json"])
def test_a_damaged_record_is_made_again(one_file: Path, cache: Path, place: str, content: str) -> None:
    first = prepare(request(cache, one_file))
    whole = first.train[0].path.read_bytes()
    (file,) = cache.glob(place)
    file.write_text(content, encoding="utf-8")
    assert_built_again(request(cache, one_file), first, whole)


def test_an_id_beyond_the_vocabulary_never_reaches_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "tokens.bin"
    path.parent.mkdir()
    path.write_bytes(np.array([0, 1, 2, 300, 2, 1], dtype="<u2").tobytes())
    file = TokenFile(path, "<u2", 6, vocab_size=300)
    assert file[:3].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"tokens.bin: it holds the id 300.* delete the folder .*corpus"):
        file[1:5]


def test_a_large_token_file_is_sampled_to_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    content = bytearray(np.random.default_rng(0).bytes(3_000_001))
    hashes = set()
    for place in (None, 0, len(content) - 1, len(content) // 63 + 20):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        hashes.add(hash_samples(path))
    assert len(hashes) == 4


@pytest.mark.usefixtures("small_batches")
def test_damaged_progress_of_a_killed_build_starts_over(many_files: Path, tmp_path: Path) -> None:
    whole = prepare(request(tmp_path / "whole", many_files))
    for wrong in ("x", -1, None, [], 10**6):
        for key in ("counts", "num_pieces_done", "elapsed_s", "content_hash"):
            with pytest.raises(KeyboardInterrupt):
                prepare(request(tmp_path / "killed", many_files), interrupt_after(3))
            (file,) = (tmp_path / "killed").glob("corpora/*/progress.json")
            found = json.loads(file.read_text(encoding="utf-8"))
            found["content"][key] = wrong
            file.write_text(json.dumps(found), encoding="utf-8")
            assert prepare(request(tmp_path / "killed", many_files)).train_bytes == whole.train_bytes
            shutil.rmtree(file.parent)


def test_a_cache_that_may_only_be_read_is_enough_for_what_is_prepared(
    one_file: Path, many_files: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(request(cache, one_file))

    def refuse(lock: FileLock, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert prepare(request(cache, one_file)).fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        prepare(request(cache, many_files))
    first.train[0].path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        prepare(request(cache, one_file))


def test_a_full_disk_is_foreseen(one_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 500)
    (one_file.parent / "many.txt").write_text("text\n" * 200_000, encoding="utf-8", newline="\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(DataError, match=r"need about .* more, the disk has 1000 B free.*ONECARD_CACHE"):
        prepare(request(cache, one_file.parent / "many.txt"))


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"no space left on the disk .* what is done is kept"),
        explained_disk_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DataError, match="cannot be written"), explained_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "no source is given"),
        ({"tokenizer": "bpe"}, "needs a vocab_size"),
        ({"eval_fraction": 1.5, "tokenizer": "bpe"}, r"(?s)eval_fraction 1.5.*needs a vocab_size"),
        ({"tokenizer": "bpe", "vocab_size": 99_999}, "this corpus supports at most"),
        ({"sources": (Source("python-stdlib", weight=0),)}, "weight must be above 0"),
    ],
)
def test_impossible_requests_are_refused(
    one_file: Path, cache: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(request(cache, one_file, **settings))


def test_an_empty_side_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    (tmp_path / "b.txt").write_text("b", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the held-out part of its 1 documents is empty"):
        prepare(request(cache, tmp_path / "a.txt", eval_split="documents", eval_fraction=1e-9))
    with pytest.raises(DataError, match="the training part of its 1 documents is empty"):
        prepare(request(cache, tmp_path / "a.txt", eval_split="documents", eval_fraction=1 - 1e-9))
    with pytest.raises(DataError, match=r"part of its 1 documents is empty\. Give more text"):
        prepare(request(cache, tmp_path / "b.txt", eval_split="tail", eval_fraction=0.9))
    with pytest.raises(DataError, match="there is no text in it"):
        prepare(request(cache, tmp_path / "rows.jsonl", tokenizer="bytes"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b"[]"),
        ("rows.jsonl", b'{"text": ""}\n'),
        ("mark.txt", b"\xef\xbb\xbf"),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
    ],
    ids=["json", "jsonl", "mark", "gz"],
)
@pytest.mark.parametrize("tokenizer", [("bpe", 300), ("char", None), ("bytes", None)])
def test_text_without_text_is_refused_whatever_the_tokenizer(
    tmp_path: Path, cache: Path, name: str, content: bytes, tokenizer: tuple[str, int | None]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}': there is no text in it"):
        prepare(request(cache, tmp_path / name, tokenizer=tokenizer[0], vocab_size=tokenizer[1]))


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are always Unicode")
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "caf\udce9.txt").write_text("some words\n" * 500, encoding="utf-8")
    first = prepare(request(cache, folder))
    assert prepare(request(cache, folder)).fingerprint == first.fingerprint


def test_a_cache_folder_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", "/nowhere/caf\udce9")
    with pytest.raises(DataError, match=r"/nowhere/caf\\udce9': its name is not UTF-8.* Set ONECARD_CACHE"):
        cache_folder()


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("ONECARD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "onecard"
