"""The order of blocks is a permutation per epoch, the same whatever was asked before, and mixed by weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.data.sampler import BlockSampler, IndexSampler, _mixing_pattern, heldout_blocks, permute
from onecard.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_one_to_one(size: int, key: int) -> None:
    result = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(result.tolist()) == list(range(size))


@given(tokens=st.integers(2, 3000), length=st.integers(1, 90), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_an_epoch_visits_every_block_once_and_inside_the_file(tokens: int, length: int, seed: int, epoch: int) -> None:
    length = min(length, tokens - 1)
    sampler = BlockSampler([tokens], [1.0], length, seed)
    count = sampler.blocks_per_epoch
    _, starts = sampler.locate(np.arange(epoch * count, (epoch + 1) * count))
    ordered = np.sort(starts)
    assert (np.diff(ordered) == length).all()
    assert 0 <= ordered[0] < length
    assert ordered[-1] + length + 1 <= tokens
    # What an epoch leaves out is never as much as two blocks.
    assert tokens - count * length < 2 * length + 1


@given(seed=SEEDS, first=st.integers(0, 10**9), shuffle=st.booleans())
def test_any_position_is_reached_at_once(seed: int, first: int, shuffle: bool) -> None:
    sampler = BlockSampler([5000, 900], [0.7, 0.3], 32, seed, shuffle)
    together = sampler.locate(np.arange(first, first + 40))
    alone = [sampler.locate(np.array([position])) for position in range(first, first + 40)]
    for side in (0, 1):
        assert together[side].tolist() == [entry[side].item() for entry in alone]
    assert sampler.locate(first)[1].item() == together[1][0]


def test_seeds_and_epochs_differ_and_borders_move() -> None:
    sampler = BlockSampler([100_001], [1.0], 100, 7)
    count = sampler.blocks_per_epoch
    epochs = [sampler.locate(np.arange(count) + epoch * count)[1] for epoch in range(20)]
    other = BlockSampler([100_001], [1.0], 100, 8).locate(np.arange(count))[1]
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (epochs[0] != other).mean() > 0.9
    assert len({int(epoch.min()) for epoch in epochs}) > 12


def test_order_looks_random() -> None:
    size = 10_000
    order = permute(np.arange(size), np.full(size, size), np.full(size, 12345, dtype=np.uint64))
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    # Every tenth of an epoch draws about evenly from every tenth of the file: 81 degrees of freedom.
    table = np.histogram2d(np.arange(size), order, bins=10)[0]
    assert ((table - 100) ** 2 / 100).sum() < 150


@pytest.mark.parametrize("size", [3, 4, 5])
def test_small_permutations_come_up_about_evenly(size: int) -> None:
    trials = 6000
    keys = np.repeat(np.random.default_rng(size).integers(0, 2**63, trials).astype(np.uint64), size)
    ranks = np.tile(np.arange(size), trials)
    first = permute(ranks, np.full(size * trials, size), keys).reshape(trials, size)[:, 0]
    counts = np.bincount(first, minlength=size)
    np.testing.assert_allclose(counts, trials / size, rtol=0.2)


def test_without_shuffling_blocks_come_in_order() -> None:
    sampler = BlockSampler([101], [1.0], 20, 3, shuffle=False)
    assert sampler.locate(np.arange(7))[1].tolist() == [0, 20, 40, 60, 80, 0, 20]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6),
    start=st.integers(0, 10**7),
    window=st.integers(1, 3000),
)
def test_every_window_holds_each_source_by_its_share(weights: list[float], start: int, window: int) -> None:
    sampler = BlockSampler([10_000] * len(weights), weights, 10, 0)
    sources, _ = sampler.locate(np.arange(start, start + window))
    shares = np.asarray(weights) / sum(weights)
    counts = np.bincount(sources, minlength=len(weights))
    # Two prefixes, each within 1; shares are rounded to 1/4096.
    assert (np.abs(counts - window * shares) < 2 + window * len(weights) / 4096).all()


@given(shares=st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_no_prefix_of_the_mix_is_off_by_more_than_the_proven_bound(shares: list[int]) -> None:
    pattern, _, counts = _mixing_pattern(np.array(shares, dtype=np.float64))
    chosen = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    due = np.arange(1, len(pattern) + 1)[:, None] * counts / counts.sum()
    assert (counts * sum(shares) == np.array(shares) * counts.sum()).all()
    assert np.abs(chosen - due).max() <= 1 - 1 / (2 * len(shares) - 2) + 1e-9


def test_equal_shares_alternate_and_each_source_runs_through_its_own_epoch() -> None:
    sampler = BlockSampler([61, 41], [1, 1], 10, 5, shuffle=False)
    sources, starts = sampler.locate(np.arange(12))
    assert sorted(sources[:2].tolist()) == [0, 1]
    assert starts[sources == 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert starts[sources == 1].tolist() == [0, 10, 20, 30, 0, 10]
    assert sampler.blocks_per_epoch == 10


def test_a_corpus_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(DataError, match=r"source 1 has 100 training tokens, fewer than one block of 100 "):
        BlockSampler([5000, 100], [1, 1], 100, 0)
    assert BlockSampler([101], [1], 100, 0).locate(np.arange(3))[1].tolist() == [0, 0, 0]


@given(tokens=st.integers(0, 500), length=st.integers(1, 60))
def test_heldout_blocks_cover_every_target_once(tokens: int, length: int) -> None:
    starts, lengths = heldout_blocks(tokens, length)
    targets = [start + 1 + index for start, count in zip(starts, lengths, strict=True) for index in range(count)]
    assert targets == list(range(1, tokens))


def test_the_orders_of_earlier_versions_stay() -> None:
    # A run that is resumed must see the blocks it would have seen: written by the sampler of 0.1.
    sampler = BlockSampler([5000, 900, 77], [0.7, 0.2, 0.1], 32, 1337)
    sources, starts = sampler.locate(np.arange(1_000_000, 1_000_012))
    assert sources.tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0]
    assert starts.tolist() == [877, 4429, 461, 1069, 1357, 22, 2157, 941, 141, 1261, 2509, 1293]


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_items_come_once_in_every_epoch_of_their_source(sizes: list[int], seed: int, epoch: int) -> None:
    order = IndexSampler(sizes, [float(size) for size in sizes], seed)
    positions = np.arange(epoch * sum(sizes), (epoch + 1) * sum(sizes))
    sources, items = order.locate(positions)
    for source, size in enumerate(sizes):
        assert sorted(items[sources == source].tolist()) == list(range(size))
