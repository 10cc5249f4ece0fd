"""Random traces: invariants of the allocator, and the same numbers as a reference written in another way.

The reference knows no blocks, neighbours or sorted lists. It keeps two tables, memory the driver gave and memory in
use; a free block is a gap between them, found by scanning everything at every event.
"""

import itertools
import random
from dataclasses import dataclass

import pytest

from onecard.planner.allocator import Allocator, SimulatedOutOfMemory
from onecard.planner.allocator_settings import AllocatorSettings
from onecard.units import KIB, MIB

SETTINGS = {
    "plain": AllocatorSettings(),
    "max_split": AllocatorSettings(max_split_bytes=24 * MIB),
    "max_split_wide": AllocatorSettings(max_split_bytes=32 * MIB, max_non_split_rounding_bytes=40 * MIB),
    "garbage": AllocatorSettings(garbage_collection_threshold=0.6),
    "all_classic": AllocatorSettings(
        max_split_bytes=40 * MIB,
        max_non_split_rounding_bytes=32 * MIB,
        garbage_collection_threshold=0.8,
        large_segment_bytes=32 * MIB,
        roundup_power2_divisions=(0, 4, 8, 2, *[4] * 12),
    ),
    "arena": AllocatorSettings(expandable_segments=True),
    "arena_all": AllocatorSettings(
        expandable_segments=True,
        max_split_bytes=26 * MIB,
        large_segment_bytes=26 * MIB,
        max_non_split_rounding_bytes=26 * MIB,
        garbage_collection_threshold=0.5,
        roundup_power2_divisions=(2,) * 16,
    ),
}
CAPS = {"free": None, "tight": 190 * MIB, "narrow": 101 * MIB}


@dataclass(frozen=True)
class Segment:
    start: int
    size: int


@dataclass(frozen=True)
class Gap:
    size: int
    start: int
    room: float
    is_whole: bool


