"""Expandable segments: one address range per pool, backed by memory page by page.

PyTorch's `ExpandableSegment` (CUDACachingAllocator.cpp). An arena stays when all its pages are gone, where PyTorch
drops it and opens another: the next request finds the same room in both.
"""

from onecard.planner.memory_blocks import Block, BlockPool, DeviceMemory, round_up

# PyTorch takes 9/8 of the card's memory; here it is larger than any card, so that the end is never met.
_ARENA_BYTES = 2**46


def grow_arena(memory: DeviceMemory, pool: BlockPool, size: int) -> Block | None:
    """Maps pages at the lowest address where free and unmapped neighbours make room for `size` bytes.

    Returns the block, no longer filed as free; None where memory runs out. What was mapped until then stays cached.
    """
    block = _find_room(memory, pool, size)
    if not block.is_mapped and not _map_pages(memory, block, min(block.size, size)):
        return None
    while block.size < size:
        following = block.next
        assert following is not None
        assert not following.is_mapped
        if not _map_pages(memory, following, min(following.size, size - block.size)):
            return None
        block = following
    pool.remove(block)
    return block


def unmap_pages(memory: DeviceMemory, block: Block) -> None:
    """Gives the pages that lie wholly inside a free block back; what sticks out on both sides stays free."""
    pool = block.pool
    first = round_up(block.address, pool.page_bytes)
    last = (block.address + block.size) // pool.page_bytes * pool.page_bytes
    if first >= last:
        return
    pool.remove(block)
    if first > block.address:
        head, block = block, block.cut(first - block.address)
        pool.add(head)
    if block.size > last - first:
        pool.add(block.cut(last - first))
    memory.release(block.size)
    for neighbour in (block.prev, block.next):
        if neighbour is not None and not neighbour.is_mapped:
            pool.remove_unmapped(neighbour)
            block.absorb(neighbour)
    pool.add_unmapped(block)


def growable_size(block: Block) -> int:
    """Bytes of a free block and of the unmapped addresses right after it."""
    following = block.next
    return block.size + (following.size if following is not None and not following.is_mapped else 0)


def _find_room(memory: DeviceMemory, pool: BlockPool, size: int) -> Block:
    for _, unmapped in pool.unmapped:
        start = unmapped.prev if unmapped.prev is not None and unmapped.prev.is_free else unmapped
        room = 0
        block: Block | None = start
        while room < size and block is not None and (block.is_free or not block.is_mapped):
            room += block.size
            block = block.next
        if room >= size:
            return start
    arena_bytes = round_up(_ARENA_BYTES, pool.page_bytes)
    arena = Block(memory.new_range(arena_bytes, alignment=pool.page_bytes), arena_bytes, pool)
    pool.add_unmapped(arena)
    return arena


def _map_pages(memory: DeviceMemory, block: Block, num_bytes: int) -> bool:
    """Puts whole pages behind the first `num_bytes` of unmapped addresses, and files them as free."""
    pool = block.pool
    num_bytes = round_up(num_bytes, pool.page_bytes)
    if not memory.fits(num_bytes):
        return False
    pool.remove_unmapped(block)
    if num_bytes < block.size:
        pool.add_unmapped(block.cut(num_bytes))
    block.is_mapped = True
    block.merge_free_neighbours()
    pool.add(block)
    memory.reserve(num_bytes)
    return True
