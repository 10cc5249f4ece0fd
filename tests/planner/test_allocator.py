"""Each rule of the caching allocator on a case small enough to work out by hand."""

import pytest

from onecard.planner.allocator import Allocator, SimulatedOutOfMemory
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.units import KIB, MIB

ARENA = AllocatorSettings(expandable_segments=True)


def sizes(allocator: Allocator) -> list[list[int]]:
    """Block sizes of every segment in MiB, free ones negative."""
    return [
        [block.num_bytes // MIB * (1 if block.is_allocated else -1) for block in segment]
        for segment in allocator.segments()
    ]


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB)])
def test_sizes_are_rounded_to_512_bytes(asked: int, block: int) -> None:
    allocator = Allocator()
    allocator.allocate(asked)
    assert (allocator.requested_bytes, allocator.allocated_bytes) == (asked, block)


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_miss_takes_a_segment_of_its_class(asked: int, segment: int) -> None:
    allocator = Allocator()
    allocator.allocate(asked)
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == segment


def test_large_segments_can_be_made_larger() -> None:
    allocator = Allocator(AllocatorSettings(large_segment_bytes=32 * MIB))
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 32 * MIB
    allocator.allocate(12 * MIB)
    assert sizes(allocator) == [[9, 12, -11]]


@pytest.mark.parametrize(
    ("asked", "block"),
    [
        (1200 * KIB, 1280 * KIB),
        (1024 * KIB, 1024 * KIB),
        (1537 * KIB, 1792 * KIB),
        (1793 * KIB, 2048 * KIB),
        (2048, 2048),
        (2049, 2560),
        (1100, 1536),
    ],
)
def test_four_divisions_round_to_quarters_of_a_power_of_two(asked: int, block: int) -> None:
    allocator = Allocator(AllocatorSettings(roundup_power2_divisions=(4,) * 16))
    allocator.allocate(asked)
    assert allocator.allocated_bytes == block


def test_divisions_depend_on_the_size() -> None:
    table = (0, 2, 0, 4, *[0] * 12)
    for asked, block in ((1025 * KIB, 1025 * KIB), (2049 * KIB, 3 * MIB), (5 * MIB, 5 * MIB), (9 * MIB, 10 * MIB)):
        allocator = Allocator(AllocatorSettings(roundup_power2_divisions=table))
        allocator.allocate(asked)
        assert allocator.allocated_bytes == block


def test_small_remainders_are_kept_from_512_bytes_on() -> None:
    allocator = Allocator()
    allocator.allocate(MIB)
    allocator.allocate(MIB - 512)
    allocator.allocate(512)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 2 * MIB


def test_large_remainders_are_kept_only_above_one_mib() -> None:
    split, whole = Allocator(), Allocator()
    split.allocate(11 * MIB - 512)
    whole.allocate(11 * MIB)
    assert [len(allocator.segments()[0]) for allocator in (split, whole)] == [2, 1]
    assert (split.allocated_bytes, whole.allocated_bytes) == (11 * MIB - 512, 12 * MIB)


def test_the_smallest_fitting_block_is_taken_and_the_lowest_among_equals() -> None:
    allocator = Allocator()
    handles = [allocator.allocate(mib * MIB) for mib in (40, 12, 30, 12)]
    for handle in reversed(handles):
        allocator.free(handle)
    assert allocator.allocate(12 * MIB) == handles[1]
    assert allocator.allocate(12 * MIB) == handles[3]
    assert allocator.allocate(31 * MIB) == handles[0]
    assert allocator.reserved_bytes == 94 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_neighbours_merge_in_every_order(order: tuple[int, ...]) -> None:
    allocator = Allocator()
    handles = [allocator.allocate(mib * MIB) for mib in (5, 4, 6)]
    assert sizes(allocator) == [[5, 4, 6, -5]]
    for index in order:
        allocator.free(handles[index])
    assert sizes(allocator) == [[-20]]


def test_blocks_of_different_segments_never_merge() -> None:
    allocator = Allocator()
    for handle in [allocator.allocate(10 * MIB), allocator.allocate(10 * MIB)]:
        allocator.free(handle)
    assert sizes(allocator) == [[-10], [-10]]


def test_small_and_large_requests_do_not_share_segments() -> None:
    allocator = Allocator()
    allocator.free(allocator.allocate(12 * MIB))
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 14 * MIB


def test_streams_do_not_share_blocks() -> None:
    allocator = Allocator()
    handle = allocator.allocate(12 * MIB, stream=1)
    allocator.free(handle)
    assert allocator.allocate(12 * MIB, stream=2) != handle
    assert allocator.allocate(12 * MIB, stream=1) == handle
    assert allocator.reserved_bytes == 24 * MIB


def test_peaks_stay_when_memory_goes() -> None:
    allocator = Allocator()
    allocator.free(allocator.allocate(12 * MIB))
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.requested_bytes, allocator.reserved_bytes) == (0, 0, 0)
    allocator.allocate(1)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (12 * MIB, 12 * MIB)


