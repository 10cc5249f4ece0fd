"""Blocks of simulated GPU memory, and the sorted lists a caching allocator keeps its free ones in.

A segment is what the driver gave; blocks tile it without gaps and know their neighbours:

    segment  |<------------------------------ 20 MiB ------------------------------>|
    blocks   | allocated 6 MiB | free 3 MiB | allocated 2 MiB |     free 9 MiB      |
             address 0         6            9                 11                    20
             prev = None  <------------- prev / next ------------->      next = None

Two free neighbours never exist: freeing a block merges them. A segment whose only block is free (no neighbours, "not
split") can go back to the driver. The arena of expandable segments is one such row in a huge address range, in which
whole pages are backed by memory or not:

    arena    | allocated | free | unmapped (whole pages) | allocated | free | unmapped ... |
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from onecard.units import MIB


class Block:
    """A range of addresses inside a segment: allocated, free, or (in an arena) without memory behind it.

    `requested_bytes` is what the program asked for, `size` what it got. `birth` counts look-ups of the large pools up
    to the moment the block became free; garbage collection tells its age by it.
    """

    __slots__ = ("address", "birth", "is_free", "is_mapped", "next", "pool", "prev", "requested_bytes", "size")

    def __init__(self, address: int, size: int, pool: "BlockPool") -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.prev: Block | None = None
        self.next: Block | None = None
        self.is_free = False
        self.is_mapped = True
        self.requested_bytes = 0
        self.birth = 0

    @property
    def is_split(self) -> bool:
        """Whether the segment holds more than this block."""
        return self.prev is not None or self.next is not None

    def cut(self, size: int) -> "Block":
        """Keeps the first `size` bytes and returns the rest as the next block, neither free nor allocated."""
        rest = Block(self.address + size, self.size - size, self.pool)
        self.size = size
        rest.is_mapped = self.is_mapped
        rest.prev = self
        rest.next = self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.next = rest
        return rest

    def absorb(self, neighbour: "Block") -> None:
        """Takes over the addresses of the block before or after this one."""
        self.size += neighbour.size
        if neighbour is self.prev:
            self.address = neighbour.address
            self.prev = neighbour.prev
            if self.prev is not None:
                self.prev.next = self
        else:
            self.next = neighbour.next
            if self.next is not None:
                self.next.prev = self

    def merge_free_neighbours(self) -> None:
        """Absorbs the blocks on both sides that are free; this one must not be filed as free yet."""
        for neighbour in (self.prev, self.next):
            if neighbour is not None and neighbour.is_free:
                self.pool.remove(neighbour)
                self.absorb(neighbour)


@dataclass(slots=True, eq=False)
class BlockPool:
    """Free blocks of one stream and one kind of size, ordered by (size, address).

    Args:
        page_bytes: step in which an expandable arena of this pool grows.
        min_remainder_bytes: smallest remainder worth a block of its own.
    """

    page_bytes: int
    min_remainder_bytes: int
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    unmapped: list[tuple[int, Block]] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """Files a block as free."""
        block.is_free = True
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Takes a free block out of the list."""
        block.is_free = False
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        """Files addresses of an arena that have no memory."""
        block.is_mapped = False
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Takes such addresses out of the list."""
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class DeviceMemory:
    """What the driver has given and may still give: the count of reserved bytes, the cap, and fresh addresses."""

    def __init__(self, cap_bytes: int | None) -> None:
        self.cap_bytes = cap_bytes
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        # Address 0 stands for "no memory".
        self._next_address = 2 * MIB

    def fits(self, num_bytes: int) -> bool:
        """Whether so much more may be reserved."""
        return self.cap_bytes is None or self.reserved_bytes + num_bytes <= self.cap_bytes

    def reserve(self, num_bytes: int) -> None:
        """Counts bytes taken from the driver."""
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def release(self, num_bytes: int) -> None:
        """Counts bytes given back to the driver."""
        self.reserved_bytes -= num_bytes

    def new_range(self, num_bytes: int, alignment: int = 1) -> int:
        """Returns the first of `num_bytes` addresses that were never used."""
        address = round_up(self._next_address, alignment)
        self._next_address = address + num_bytes
        return address


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step
