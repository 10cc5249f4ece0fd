"""A simulation of PyTorch's CUDA caching allocator: recorded allocations in, reserved memory out.

It follows c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13 for one device without CUDA graphs, private
pools and blocks used on several streams (`record_stream`). Addresses only ever grow, while a driver may hand out old
ones again; that matters solely where two free blocks of exactly one size compete.

    request -> round -> pool of its stream, small (<= 1 MiB) or large
            -> best fitting free block        else
            -> collect garbage, new segment   else
            -> release an oversize block, new segment (with max_split only)   else
            -> release all cached segments, new segment                       else SimulatedOutOfMemory

CUDA's own pool (`backend:cudaMallocAsync`) is closed; it stands here as one arena for all sizes. Fragments do occur in
it (rapidsai/rmm issue 1245), and it moves pages to join them where memory runs out, as releasing them does here.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from onecard.planner.allocator_settings import (
    DRIVER_PAGE_BYTES,
    MIN_LARGE_SEGMENT_BYTES,
    NUM_ROUNDUP_INTERVALS,
    AllocatorSettings,
)
from onecard.planner.expandable_arena import grow_arena, growable_size, unmap_pages
from onecard.planner.memory_blocks import Block, BlockPool, DeviceMemory, round_up
from onecard.units import MIB, format_bytes

# c10/core/AllocatorConfig.h, PyTorch 2.13.
_GRANULE_BYTES = 512
_SMALL_LIMIT_BYTES = MIB
_SMALL_SEGMENT_BYTES = 2 * MIB
_LARGE_GRANULE_BYTES = 2 * MIB
_NULL = 0


class SimulatedOutOfMemory(Exception):
    """The simulated card cannot serve a request although everything cached was released; a result, not a mistake.

    `requested_bytes` is the segment that was tried, `reserved_bytes` what is held without it, `cap_bytes` the limit.
    """

    def __init__(self, requested_bytes: int, reserved_bytes: int, cap_bytes: int) -> None:
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes
        self.cap_bytes = cap_bytes
        super().__init__(
            f"{format_bytes(requested_bytes)} more do not fit: {format_bytes(reserved_bytes)} "
            f"of {format_bytes(cap_bytes)} are reserved"
        )


@dataclass(frozen=True)
class BlockView:
    """One block of a segment as `Allocator.segments` shows it."""

    address: int
    num_bytes: int
    is_allocated: bool


class Allocator:
    """Serves allocations and frees in the order of a trace and counts what a card would have to hold.

    Args:
        settings: see `AllocatorSettings`; `per_process_memory_fraction` belongs into `cap_bytes`.
        cap_bytes: most that may be reserved; None is a card without end, where garbage is never collected.
    """

    def __init__(self, settings: AllocatorSettings | None = None, cap_bytes: int | None = None) -> None:
        settings = settings or AllocatorSettings()
        if settings.is_closed:  # PyTorch's other keys are for its own cache
            settings = AllocatorSettings(backend=settings.backend, is_caching=settings.is_caching)
        self._settings = settings
        self._memory = DeviceMemory(cap_bytes)
        self._is_expandable = settings.expandable_segments or settings.is_driver_pool
        self._max_split_bytes = settings.max_split_bytes
        self._rounds_up = max(settings.roundup_power2_divisions) > 1
        # Blocks of an arena can never be released whole, so garbage collection finds nothing there.
        self._collects = settings.garbage_collection_threshold > 0 and cap_bytes is not None and not self._is_expandable
        # Of each stream the small and the large pool, or one for all sizes.
        self._pools: dict[int, tuple[BlockPool, ...]] = {}
        self._allocated: dict[int, Block] = {}
        self._num_large_lookups = 0
        self._allocated_bytes = self._requested_bytes = self._peak_allocated_bytes = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of blocks in use, rounding included: `torch.cuda.memory_allocated`."""
        return self._allocated_bytes

    @property
    def requested_bytes(self) -> int:
        """Bytes the program asked for and has not freed."""
        return self._requested_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver, cached ones included: `torch.cuda.memory_reserved`."""
        return self._memory.reserved_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        """The largest `allocated_bytes` so far."""
        return self._peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The largest `reserved_bytes` so far: what the card must offer."""
        return self._memory.peak_reserved_bytes

    def allocate(self, num_bytes: int, stream: int = 0) -> int:
        """Takes `num_bytes` and returns a handle, the address. Zero bytes are the handle 0, which takes nothing.

        Raises:
            SimulatedOutOfMemory: the cap is reached; the allocator stays usable, with its cache released.
        """
        if num_bytes <= 0:
            if num_bytes < 0:
                raise ValueError(f"cannot allocate {num_bytes} bytes")
            return _NULL
        size = self._round(num_bytes) if self._rounds_up else round_up(num_bytes, _GRANULE_BYTES)
        pools = self._pools.get(stream) or self._open_pools(stream)
        pool = pools[-1 if size > _SMALL_LIMIT_BYTES else 0]
        block = self._take_cached(pool, size) or self._take_new(pool, size)
        if block.size - size >= pool.min_remainder_bytes and self._may_split(size):
            pool.add(block.cut(size))
        block.requested_bytes = num_bytes
        self._allocated[block.address] = block
        self._requested_bytes += num_bytes
        self._allocated_bytes += block.size
        if self._allocated_bytes > self._peak_allocated_bytes:
            self._peak_allocated_bytes = self._allocated_bytes
        return block.address

    def free(self, handle: int) -> None:
        """Gives an allocation back to the cache.

        Raises:
            ValueError: nothing is allocated under the handle.
        """
        if handle == _NULL:
            return
        block = self._allocated.pop(handle, None)
        if block is None:
            raise ValueError(f"nothing is allocated under handle {handle}")
        self._allocated_bytes -= block.size
        self._requested_bytes -= block.requested_bytes
        block.birth = self._num_large_lookups
        block.merge_free_neighbours()
        block.pool.add(block)
        if not self._settings.is_caching and not block.is_split:
            self._release(block)

    def empty_cache(self) -> None:
        """Gives unsplit cached segments, and free pages of expandable arenas, back to the driver."""
        for pools in self._pools.values():
            for pool in pools:
                cached = [block for _, _, block in pool.free]
                for block in cached:
                    if self._is_expandable:
                        unmap_pages(self._memory, block)
                    elif not block.is_split:
                        self._release(block)

    def segments(self) -> list[list[BlockView]]:
        """Shows every contiguous piece of memory as its blocks, by address. Takes time in the number of blocks."""
        blocks = [*self._allocated.values()]
        for pools in self._pools.values():
            blocks += [block for pool in pools for _, _, block in pool.free]
        heads = [block for block in blocks if block.prev is None or not block.prev.is_mapped]
        heads.sort(key=lambda block: block.address)
        return [[BlockView(b.address, b.size, not b.is_free) for b in _mapped_from(head)] for head in heads]

    def _round(self, num_bytes: int) -> int:
        """Rounds to 512 bytes, or to the next of the steps that divide the way from one power of two to the next."""
        # The first interval ends at 2 MiB, whose bit length is 22.
        interval = min(max(num_bytes.bit_length() - 21, 0), NUM_ROUNDUP_INTERVALS - 1)
        divisions = self._settings.roundup_power2_divisions[interval]
        step = _GRANULE_BYTES
        if divisions > 1 and num_bytes > _GRANULE_BYTES * divisions:
            step = (1 << (num_bytes.bit_length() - 1)) // divisions
        return round_up(num_bytes, step)

    def _open_pools(self, stream: int) -> tuple[BlockPool, ...]:
        if self._settings.is_driver_pool:
            self._pools[stream] = (BlockPool(DRIVER_PAGE_BYTES, _GRANULE_BYTES),)
            return self._pools[stream]
        large_remainder = _GRANULE_BYTES if self._is_expandable else _SMALL_LIMIT_BYTES + 1
        small = BlockPool(_SMALL_SEGMENT_BYTES, _GRANULE_BYTES)
        large = BlockPool(self._settings.large_segment_bytes, large_remainder)
        self._pools[stream] = small, large
        return self._pools[stream]

    def _may_split(self, size: int) -> bool:
        return self._max_split_bytes is None or self._is_expandable or size < self._max_split_bytes

    def _take_cached(self, pool: BlockPool, size: int) -> Block | None:
        """Takes the smallest free block that holds `size`, the lowest address among equals."""
        if self._collects and size > _SMALL_LIMIT_BYTES:
            self._num_large_lookups += 1
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        if self._is_expandable:
            # The block before unmapped pages counts as large as it can grow, so that it is kept for large requests.
            while index + 1 < len(free) and growable_size(free[index + 1][2]) < growable_size(free[index][2]):
                index += 1
        block = free[index][2]
        if self._max_split_bytes is not None:
            if size < self._max_split_bytes <= block.size:
                return None
            if self._max_split_bytes <= size <= block.size - self._settings.max_non_split_rounding_bytes:
                return None
        del free[index]
        block.is_free = False
        return block

    def _take_new(self, pool: BlockPool, size: int) -> Block:
        if size <= _SMALL_LIMIT_BYTES:
            segment_bytes = _SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_SEGMENT_BYTES and self._settings.is_caching:
            segment_bytes = self._settings.large_segment_bytes
        else:
            segment_bytes = round_up(size, _LARGE_GRANULE_BYTES)
        if self._collects:
            self._collect_garbage()
        block = self._request(pool, size, segment_bytes)
        if block is None and self._settings.rejects_early:
            raise self._out_of_memory(segment_bytes)
        if block is None and self._release_oversize(pool, size):
            block = self._request(pool, size, segment_bytes)
        if block is None:
            self.empty_cache()
            block = self._request(pool, size, segment_bytes)
        if block is None:
            raise self._out_of_memory(segment_bytes)
        return block

    def _out_of_memory(self, segment_bytes: int) -> SimulatedOutOfMemory:
        assert self._memory.cap_bytes is not None
        return SimulatedOutOfMemory(segment_bytes, self._memory.reserved_bytes, self._memory.cap_bytes)

    def _request(self, pool: BlockPool, size: int, segment_bytes: int) -> Block | None:
        # PyTorch compares the whole segment with the limit even where an arena would have to grow by less.
        if not self._memory.fits(segment_bytes) and not self._settings.is_driver_pool:
            return None
        if self._is_expandable:
            return grow_arena(self._memory, pool, size)
        self._memory.reserve(segment_bytes)
        return Block(self._memory.new_range(segment_bytes), segment_bytes, pool)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self._memory.release(block.size)

    def _release_oversize(self, pool: BlockPool, size: int) -> bool:
        """Releases the smallest oversize block that holds `size`, or the largest ones until they add up to it."""
        if self._max_split_bytes is None or self._is_expandable:
            return False
        wanted = max(size, self._max_split_bytes)
        index = bisect_left(pool.free, (wanted,))
        if index < len(pool.free):
            self._release(pool.free[index][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= self._max_split_bytes:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Releases unsplit large blocks of at least average age, over and over, until under the threshold."""
        assert self._memory.cap_bytes is not None
        limit = int(self._settings.garbage_collection_threshold * self._memory.cap_bytes)
        excess = self._memory.reserved_bytes - limit
        if excess <= 0:
            return
        cached = [block for pools in self._pools.values() for _, _, block in pools[-1].free if not block.is_split]
        released = 0
        while cached and released < excess:
            mean_birth = sum(block.birth for block in cached) / len(cached)
            old = [block for block in cached if block.birth <= mean_birth]
            cached = [block for block in cached if block.birth > mean_birth]
            for block in old:
                released += block.size
                self._release(block)


def _mapped_from(head: Block) -> Iterator[Block]:
    block: Block | None = head
    while block is not None and block.is_mapped:
        yield block
        block = block.next