def test_zero_bytes_take_nothing() -> None:
    allocator = Allocator()
    for _ in range(2):
        allocator.free(allocator.allocate(0))
    assert allocator.peak_reserved_bytes == 0


def test_misuse_is_told() -> None:
    allocator = Allocator()
    handle = allocator.allocate(1)
    allocator.free(handle)
    with pytest.raises(ValueError, match="nothing is allocated"):
        allocator.free(handle)
    with pytest.raises(ValueError, match="-1"):
        allocator.allocate(-1)


def test_emptying_the_cache_keeps_split_segments() -> None:
    allocator = Allocator()
    allocator.allocate(4 * MIB)
    allocator.free(allocator.allocate(16 * MIB))
    allocator.free(allocator.allocate(1))
    assert allocator.reserved_bytes == 22 * MIB
    allocator.empty_cache()
    assert sizes(allocator) == [[4, -16]]


def test_the_cap_releases_unsplit_segments_and_goes_on() -> None:
    allocator = Allocator(cap_bytes=64 * MIB)
    allocator.allocate(4 * MIB)
    for handle in [allocator.allocate(30 * MIB), allocator.allocate(12 * MIB, stream=1)]:
        allocator.free(handle)
    allocator.allocate(32 * MIB)
    assert sizes(allocator) == [[4, -16], [32]]
    allocator.allocate(12 * MIB)
    assert allocator.reserved_bytes == 52 * MIB


def test_a_segment_that_fills_the_cap_exactly_fits() -> None:
    allocator = Allocator(cap_bytes=64 * MIB)
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_out_of_memory_says_what_was_there_and_leaves_the_cache_released() -> None:
    allocator = Allocator(cap_bytes=64 * MIB)
    allocator.allocate(40 * MIB)
    allocator.free(allocator.allocate(20 * MIB))
    with pytest.raises(SimulatedOutOfMemory) as caught:
        allocator.allocate(25 * MIB)
    error = caught.value
    assert (error.requested_bytes, error.reserved_bytes, error.cap_bytes) == (26 * MIB, 40 * MIB, 64 * MIB)
    assert "26.0 MiB" in str(error)
    allocator.allocate(24 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_oversize_blocks_are_not_split_and_serve_only_oversize_requests() -> None:
    allocator = Allocator(AllocatorSettings(max_split_bytes=64 * MIB))
    handle = allocator.allocate(65 * MIB)
    assert sizes(allocator) == [[66]]
    allocator.free(handle)
    allocator.allocate(63 * MIB)
    assert sizes(allocator) == [[-66], [64]]
    assert allocator.allocate(64 * MIB) == handle


def test_oversize_requests_waste_less_than_twenty_mib() -> None:
    allocator = Allocator(AllocatorSettings(max_split_bytes=64 * MIB))
    handle = allocator.allocate(100 * MIB)
    allocator.free(handle)
    other = allocator.allocate(80 * MIB)
    assert other != handle
    assert allocator.allocate(80 * MIB + 512) == handle
    assert allocator.allocated_bytes == 180 * MIB


def test_the_cap_releases_one_sufficient_oversize_block_first() -> None:
    allocator = Allocator(AllocatorSettings(max_split_bytes=32 * MIB), cap_bytes=200 * MIB)
    for handle in [allocator.allocate(mib * MIB) for mib in (70, 110, 12)]:
        allocator.free(handle)
    allocator.allocate(40 * MIB)
    assert sizes(allocator) == [[-110], [-12], [40]]


def test_the_cap_releases_the_largest_oversize_blocks_until_they_suffice() -> None:
    allocator = Allocator(AllocatorSettings(max_split_bytes=32 * MIB), cap_bytes=160 * MIB)
    for handle in [allocator.allocate(mib * MIB) for mib in (40, 50, 44, 12)]:
        allocator.free(handle)
    allocator.allocate(90 * MIB)
    assert sizes(allocator) == [[-40], [-12], [90]]


def test_garbage_collection_releases_segments_of_average_age_and_more() -> None:
    allocator = Allocator(AllocatorSettings(garbage_collection_threshold=0.5), cap_bytes=100 * MIB)
    first, second, _ = (allocator.allocate(mib * MIB) for mib in (10, 12, 34))
    allocator.free(first)
    allocator.free(second)
    assert sizes(allocator) == [[-10], [-12], [34]]
    allocator.allocate(20 * MIB)
    # Both were freed after three look-ups, so both are as old as the mean and go, although 6 MiB would do.
    assert sizes(allocator) == [[34], [20]]


def test_garbage_collection_spares_the_young_and_everything_below_the_threshold() -> None:
    allocator = Allocator(AllocatorSettings(garbage_collection_threshold=0.5), cap_bytes=100 * MIB)
    old, young = allocator.allocate(10 * MIB), allocator.allocate(12 * MIB)
    allocator.free(old)
    allocator.allocate(24 * MIB)
    allocator.free(young)
    assert sizes(allocator) == [[-10], [-12], [24]]
    allocator.allocate(14 * MIB)
    assert sizes(allocator) == [[-10], [-12], [24], [14]]
    allocator.allocate(16 * MIB)
    assert sizes(allocator) == [[-12], [24], [14], [16]]


def test_an_arena_grows_by_pages_and_leaves_no_hole() -> None:
    allocator = Allocator(ARENA)
    for mib in (12, 12, 30):
        allocator.allocate(mib * MIB)
    assert sizes(allocator) == [[12, 12, 30, -6]]
    allocator.allocate(512)
    assert allocator.reserved_bytes == 62 * MIB


def test_an_arena_splits_from_512_bytes_on() -> None:
    allocator = Allocator(ARENA)
    allocator.allocate(20 * MIB - 512)
    assert [block.num_bytes for block in allocator.segments()[0]] == [20 * MIB - 512, 512]


def test_an_arena_gives_back_whole_pages_and_refills_the_gap_first() -> None:
    allocator = Allocator(ARENA)
    first, middle, last = (allocator.allocate(mib * MIB) for mib in (12, 60, 12))
    allocator.free(middle)
    allocator.empty_cache()
    # Used: 0-12 and 72-84; pages 20-40 and 40-60 go, 12-20 and 60-72 stick out.
    assert sizes(allocator) == [[12, -8], [-12, 12, -16]]
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.allocate(60 * MIB) == middle
    assert sizes(allocator) == [[12, 60, 12, -16]]
    for handle in (first, middle, last):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, [])