class SlowAllocator:
    """Counts the same bytes as `Allocator`, by scanning. Keys of `pools` are (stream, is_small)."""

    def __init__(self, settings: AllocatorSettings, cap_bytes: int | None) -> None:
        self.settings = settings
        self.cap = float("inf") if cap_bytes is None else cap_bytes
        self.given: dict[tuple[int, bool], list[Segment]] = {}
        self.used: dict[tuple[int, bool], dict[int, int]] = {}
        self.freed_at: dict[tuple[tuple[int, bool], int], int] = {}
        self.clock = 0
        self.end = 0

    @property
    def reserved(self) -> int:
        return sum(segment.size for segments in self.given.values() for segment in segments)

    @property
    def allocated(self) -> int:
        return sum(size for used in self.used.values() for size in used.values())

    def round(self, asked: int) -> int:
        size = max(asked, 512)
        interval = 0
        while interval < 15 and size >= 2 ** (21 + interval):
            interval += 1
        divisions = self.settings.roundup_power2_divisions[interval]
        if divisions > 1 and size > 512 * divisions:
            floor = 1
            while floor * 2 <= size:
                floor *= 2
            return next(
                floor + k * floor // divisions for k in range(divisions + 1) if floor + k * floor // divisions >= size
            )
        return (size + 511) // 512 * 512

    def gaps(self, key: tuple[int, bool]) -> list[Gap]:
        """Free blocks: what is given and not used, from use to use. `room` counts what an arena could add behind."""
        found = []
        for start, size in merged(self.given[key], is_arena=self.settings.expandable_segments):
            inside = sorted((at, at + n) for at, n in self.used[key].items() if start <= at < start + size)
            edges = [start, *[edge for pair in inside for edge in pair], start + size]
            for left, right in zip(edges[::2], edges[1::2], strict=True):
                if left < right:
                    room: float = right - left
                    if self.settings.expandable_segments and right == start + size:
                        later = [s.start for s in self.given[key] if s.start >= right]
                        room = min(later) - left if later else float("inf")
                    found.append(Gap(right - left, left, room, not inside))
        return sorted(found, key=lambda gap: (gap.size, gap.start))

    def allocate(self, asked: int, stream: int) -> tuple[tuple[int, bool], int]:
        size = self.round(asked)
        key = stream, size <= MIB
        self.given.setdefault(key, [])
        self.used.setdefault(key, {})
        self.clock += not key[1]
        start, room = self.cached(key, size) or self.fresh(key, size)
        rest = room - size
        if key[1] or self.settings.expandable_segments:
            splits = rest >= 512
        else:
            splits = rest > MIB and (self.settings.max_split_bytes is None or size < self.settings.max_split_bytes)
        self.used[key][start] = size if splits else room
        return key, start

    def free(self, handle: tuple[tuple[int, bool], int]) -> None:
        key, start = handle
        del self.used[key][start]
        for segment in self.given[key]:
            if segment.start <= start < segment.start + segment.size:
                self.freed_at[key, segment.start] = self.clock

    def cached(self, key: tuple[int, bool], size: int) -> tuple[int, int] | None:
        fitting = [gap for gap in self.gaps(key) if gap.size >= size]
        if not fitting:
            return None
        if self.settings.expandable_segments:
            while len(fitting) > 1 and fitting[1].room < fitting[0].room:
                fitting.pop(0)
        best, limit = fitting[0], self.settings.max_split_bytes
        if limit is not None and size < limit and best.size >= limit:
            return None
        if limit is not None and size >= limit and best.size >= size + self.settings.max_non_split_rounding_bytes:
            return None
        return best.start, best.size

    def fresh(self, key: tuple[int, bool], size: int) -> tuple[int, int]:
        arena = self.settings.expandable_segments
        if key[1]:
            segment = 2 * MIB
        elif size < 10 * MIB:
            segment = self.settings.large_segment_bytes
        else:
            segment = (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        if self.settings.garbage_collection_threshold and self.cap != float("inf") and not arena:
            self.collect()
        for relief in (None, self.drop_oversize, self.drop_cached):
            if relief is not None and not relief(key, size):
                continue
            if self.reserved + segment > self.cap:
                continue
            if not arena:
                self.given[key].append(Segment(self.end, segment))
                self.end += segment
                return self.end - segment, segment
            if (grown := self.grow(key, size)) is not None:
                return grown
        raise MemoryError

    def grow(self, key: tuple[int, bool], size: int) -> tuple[int, int] | None:
        """Puts `size` into the lowest unused stretch of the arena that is long enough and misses a page."""
        page = 2 * MIB if key[1] else self.settings.large_segment_bytes
        has = {segment.start for segment in self.given[key]}
        edges = [0, *[e for at, n in sorted(self.used[key].items()) for e in (at, at + n)]]
        ends = [*edges[1::2], float("inf")]
        for start, end in zip(edges[::2], ends, strict=True):
            first = start // page * page
            last = start + size
            missing = [at for at in range(first, last, page) if at not in has]
            lacks_any = end == float("inf") or any(at not in has for at in range(first, int(end), page))
            if end - start < size or not lacks_any:
                continue
            # Neighbouring pages come together or not at all.
            while missing:
                run = [missing.pop(0)]
                while missing and missing[0] == run[-1] + page:
                    run.append(missing.pop(0))
                if self.reserved + page * len(run) > self.cap:
                    return None
                self.given[key] += [Segment(at, page) for at in run]
            gap = next(gap for gap in self.gaps(key) if gap.start == start)
            return gap.start, gap.size
        raise AssertionError("the last stretch has no end")

    def whole(self, key: tuple[int, bool]) -> list[Segment]:
        free = {gap.start for gap in self.gaps(key) if gap.is_whole}
        return [segment for segment in self.given[key] if segment.start in free]

    def drop_cached(self, key: tuple[int, bool], size: int) -> bool:
        for pool, segments in self.given.items():
            if self.settings.expandable_segments:
                used = self.used[pool].items()
                gone = [s for s in segments if all(at + n <= s.start or at >= s.start + s.size for at, n in used)]
            else:
                gone = self.whole(pool)
            self.given[pool] = [segment for segment in segments if segment not in gone]
        return True

    def drop_oversize(self, key: tuple[int, bool], size: int) -> bool:
        limit = self.settings.max_split_bytes
        if limit is None or self.settings.expandable_segments:
            return False
        wanted = max(limit, size)
        oversize = sorted((s for s in self.whole(key) if s.size >= limit), key=lambda s: (s.size, s.start))
        enough = [segment for segment in oversize if segment.size >= wanted]
        if enough:
            self.given[key].remove(enough[0])
            return True
        released = 0
        while oversize and released < wanted:
            released += oversize[-1].size
            self.given[key].remove(oversize.pop())
        return released >= wanted

    def collect(self) -> None:
        target = self.reserved - int(self.settings.garbage_collection_threshold * self.cap)
        released = 0
        while released < target:
            cached = [(key, s) for key in self.given if not key[1] for s in self.whole(key)]
            if not cached:
                return
            ages = {(key, s.start): self.clock - self.freed_at[key, s.start] for key, s in cached}
            mean = sum(ages.values()) / len(ages)
            for key, segment in cached:
                if ages[key, segment.start] >= mean:
                    self.given[key].remove(segment)
                    released += segment.size


def merged(segments: list[Segment], is_arena: bool) -> list[tuple[int, int]]:
    """Pages of an arena that touch become one piece; segments stay apart."""
    pieces: list[tuple[int, int]] = []
    for segment in sorted(segments, key=lambda s: s.start):
        if is_arena and pieces and sum(pieces[-1]) == segment.start:
            pieces[-1] = pieces[-1][0], pieces[-1][1] + segment.size
        else:
            pieces.append((segment.start, segment.size))
    return pieces


def random_size(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(1, 4 * KIB)
    if kind < 0.5:
        return rng.randint(1, MIB)
    if kind < 0.75:
        return rng.choice([1, 2, 3, 5, 8, 9]) * MIB + rng.choice([0, 0, 1, 511])
    return rng.choice([10, 12, 20, 24, 26, 30, 41]) * MIB + rng.choice([0, 0, 0, 513])


def check_invariants(allocator: Allocator, live: dict[int, int]) -> None:
    """`live` has the bytes asked for, by handle."""
    segments = allocator.segments()
    for segment in segments:
        for before, after in itertools.pairwise(segment):
            assert before.address + before.num_bytes == after.address
            assert before.is_allocated or after.is_allocated
    for lower, upper in itertools.pairwise(segments):
        assert lower[-1].address + lower[-1].num_bytes <= upper[0].address
    blocks = [block for segment in segments for block in segment]
    allocated = {block.address: block.num_bytes for block in blocks if block.is_allocated}
    assert allocated.keys() == live.keys()
    assert all(allocated[handle] >= asked for handle, asked in live.items())
    assert sum(block.num_bytes for block in blocks) == allocator.reserved_bytes
    assert sum(allocated.values()) == allocator.allocated_bytes
    assert sum(live.values()) == allocator.requested_bytes
    assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
    assert allocator.peak_allocated_bytes >= allocator.allocated_bytes


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("name", SETTINGS)
def test_random_traces_keep_the_invariants(name: str, cap: str) -> None:
    rng = random.Random(f"{name} {cap}")
    allocator = Allocator(SETTINGS[name], CAPS[cap])
    live: dict[int, int] = {}
    for _ in range(3000):
        if rng.random() < 0.55 and len(live) < 60:
            asked = random_size(rng)
            try:
                live[allocator.allocate(asked, rng.choice([0, 0, 0, 7]))] = asked
            except SimulatedOutOfMemory:
                assert CAPS[cap] is not None
        elif live:
            handle = rng.choice(list(live))
            allocator.free(handle)
            del live[handle]
        if rng.random() < 0.01:
            allocator.empty_cache()
        check_invariants(allocator, live)
        assert allocator.peak_reserved_bytes <= (CAPS[cap] or allocator.peak_reserved_bytes)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("name", SETTINGS)
def test_random_traces_agree_with_the_reference_at_every_event(name: str, cap: str) -> None:
    rng = random.Random(f"{cap} {name}")
    fast = Allocator(SETTINGS[name], CAPS[cap])
    slow = SlowAllocator(SETTINGS[name], CAPS[cap])
    live: list[tuple[int, tuple[tuple[int, bool], int]]] = []
    num_failures = 0
    for event in range(1000):
        if rng.random() < 0.55 and len(live) < 40:
            asked, stream = random_size(rng), rng.choice([0, 0, 0, 7])
            try:
                reference = slow.allocate(asked, stream)
            except MemoryError:
                num_failures += 1
                with pytest.raises(SimulatedOutOfMemory):
                    fast.allocate(asked, stream)
            else:
                live.append((fast.allocate(asked, stream), reference))
        elif live:
            handle, reference = live.pop(rng.randrange(len(live)))
            fast.free(handle)
            slow.free(reference)
        if rng.random() < 0.005:
            fast.empty_cache()
            slow.drop_cached((0, False), 0)
        assert (fast.reserved_bytes, fast.allocated_bytes) == (slow.reserved, slow.allocated), event
    assert (num_failures > 0) == (CAPS[cap] is not None)
