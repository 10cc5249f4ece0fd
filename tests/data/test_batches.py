"""Batches: targets are the next tokens, documents are told apart, workers change nothing, held-out is exact."""

import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onecard.data.batches import NO_TARGET, Batch, BlockSteps, gather_batch, heldout_batches, share_rows
from onecard.data.sampler import BlockSampler
from onecard.data.stream import BatchStream, StreamSettings
from onecard.data.token_file import TokenFile
from onecard.errors import DataError, InputError

SEP = 0
IDS = np.random.default_rng(0).integers(0, 50, 4001).astype("<u2")


def write_tokens(path: Path, ids: np.ndarray) -> TokenFile:
    ids.astype("<u2").tofile(path)
    return TokenFile(path, "<u2", len(ids))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.bin", IDS)


def stream_from(tokens: TokenFile, position: int = 0, **settings: int) -> BatchStream:
    sampler = BlockSampler([len(tokens)], [1.0], 16, seed=5)
    asked = StreamSettings(**{"samples_per_step": 10, "micro_batch_size": 4, **settings})
    return BatchStream(BlockSteps([tokens], sampler, SEP, asked.micro_batch_size), asked, position)


def same(one: Batch, other: Batch) -> bool:
    if (one.documents is None) != (other.documents is None) or one.num_targets != other.num_targets:
        return False
    documents = one.documents is None or torch.equal(one.documents, other.documents)
    return documents and torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


def test_targets_are_the_next_tokens_of_the_file(tokens: TokenFile) -> None:
    sampler = BlockSampler([len(tokens)], [1.0], 16, seed=5)
    positions = np.arange(30, 38)
    batch = gather_batch([tokens], sampler, positions, SEP)
    _, starts = sampler.locate(positions)
    assert (batch.ids.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    for row, start in enumerate(starts):
        assert batch.ids[row].tolist() == IDS[start : start + 16].tolist()
        assert batch.targets[row].tolist() == IDS[start + 1 : start + 17].tolist()
    assert batch.num_targets == 8 * 16 == (batch.targets != NO_TARGET).sum()


def test_each_row_reads_from_its_own_source(tmp_path: Path) -> None:
    files = [write_tokens(tmp_path / f"{value}.bin", np.full(200, value)) for value in (7, 8)]
    sampler = BlockSampler([200, 200], [1, 3], 10, seed=0)
    batch = gather_batch(files, sampler, np.arange(8), SEP)
    assert batch.ids[:, 0].tolist() == [7 + source for source in sampler.locate(np.arange(8))[0]]
    assert sorted(batch.ids[:, 0].tolist()) == [7, 7] + [8] * 6


def test_documents_rise_at_each_separator_inside_a_row(tmp_path: Path) -> None:
    ids = np.array([SEP, 5, 6, SEP, 7, SEP, 8, 9, 9, 9, 9, 9, 9])
    (batch,) = heldout_batches(write_tokens(tmp_path / "a.bin", ids), 6, 4, SEP)
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]
    assert batch.documents.dtype == torch.int32


def test_no_inner_border_needs_no_document_numbers(tmp_path: Path) -> None:
    # A separator at the start of a row, as a last target, or as padding is no border inside.
    ids = np.array([SEP, 1, 2, SEP, 1, 2, SEP])
    batches = list(heldout_batches(write_tokens(tmp_path / "a.bin", ids), 3, 2, SEP))
    padded = list(heldout_batches(write_tokens(tmp_path / "b.bin", ids), 30, 2, SEP))
    assert [batch.documents for batch in batches] == [None]
    assert padded[0].documents is not None
    assert padded[0].documents[0].tolist() == [0, 0, 0, 1, 1, 1] + [1] * 24


@given(
    ids=st.lists(st.integers(0, 4), min_size=2, max_size=120),
    length=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_heldout_targets_each_token_once_whatever_the_batch_size(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], length: int, sizes: tuple[int, int]
) -> None:
    file = write_tokens(tmp_path_factory.getbasetemp() / "heldout.bin", np.array(ids))
    rows = []
    for size in sizes:
        batches = list(heldout_batches(file, length, size, SEP))
        targets = torch.cat([batch.targets for batch in batches]).flatten()
        assert targets[targets != NO_TARGET].tolist() == ids[1:]
        assert sum(batch.num_targets for batch in batches) == len(ids) - 1
        rows.append(torch.cat([batch.ids for batch in batches]).tolist())
    assert rows[0] == rows[1]