def test_the_growing_end_of_an_arena_is_kept_for_large_requests() -> None:
    allocator = Allocator(ARENA)
    middle = allocator.allocate(12 * MIB)
    allocator.allocate(20 * MIB)
    allocator.free(middle)
    # Free: 12 MiB in the middle, 8 MiB at the end, which could grow.
    assert sizes(allocator) == [[-12, 20, -8]]
    assert allocator.allocate(7 * MIB) == middle


def test_an_arena_under_the_cap_gives_back_pages_of_other_pools() -> None:
    allocator = Allocator(ARENA, cap_bytes=60 * MIB)
    allocator.free(allocator.allocate(40 * MIB, stream=1))
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    with pytest.raises(SimulatedOutOfMemory):
        allocator.allocate(30 * MIB)
    assert allocator.peak_reserved_bytes <= 60 * MIB


def test_the_limit_counts_a_whole_segment_even_where_an_arena_grows_by_less() -> None:
    allocator = Allocator(ARENA, cap_bytes=60 * MIB)
    allocator.allocate(39 * MIB)
    with pytest.raises(SimulatedOutOfMemory):
        allocator.allocate(21 * MIB)


def test_cudas_own_pool_serves_small_and_large_from_one_arena_and_keeps_all() -> None:
    allocator = Allocator(AllocatorSettings(backend="cudaMallocAsync", max_split_bytes=20 * MIB))
    small, large = allocator.allocate(100), allocator.allocate(31 * MIB)
    assert (allocator.requested_bytes, allocator.allocated_bytes) == (31 * MIB + 100, 31 * MIB + 512)
    assert allocator.reserved_bytes == 32 * MIB
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 64 * MIB
    allocator.free(large)
    # PyTorch's own pools would take a new segment for each of these.
    for _ in range(31):
        allocator.allocate(MIB)
    allocator.allocate(30 * MIB)
    allocator.free(small)
    assert allocator.reserved_bytes == 64 * MIB


def test_cudas_own_pool_joins_its_gaps_where_memory_runs_out() -> None:
    allocator = Allocator(AllocatorSettings(backend="cudaMallocAsync"), cap_bytes=128 * MIB)
    blocks = [allocator.allocate(32 * MIB) for _ in range(4)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == 128 * MIB
    with pytest.raises(SimulatedOutOfMemory):
        allocator.allocate(1)


def test_without_the_cache_everything_goes_back_at_once() -> None:
    allocator = Allocator(AllocatorSettings(is_caching=False, expandable_segments=True))
    small, other, large = allocator.allocate(100), allocator.allocate(100), allocator.allocate(3 * MIB)
    # Small ones share a page of CUDA's; no large one shares the 20 MiB that PyTorch would take.
    assert allocator.reserved_bytes == 2 * MIB + 4 * MIB
    allocator.free(large)
    allocator.free(small)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.free(other)
    assert allocator.reserved_bytes == 0
    assert allocator.peak_reserved_bytes == 6 * MIB


@pytest.mark.parametrize("rejects_early", [False, True])
def test_memory_that_may_not_be_given_back_first_runs_out_earlier(rejects_early: bool) -> None:
    allocator = Allocator(AllocatorSettings(rejects_early=rejects_early), cap_bytes=50 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    if rejects_early:
        with pytest.raises(SimulatedOutOfMemory):
            allocator.allocate(40 * MIB)
        assert allocator.reserved_bytes == 30 * MIB
    else:
        allocator.allocate(40 * MIB)
        assert allocator.reserved_bytes == 40 * MIB


def test_cudas_own_pool_grows_by_what_is_missing_only() -> None:
    allocator = Allocator(AllocatorSettings(backend="cudaMallocAsync"), cap_bytes=64 * MIB)
    allocator.allocate(30 * MIB)
    allocator.allocate(34 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
