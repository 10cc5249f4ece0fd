"""Prepared chats: right, split by content, reused, rebuilt, audited, and clear about rows that cannot be used."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from onecard.data import Batch, Source, StreamSettings
from onecard.data.batches import NO_TARGET
from onecard.data.chats import build
from onecard.data.chats.build import _sort_file
from onecard.data.chats.chat_file import Conversations
from onecard.data.chats.conversation import Rendered
from onecard.data.chats.corpus import ChatCorpus, ChatRequest, prepare_chats
from onecard.data.chats.examples import ExampleBatch, ExampleReader
from onecard.data.chats.rendering import Renderer
from onecard.data.chats.template import ChatTemplate
from onecard.data.split import Split
from onecard.data.survey import find_prepared_chats
from onecard.data.tokenizer import train_tokenizer
from onecard.data.tokenizer_files import load_tokenizer
from onecard.errors import DataError, InputError

CHAT_COUNT = 200
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew potent jade elixir 红楼梦 第一回 甄士隐"


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(TEXT.split(), k=count))


def chat(seed: int) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": words(seed, 4)},
            {"role": "assistant", "content": words(seed + 10_000, 2 + seed % 9)},
        ]
    }


def write_chats(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer("bytes", ()).save_pretrained(folder)
    return str(folder)


Request = Callable[..., ChatRequest]


@pytest.fixture
def request_for(tokenizer: str, cache: Path) -> Request:
    def make(*paths: Path, **settings: object) -> ChatRequest:
        sources = tuple(Source(str(path)) for path in paths)
        made = ChatRequest(sources, tokenizer, eval_fraction=0.1, max_seq_length=600, cache_dir=cache)
        return replace(made, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", [chat(seed) for seed in range(CHAT_COUNT)])


def learned_texts(part: Conversations, corpus: ChatCorpus) -> list[str]:
    """What counts in each conversation, as text without special tokens."""
    texts = []
    for index in range(part.num_rows):
        ids, is_target = part.row(index)
        texts.append(corpus.tokenizer.decode(ids[is_target], skip_special_tokens=True).strip())
    return texts


def test_answers_count_and_questions_do_not(chats: Path, request_for: Request) -> None:
    corpus = prepare_chats(request_for(chats))
    answers = sorted(str(chat(seed)["messages"][1]["content"]) for seed in range(CHAT_COUNT))  # type: ignore[index]
    found = learned_texts(corpus.train[0], corpus) + learned_texts(corpus.heldout[0], corpus)
    assert sorted(found) == answers
    for part in (*corpus.train, *corpus.heldout):
        for index in range(part.num_rows):
            ids, is_target = part.row(index)
            assert not is_target[0]
            assert is_target[-1], "nothing is kept behind the last target"
            assert ids[-1] == corpus.tokenizer.eos_token_id


def test_counts_are_those_of_the_files(chats: Path, request_for: Request) -> None:
    corpus = prepare_chats(request_for(chats))
    train, heldout, audit = corpus.train[0], corpus.heldout[0], corpus.audit
    assert corpus.num_train_rows == train.num_rows == audit.num_rows == CHAT_COUNT - heldout.num_rows
    assert 5 < heldout.num_rows < 40
    assert corpus.num_train_tokens == len(train.ids) == train.offsets[-1:][0]
    assert corpus.num_target_tokens == int(train.is_target[:].sum())
    assert corpus.num_heldout_target_tokens == int(heldout.is_target[:].sum())
    lengths = np.concatenate(list(train.lengths()))
    assert (audit.lengths.median, audit.lengths.longest) == (
        int(np.sort(lengths)[(len(lengths) - 1) // 2]),
        lengths.max(),
    )
    assert audit.target_share == corpus.num_target_tokens / corpus.num_train_tokens
    spaces = sum(len(text.encode()) for text in learned_texts(heldout, corpus))
    assert spaces <= corpus.heldout_bytes <= spaces + heldout.num_rows


@pytest.mark.parametrize("at_once", [3, 10**6])
def test_equal_rows_never_lie_on_both_sides_whatever_the_file_format(
    tmp_path: Path, request_for: Request, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("onecard.data.chats.audit._HASHES_AT_ONCE", at_once)
    monkeypatch.setattr("onecard.data.chats.chat_file._OFFSETS_AT_ONCE", at_once)
    rows = [chat(seed % 60) for seed in range(300)]
    pairs = [{"prompt": words(seed, 4), "response": words(seed + 10_000, 2 + seed % 9)} for seed in range(60)]
    write_chats(tmp_path / "a.jsonl", rows)
    write_chats(tmp_path / "b.jsonl", pairs)
    corpus = prepare_chats(request_for(tmp_path / "a.jsonl", tmp_path / "b.jsonl", eval_fraction=0.3))
    sides = [
        {text for part in parts for text in learned_texts(part, corpus)} for parts in (corpus.train, corpus.heldout)
    ]
    assert len(sides[0]) + len(sides[1]) == 60
    assert len(sides[1]) > 5
    assert corpus.audit.num_duplicate_rows == corpus.num_train_rows - len(sides[0])
    assert corpus.audit.num_rows_in_heldout == 0


def test_another_seed_holds_out_others_and_the_tail_is_refused(chats: Path, request_for: Request) -> None:
    one, other = (prepare_chats(request_for(chats, seed=seed)) for seed in (0, 1))
    assert set(learned_texts(one.heldout[0], one)) != set(learned_texts(other.heldout[0], other))
    with pytest.raises(DataError, match=r"eval_split 'tail' .* whole rows"):
        prepare_chats(request_for(chats, eval_split="tail"))


def test_an_eval_dataset_is_held_out_whole_and_overlap_is_told(
    tmp_path: Path, chats: Path, request_for: Request
) -> None:
    evaluated = write_chats(tmp_path / "eval.jsonl", [chat(seed) for seed in (3, 3, 1000, 1001)])
    corpus = prepare_chats(request_for(chats, eval_sources=(Source(str(evaluated)),)))
    assert (corpus.num_train_rows, corpus.heldout[0].num_rows) == (CHAT_COUNT, 4)
    assert (corpus.audit.num_rows_in_heldout, corpus.audit.num_heldout_rows) == (1, 4)
    assert corpus.heldout_bytes > 0


BAD_LINES = [
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}]}',
    b"{broken",
    b'{"messages": "caf\xe9"}',
    b"null",
    b'{"prompt": "a", "response": "b"}',
]


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    path = tmp_path / "spoiled.jsonl"
    good = [json.dumps(chat(seed), ensure_ascii=False).encode() for seed in range(60)]
    path.write_bytes(b"\n".join([*good[:30], *BAD_LINES, *good[30:], *[b"{broken"] * 9]) + b"\n")
    return path


def test_bad_rows_are_counted_with_their_places_in_one_error(spoiled: Path, request_for: Request) -> None:
    with pytest.raises(DataError) as error:
        prepare_chats(request_for(spoiled))
    message = str(error.value)
    assert "14 of 74 rows cannot be used" in message
    assert "broken JSON: 10 rows" in message
    for place in ("spoiled.jsonl:31: ", "spoiled.jsonl:33: not UTF-8", "spoiled.jsonl:34: ", "spoiled.jsonl:35: "):
        assert place in message
    assert "mixed formats: 1 row" in message
    assert "… and 5 more" in message
    assert "--on-bad-row skip" in message


def test_bad_rows_can_be_left_out_and_are_still_told(spoiled: Path, request_for: Request) -> None:
    corpus = prepare_chats(request_for(spoiled, on_bad_row="skip"))
    audit = corpus.audit
    assert audit.num_rows + audit.num_heldout_rows == 60
    assert (audit.num_skipped_rows, audit.skipped[0].kind, audit.skipped[0].num_rows) == (14, "broken JSON", 10)
    assert [place.origin for place in audit.skipped[0].places] == [
        "spoiled.jsonl:32",
        *(f"spoiled.jsonl:{number}" for number in range(66, 70)),
    ]


@pytest.mark.parametrize("content", [b"{broken\n{}\n", b'{"messages": [{"role": "user", "content": "x"}]}\n'])
def test_a_set_in_which_nothing_counts_is_always_an_error(tmp_path: Path, request_for: Request, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)nothing in it counts.*a\.jsonl:1"):
        prepare_chats(request_for(tmp_path / "a.jsonl", on_bad_row="skip"))


def test_an_empty_side_is_an_error_that_says_what_to_change(tmp_path: Path, request_for: Request) -> None:
    path = write_chats(tmp_path / "few.jsonl", [chat(seed) for seed in range(2)])
    with pytest.raises(DataError, match="held-out part of its 2 rows is empty"):
        prepare_chats(request_for(path, eval_fraction=0.001))
    corpus = prepare_chats(request_for(path, eval_fraction=0.0))
    assert (corpus.has_heldout, corpus.num_train_rows, list(corpus.heldout_batches(600, 2))) == (False, 2, [])


@pytest.mark.parametrize("num_rows", [4, 9])
def test_the_default_fraction_holds_out_one_of_few_rows_and_says_so(
    tmp_path: Path, request_for: Request, num_rows: int
) -> None:
    default = ChatRequest.eval_fraction
    seeds, drawn = list[int](), Split(default, "documents")
    for seed in range(100):  # none that the fraction draws
        texts = [f"{turn['role']}\x1f{turn['content']}" for turn in chat(seed)["messages"]]  # type: ignore[attr-defined]
        if not drawn.holds_out("\x1e".join(texts).encode()) and len(seeds) < num_rows:
            seeds.append(seed)
    path = write_chats(tmp_path / "few.jsonl", [chat(seed) for seed in seeds])
    asked = request_for(path, eval_fraction=default)
    corpus = prepare_chats(asked)
    audit = corpus.audit
    assert (audit.num_rows, audit.num_heldout_rows, audit.num_spared_rows) == (num_rows - 1, 1, 1)
    assert corpus.heldout[0].hashes[0] < min(corpus.train[0].hashes[:])
    again = find_prepared_chats(asked)
    assert again is not None
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(DataError, match=f"held-out part of its {num_rows} rows is empty"):
        prepare_chats(request_for(path, eval_fraction=0.001))


def test_empty_turns_of_the_system_and_new_tokens_are_in_the_audit(tmp_path: Path, request_for: Request) -> None:
    rows = [chat(seed) for seed in range(20)]
    for row in rows[:3]:
        row["messages"].insert(0, {"role": "system", "content": ""})  # type: ignore[attr-defined]
    path = write_chats(tmp_path / "a.jsonl", rows)
    audit = prepare_chats(request_for(path, chat_template="chatml", eval_fraction=0.0)).audit
    assert (audit.num_rows, audit.num_empty_system_rows) == (20, 3)
    assert audit.new_tokens == ("<|im_start|>", "<|im_end|>")
    assert prepare_chats(request_for(path, eval_fraction=0.0)).audit.new_tokens == ()


def test_a_fraction_that_draws_some_spares_none(chats: Path, request_for: Request) -> None:
    audit = prepare_chats(request_for(chats, eval_fraction=ChatRequest.eval_fraction)).audit
    assert (audit.num_heldout_rows > 1, audit.num_spared_rows) == (True, 0)


def test_what_was_prepared_is_opened_again_and_work_is_refused_where_asked(chats: Path, request_for: Request) -> None:
    asked = request_for(chats)
    assert find_prepared_chats(asked) is None
    first = prepare_chats(asked)
    again = find_prepared_chats(asked)
    assert again is not None
    assert (again.fingerprint, again.audit) == (first.fingerprint, first.audit)


@pytest.mark.parametrize("change", [{"max_seq_length": 300}, {"max_rounds": 1}, {"seed": 5}, {"eval_fraction": 0.2}])
def test_a_setting_that_decides_the_tokens_changes_the_fingerprint(
    chats: Path, request_for: Request, change: dict[str, object]
) -> None:
    assert prepare_chats(request_for(chats)).fingerprint != prepare_chats(request_for(chats, **change)).fingerprint


def test_changed_rows_and_damaged_files_are_prepared_again(chats: Path, request_for: Request) -> None:
    first = prepare_chats(request_for(chats))
    tokens = first.train[0].ids.path
    content = tokens.read_bytes()
    del first
    tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = prepare_chats(request_for(chats))
    assert again.train[0].ids.path.read_bytes() == content
    fingerprint = again.fingerprint
    write_chats(chats, [chat(seed) for seed in range(1, CHAT_COUNT)])
    assert prepare_chats(request_for(chats)).fingerprint != fingerprint


def test_a_build_that_fails_leaves_nothing_behind(
    chats: Path, request_for: Request, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DataError("the disk is gone")

    monkeypatch.setattr(build._PartWriter, "put_on_disk", fail)
    with pytest.raises(DataError, match="the disk is gone"):
        prepare_chats(request_for(chats))
    assert not [path for path in (cache / "chats").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_batches_of_any_size_give_the_same_files(
    chats: Path, request_for: Request, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare_chats(request_for(chats))
    monkeypatch.setattr("onecard.data.chats.examples.BATCH_ROWS", 7)
    other = prepare_chats(request_for(chats, cache_dir=cache / "other"))
    for name in ("ids", "is_target", "offsets", "hashes"):
        mine, theirs = (getattr(corpus.train[0], name).path.read_bytes() for corpus in (one, other))
        assert mine == theirs
    assert one.audit == other.audit


@pytest.fixture
def renderer(tokenizer: str) -> Renderer:
    loaded = load_tokenizer(tokenizer)
    return Renderer(loaded, ChatTemplate.of(loaded), Split(0.0).resolve(()), 600, None)


def rendered(ids: list[int], counts: list[int], **flaws: object) -> Rendered:
    return Rendered(np.array(ids, np.int32), np.array(counts, bool), 1, **flaws)  # type: ignore[arg-type]


def test_all_missing_files_are_told_before_anything_is_prepared(request_for: Request, chats: Path, cache: Path) -> None:
    request = request_for(chats, chats.with_name("a.jsonl"), eval_sources=(Source(str(chats.with_name("b.jsonl"))),))
    with pytest.raises(DataError, match=r"(?s)a\.jsonl'.*\n.*b\.jsonl'"):
        prepare_chats(request)
    assert not (cache / "chats").exists()


def test_the_audit_sees_double_begin_and_missing_stop(renderer: Renderer) -> None:
    bos, stop = renderer._tokenizer.bos_token_id, int(renderer._stop_ids[0])
    rows = [
        rendered([bos, bos, 5, 6, stop], [0, 0, 0, 1, 1]),
        rendered([bos, 5, 6, 7, 8], [0, 0, 1, 1, 0]),
        rendered([5, 6, stop, 7, 8, 9], [0, 1, 1, 0, 1, 1]),
        rendered([5, 6, stop, 7, 8, stop], [0, 1, 1, 0, 1, 1]),
        rendered([5, 6, 7], [0, 1, 1], is_cut=True, lost_tokens=4, lost_rounds=2),
    ]
    found = renderer._flaws(rows)
    assert (found.double_bos_rows, found.rows_without_stop) == (1, 2)
    assert (found.cut_rows, found.lost_tokens, found.dropped_rounds) == (1, 4, 2)


def test_nothing_is_kept_behind_the_last_target_and_the_first_token_is_none(renderer: Renderer) -> None:
    rows = [rendered([1, 2, 3, 4, 5], [1, 0, 1, 0, 0]), rendered([6, 7], [1, 1])]
    block = renderer._block(rows, np.array([8, 9], np.uint64), np.array([True, True]))
    assert (block.ids.tolist(), block.lengths.tolist()) == ([1, 2, 3, 6, 7], [3, 2])
    assert block.is_target.tolist() == [False, False, True, False, True]
    assert block.counts.target_tokens == 2


def test_an_id_beyond_the_vocabulary_is_refused(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="gave id 257, its vocabulary has 257 tokens"):
        renderer._block([rendered([1, 257], [0, 1])], np.zeros(1, np.uint64), np.ones(1, bool))


def test_running_text_among_chats_counts_from_its_second_token(tmp_path: Path, request_for: Request) -> None:
    path = write_chats(tmp_path / "text.jsonl", [{"text": "jade elixir"}, {"text": "a fox"}])
    corpus = prepare_chats(request_for(path, eval_fraction=0.0))
    ids, is_target = corpus.train[0].row(0)
    assert is_target.tolist() == [False] + [True] * (len(ids) - 1)
    assert len(ids) >= len("jade elixir")


def test_only_two_batches_are_read_ahead(chats: Path, request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0

    class CountingReader(ExampleReader):
        def batches(self) -> Iterator[ExampleBatch]:
            nonlocal num_read
            for batch in super().batches():
                num_read += 1
                yield batch

    ahead = list[int]()
    monkeypatch.setattr("onecard.data.chats.examples.BATCH_ROWS", 10)
    monkeypatch.setattr(build, "ExampleReader", CountingReader)
    # First comes the start of the build.
    prepare_chats(request_for(chats), lambda stage, *_: ahead.append(num_read) if "chats" in stage else None)
    assert num_read == CHAT_COUNT // 10
    assert ahead == [0, *range(3, 20), 20, 20, 20]


def test_samples_show_what_counts(chats: Path, request_for: Request) -> None:
    sample = prepare_chats(request_for(chats)).audit.samples[0]
    assert sample.origin == "chats.jsonl:1"
    counted = "".join(text for text, counts in sample.spans if counts)
    others = "".join(text for text, counts in sample.spans if not counts)
    assert str(chat(0)["messages"][1]["content"]) in counted  # type: ignore[index]
    assert str(chat(0)["messages"][0]["content"]) in others  # type: ignore[index]


def targets_of(batches: list[Batch]) -> list[int]:
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    return sorted(targets[targets != NO_TARGET].tolist())


def test_streams_and_heldout_batches_hold_the_same_targets_however_they_are_packed(
    chats: Path, request_for: Request
) -> None:
    corpus = prepare_chats(request_for(chats))
    found = []
    for packing in ("off", "rows", "flat"):
        with corpus.open_stream(StreamSettings(16, 4, packing=packing), 7, 600, position=32) as stream:
            found.append([targets_of(next(stream)) for _ in range(3)])
    assert found[0] == found[1] == found[2]
    heldout = [targets_of(list(corpus.heldout_batches(600, size))) for size in (1, 7)]
    assert heldout[0] == heldout[1]
    assert len(heldout[0]) == corpus.num_heldout_target_tokens
    with pytest.raises(InputError, match="prepared for 600 tokens"):
        corpus.open_stream(StreamSettings(16, 4), 7, 300)


def test_hashes_are_sorted_where_they_lie(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 5000).astype("<u8")
    hashes.tofile(tmp_path / "hashes")
    _sort_file(tmp_path / "hashes")
    assert np.fromfile(tmp_path / "hashes", "<u8").tolist() == sorted(hashes.tolist())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, request_for: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anonymous_kib() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("RssAnon:")[1].split()[0])

    monkeypatch.setattr("onecard.data.chats.examples.BATCH_ROWS", 100)
    with (tmp_path / "many.jsonl").open("w", encoding="utf-8") as stream:
        for seed in range(10_000):
            # Few different texts: the tokenizer remembers ten thousand of them.
            stream.write(json.dumps(chat(seed % 300)) + "\n")
    seen = list[int]()
    prepare_chats(request_for(tmp_path / "many.jsonl"), lambda *_: seen.append(anonymous_kib()))
    assert len(seen) > 90
    assert max(seen[30:]) - max(seen[:30]) < 10 * 1024


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_progress_tells_rows_of_about_as_many_as_there_are(
    kind: str, chats: Path, request_for: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.data.chats.examples.BATCH_ROWS", 50)
    monkeypatch.setattr("onecard.data.chats.rows._HEAD_BYTES", 2000)
    rows = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / f"other.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(chats.read_text(encoding="utf-8") if kind == "jsonl" else json.dumps(rows), encoding="utf-8")
    told = []
    prepare_chats(request_for(path), lambda *words: told.append(words))
    counted = [(done, total) for stage, done, total in told if stage == "preparing chats"]
    assert [done for done, _ in counted] == [0, 50, 100, 150, 200]
    totals = {total for _, total in counted[1:]}
    if kind == "jsonl":
        assert all(total is not None and 0.8 * CHAT_COUNT < total < 1.2 * CHAT_COUNT for total in totals)
    else:
        assert totals == {None if kind == "json" else CHAT_COUNT}
