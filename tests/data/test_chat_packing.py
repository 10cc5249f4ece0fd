"""Packing: every conversation once, no row too long, the work shared evenly; targets as without packing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onecard.data.batches import NO_TARGET, Batch
from onecard.data.chats.batches import BatchShape, ChatSteps, heldout_chats, lay_out
from onecard.data.chats.chat_file import Conversations
from onecard.data.chats.packing import Packing, pack
from onecard.data.sampler import IndexSampler
from onecard.data.stream import BatchStream, StreamSettings
from onecard.data.token_file import TokenFile

PACKINGS: tuple[Packing, ...] = ("off", "rows", "flat")
PAD = 9999
LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)


def write_chats(folder: Path, lengths: list[int], first_id: int = 0) -> Conversations:
    """Conversations whose ids are all different; of each, about every other token counts."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(lengths)
    rng = np.random.default_rng(total)
    contents = {
        "ids": (np.arange(first_id, first_id + total).astype("<u4"), "<u4"),
        "targets": (rng.integers(0, 2, total).astype("|u1"), "|u1"),
        "rows": (np.cumsum([0, *lengths]).astype("<i8"), "<i8"),
        "hashes": (np.arange(len(lengths)).astype("<u8"), "<u8"),
    }
    files = []
    for name, (content, dtype) in contents.items():
        content.tofile(folder / name)
        files.append(TokenFile(folder / name, dtype, len(content)))
    return Conversations(*files)


def stream_of(chats: list[Conversations], position: int = 0, capacity: int = 64, **settings: object) -> BatchStream:
    asked = StreamSettings(**{"samples_per_step": 12, "micro_batch_size": 3, **settings})  # type: ignore[arg-type]
    shape = BatchShape(capacity, asked.micro_batch_size, asked.packing, asked.static_shapes)
    sampler = IndexSampler([part.num_rows for part in chats], [1.0] * len(chats), seed=3)
    return BatchStream(ChatSteps(chats, sampler, shape, PAD), asked, position)


def conversations_in(batch: Batch) -> dict[int, tuple[list[int], list[int]]]:
    """First id -> inputs and targets of each conversation in a batch, padding left out."""
    found = {}
    documents = torch.zeros_like(batch.ids) if batch.documents is None else batch.documents
    for ids, targets, numbers in zip(batch.ids, batch.targets, documents, strict=True):
        for number in numbers.unique():
            mine = numbers == number
            inputs = [token for token in ids[mine].tolist() if token != PAD]
            if inputs:
                assert inputs[0] not in found
                found[inputs[0]] = inputs, targets[mine].tolist()[: len(inputs)]
    return found