def test_a_limit_takes_blocks_from_the_whole_heldout_part(tokens: TokenFile) -> None:
    batches = list(heldout_batches(tokens, 20, 5, SEP, limit_rows=20))
    everything = torch.cat([batch.ids for batch in heldout_batches(tokens, 20, 5, SEP)])
    chosen = torch.cat([batch.ids for batch in batches])
    places = [int((everything == row).all(dim=1).nonzero()[0]) for row in chosen]
    assert len(places) == 20
    assert places == list(range(0, 200, 10))
    assert len(list(heldout_batches(tokens, 20, 5, SEP, limit_rows=1000))) == 40


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_come_in_order_from_any_position_with_any_workers(tokens: TokenFile, workers: int) -> None:
    sampler = BlockSampler([len(tokens)], [1.0], 16, seed=5)
    with stream_from(tokens, position=70, num_workers=workers) as stream:
        for step in range(150):
            batches = next(stream)
            assert [len(batch.ids) for batch in batches] == [4, 4, 2]
            positions = 70 + step * 10 + np.arange(10)
            for batch, part in zip(batches, np.split(positions, [4, 8]), strict=True):
                assert same(batch, gather_batch([tokens], sampler, part, SEP))
            assert stream.position == 70 + (step + 1) * 10


def test_micro_batches_join_to_the_same_step(tokens: TokenFile) -> None:
    with stream_from(tokens) as small, stream_from(tokens, micro_batch_size=10) as whole:
        (one,) = next(whole)
        assert torch.equal(torch.cat([batch.ids for batch in next(small)]), one.ids)


class SlowFile:
    """A token file on a slow disk, which breaks after some reads."""

    def __init__(self, file: TokenFile, delay_s: float = 0.0, breaks_after: int = 10**9) -> None:
        self.file, self.delay_s, self.reads_left = file, delay_s, breaks_after
        self.threads: set[str] = set()
        self.lock = threading.Lock()

    def __getitem__(self, tokens: slice) -> np.ndarray:
        with self.lock:
            self.threads.add(threading.current_thread().name)
            self.reads_left -= 1
            if self.reads_left < 0:
                raise DataError("the disk is gone")
        time.sleep(self.delay_s)
        return self.file[tokens]


def slow_stream(file: SlowFile, **settings: int) -> BatchStream:
    sampler = BlockSampler([len(IDS)], [1.0], 16, seed=5)
    asked = StreamSettings(samples_per_step=10, micro_batch_size=10, **settings)
    return BatchStream(BlockSteps([file], sampler, SEP, 10), asked)  # type: ignore[list-item]


def test_waiting_is_measured_and_workers_take_it_away(tokens: TokenFile) -> None:
    with slow_stream(SlowFile(tokens, 0.01)) as stream:
        next(stream)
        assert stream.wait_s >= 0.1
    file = SlowFile(tokens, 0.01)
    with slow_stream(file, num_workers=2, prefetch_factor=2) as stream:
        next(stream)
        time.sleep(0.6)
        next(stream)
        assert stream.wait_s < 0.1
    assert all(name.startswith("onecard-data") for name in file.threads)
    assert len(file.threads) == 2


def test_only_as_many_steps_are_ahead_as_asked(tokens: TokenFile) -> None:
    file = SlowFile(tokens)
    with slow_stream(file, num_workers=2, prefetch_factor=3) as stream:
        next(stream)
        time.sleep(0.3)
        assert 10**9 - file.reads_left == (1 + 2 * 3) * 10


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_caller_in_its_place(tokens: TokenFile, workers: int) -> None:
    with slow_stream(SlowFile(tokens, breaks_after=25), num_workers=workers) as stream:
        if workers == 0:
            next(stream)
            next(stream)
        with pytest.raises(DataError, match="the disk is gone"):
            list(islice(stream, 9))


def test_closing_ends_the_workers(tokens: TokenFile) -> None:
    before = threading.active_count()
    stream = stream_from(tokens, num_workers=3)
    next(stream)
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_settings_that_cannot_be_are_told_together() -> None:
    with pytest.raises(InputError, match=r"micro_batch_size is 0.*dataloader_num_workers is -1"):
        StreamSettings(samples_per_step=8, micro_batch_size=0, num_workers=-1)


def test_token_file_is_read_only(tokens: TokenFile) -> None:
    with pytest.raises(ValueError, match="read-only"):
        tokens[:10][0] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def anonymous_kib() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("RssAnon:")[1].split()[0])

    num_tokens = 200_000_000
    with (tmp_path / "large.bin").open("wb") as stream:
        stream.truncate(2 * num_tokens)
    file = TokenFile(tmp_path / "large.bin", "<u2", num_tokens)
    sampler = BlockSampler([num_tokens], [1.0], 1024, seed=0)
    with BatchStream(BlockSteps([file], sampler, 1, 8), StreamSettings(24, 8, num_workers=1)) as steps:
        next(steps)
        before = anonymous_kib()
        for _ in range(200):
            next(steps)
    assert anonymous_kib() - before < 40 * 1024


def test_a_limit_of_batches_holds_over_all_heldout_parts() -> None:
    assert share_rows([900, 90, 10], 10) == [9, 1, 1]
    assert share_rows([5, 5], 1) == [1, 1]
    assert share_rows([5, 5], None) == [None, None]