@given(lengths=LENGTHS, extra=st.integers(0, 40), rows=st.integers(1, 9), packing=st.sampled_from(PACKINGS))
def test_every_conversation_has_one_place_and_no_row_is_too_long(
    lengths: list[int], extra: int, rows: int, packing: Packing
) -> None:
    sizes, capacity = np.array(lengths), max(lengths) + extra
    micro_batches = pack(sizes, capacity, rows, packing)
    assert sorted(index for batch in micro_batches for row in batch for index in row) == list(range(len(lengths)))
    limit = capacity * rows if packing == "flat" else capacity
    assert all(sizes[row].sum() <= limit for batch in micro_batches for row in batch)
    assert all(len(batch) <= (1 if packing == "flat" else rows) and all(batch) for batch in micro_batches)
    if packing == "off":
        assert [row for batch in micro_batches for row in batch] == [[index] for index in range(len(lengths))]


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The fewest rows that hold all, by trying: best[subset] is rows used and how full the last one is."""
    best = {0: (1, 0)}
    for subset in range(1, 1 << len(lengths)):
        ways = []
        for index, length in enumerate(lengths):
            if subset >> index & 1:
                num_rows, load = best[subset & ~(1 << index)]
                ways.append((num_rows, load + length) if load + length <= capacity else (num_rows + 1, length))
        best[subset] = min(ways)
    return best[(1 << len(lengths)) - 1][0]


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=7), rows=st.integers(1, 3))
def test_packing_needs_about_as_few_micro_batches_as_can_be(lengths: list[int], rows: int) -> None:
    sizes = np.array(lengths)
    # First-fit decreasing: at most 11/9 of the fewest rows and 6/9 of one.
    most = (11 * fewest_rows(lengths, 64) + 6) // 9
    assert len(pack(sizes, 64, rows, "rows")) <= -(-most // rows)
    assert len(pack(sizes, 64, rows, "flat")) <= (11 * fewest_rows(lengths, 64 * rows) + 6) // 9


@pytest.mark.parametrize("packing", ["rows", "flat"])
def test_work_is_shared_evenly(packing: Packing) -> None:
    sizes = np.random.default_rng(1).integers(20, 200, 128)
    work = [sum(int(sizes[row].sum()) for row in batch) for batch in pack(sizes, 1024, 4, packing)]
    assert len(work) > 2
    assert max(work) < 1.05 * min(work)


def test_rows_are_short_where_that_costs_no_padding() -> None:
    (batch,) = pack(np.full(64, 100), 1024, 16, "rows")
    assert [len(row) for row in batch] == [4] * 16
    # A long one among short ones sets the width: then few rows are full of them.
    (batch,) = pack(np.array([1000, *[100] * 20]), 1024, 16, "rows")
    assert len(batch) == 3


def test_a_conversation_longer_than_a_row_is_no_silent_cut() -> None:
    with pytest.raises(ValueError, match="65 tokens does not fit a row of 64"):
        pack(np.array([3, 65]), 64, 2, "rows")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_inputs_and_targets_are_those_of_each_conversation_alone(
    tmp_path: Path, packing: Packing, static: bool
) -> None:
    lengths = np.random.default_rng(2).integers(2, 60, 40).tolist()
    chats = write_chats(tmp_path, lengths)
    with stream_of([chats], packing=packing, static_shapes=static, samples_per_step=40) as stream:
        batches = next(stream)
    found = {first: entry for batch in batches for first, entry in conversations_in(batch).items()}
    assert len(found) == 40
    for index in range(40):
        ids, is_target = chats.row(index)
        expected = [int(token) if counts else NO_TARGET for token, counts in zip(ids[1:], is_target[1:], strict=True)]
        assert found[int(ids[0])] == (ids[:-1].tolist(), expected)
    for batch in batches:
        assert (batch.ids.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert batch.documents is None or batch.documents.dtype == torch.int32
        assert batch.num_targets == int((batch.targets != NO_TARGET).sum())
        assert (batch.targets[batch.ids == PAD] == NO_TARGET).all()
        if packing == "flat":
            assert not (batch.ids == PAD).any()
        elif static:
            assert batch.ids.shape == (3, 64)
        else:
            assert batch.ids.shape[1] % 8 == 0
            assert batch.ids.shape[1] < int((batch.ids != PAD).sum(1).max()) + 8


def test_padding_shares_no_document_with_a_conversation_and_one_per_row_needs_no_borders() -> None:
    pairs = [(np.arange(5), np.arange(5)), (np.arange(6), np.arange(6)), (np.arange(2), np.arange(2))]
    (packed,) = lay_out(pairs, BatchShape(8, 2, "rows"), PAD)
    assert packed.documents is not None
    assert packed.documents.tolist() == [[0] * 5 + [1] * 2 + [2], [0] * 6 + [1] * 2]
    assert all(batch.documents is None for batch in lay_out(pairs, BatchShape(16, 2, "off"), PAD))
    # A width beyond the model's positions would not be.
    assert lay_out(pairs, BatchShape(6, 4, "off"), PAD)[0].ids.shape == (3, 6)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_anywhere_and_an_epoch_sees_each_conversation_once(
    tmp_path: Path, packing: Packing, workers: int
) -> None:
    chats = write_chats(tmp_path, np.random.default_rng(4).integers(2, 60, 60).tolist())
    settings = {"packing": packing, "num_workers": workers}
    with stream_of([chats], **settings) as stream:
        steps = [next(stream) for _ in range(10)]
        assert stream.position == 120
    with stream_of([chats], position=48, **settings) as resumed:
        for step in steps[4:]:
            for one, other in zip(step, next(resumed), strict=True):
                assert torch.equal(one.ids, other.ids)
                assert torch.equal(one.targets, other.targets)
    epochs = [
        [first for step in half for batch in step for first in conversations_in(batch)]
        for half in (steps[:5], steps[5:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == chats.offsets[:-1].tolist()
    assert epochs[0] != epochs[1]


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    chats = [write_chats(tmp_path / "a", [5] * 30), write_chats(tmp_path / "b", [5] * 90, first_id=1000)]
    with stream_of(chats, samples_per_step=20) as stream:
        firsts = [first for _ in range(3) for batch in next(stream) for first in conversations_in(batch)]
    assert sum(first >= 1000 for first in firsts) == 30


@given(lengths=LENGTHS, sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_heldout_conversations_come_once_whatever_the_batch_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sizes: tuple[int, int]
) -> None:
    lengths = [length + 1 for length in lengths]
    chats = write_chats(tmp_path_factory.mktemp("heldout"), lengths)
    found = []
    for size in sizes:
        batches = list(heldout_chats(chats, BatchShape(64, size), PAD))
        assert all(batch.documents is None and len(batch.ids) <= size for batch in batches)
        found.append({first: entry for batch in batches for first, entry in conversations_in(batch).items()})
    assert found[0] == found[1]
    assert sorted(found[0]) == chats.offsets[:-1].tolist()


def test_a_limit_takes_heldout_conversations_from_all_over(tmp_path: Path) -> None:
    chats = write_chats(tmp_path, [3] * 100)
    batches = list(heldout_chats(chats, BatchShape(64, 5), PAD, limit_rows=20))
    assert sorted(first // 3 for batch in batches for first in conversations_in(batch)) == list(range(0, 100, 5))
    assert sum(len(batch.ids) for batch in heldout_chats(chats, BatchShape(64, 5), PAD, limit_rows=999)) == 100
