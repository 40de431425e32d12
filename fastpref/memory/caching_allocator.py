"""A simulation of torch's caching allocator on a GPU: what it takes from the driver for a recorded step.

It follows torch 2.11 (`c10/cuda/CUDACachingAllocator.cpp`) for one stream, without a limit of memory, and with the
allocator's default options but `expandable_segments`, which a run sets on Linux (`fastpref/allocator.py`). `python -m
bench.allocator` compares it with that allocator itself.

Blocks are multiples of 512 bytes. Blocks of at most 1 MiB lie in a pool of their own. A freed block is joined with its
free neighbours and kept, and the smallest free block that is large enough is the next to be used. What remains between
the blocks in use is memory that the process holds and no tensor has.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

MIB = 1 << 20
BLOCK = 512  # bytes: every block is a multiple of it
SMALL = MIB  # the largest block of the small pool
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB  # by which the pools' segments grow
OWN_SEGMENT = 10 * MIB  # blocks from this size on have a segment of fixed size of their own, in multiples of 2 MiB

# The lengths of a run's micro-batches, as shares of the longest one: blocks of different lengths leave gaps.
LENGTHS = (0.55, 0.9, 0.7, 1.0, 0.8, 1.0)


class Trace:
    """The order in which the storages of a step are made and freed.

    Args:
        held: the bytes of the storages that exist before, by their address.
    """

    def __init__(self, held: Mapping[int, int]):
        self.held = list(held.values())
        self.events: list[tuple[int, int]] = []  # number of a storage; its bytes when it is made, 0 when it is freed
        self.kept: set[int] = set()  # the storages whose size does not depend on the micro-batch's length
        self._numbers = {address: number for number, address in enumerate(held)}

    def made(self, address: int, size: int) -> None:
        if address in self._numbers:  # it has grown, and is moved
            self.freed(address)
        self._numbers[address] = len(self.held) + len(self.events)
        self.events.append((self._numbers[address], size))

    def freed(self, address: int) -> None:
        if (number := self._numbers.pop(address, None)) is not None:
            self.events.append((number, 0))

    def keep_size(self, address: int) -> None:
        """Say that a storage is as large for a shorter micro-batch."""
        if (number := self._numbers.get(address)) is not None:
            self.kept.add(number)


def replayed(
    trace: Trace, lengths: Sequence[float] = LENGTHS, fixed: Collection[int] = (), *, expandable: bool = True
) -> "CachingAllocator":
    """Return the allocator after steps with micro-batches of these lengths, as shares of that of the trace.

    Storages of `fixed` bytes are as large for every length, like those whose size was kept.
    """
    allocator = CachingAllocator(expandable=expandable)
    for number, size in requests(trace, lengths, fixed):
        if size:
            allocator.allocate(number, size)
        else:
            allocator.free(number)
    return allocator


def requests(
    trace: Trace, lengths: Sequence[float] = LENGTHS, fixed: Collection[int] = ()
) -> Iterator[tuple[int, int]]:
    """Yield what such steps ask of an allocator: a number with its bytes for a block, and with 0 to free it."""
    yield from enumerate(trace.held)
    for length in lengths:
        left: set[int] = set()
        for number, size in trace.events:
            if size == 0:
                yield number, 0
                left.discard(number)
            elif asked := size if number in trace.kept or size in fixed else int(size * length):
                yield number, asked
                left.add(number)
        for number in left:  # gradients, until the next step
            yield number, 0


@dataclass(eq=False)
class Block:
    """A run of memory of a segment, in use or free, between its neighbours in the segment."""

    address: int
    size: int
    before: "Block | None" = None
    after: "Block | None" = None
    free: bool = False
    page: int = 0  # bytes by which its segment grows, which tells the pool


class CachingAllocator:
    """The allocator's state after the allocations and frees so far. Keys name allocations that are in use."""

    def __init__(self, *, expandable: bool = True):
        self.expandable = expandable
        self.allocated = self.peak = 0  # bytes of the blocks in use, now and at most
        self.reserved = 0  # bytes that were taken from the driver, which are never given back
        self._used: dict[int, Block] = {}
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by whether the pool is small
        self._last: dict[bool, Block | None] = {True: None, False: None}  # the block that ends a segment that grows
        self._end = 0  # the first address that no segment has

    def allocate(self, key: int, size: int) -> None:
        """Take a block for `size` bytes. A tensor without elements takes none."""
        if size <= 0:
            return
        size = _multiple(size, BLOCK)
        small = size <= SMALL
        block = self._found(small, size) or (self._grown if self.expandable else self._new)(small, size)
        remaining = block.size - size
        if remaining >= BLOCK if small or self.expandable else remaining > SMALL:
            self._split(small, block, size)
        block.free = False
        self._used[key] = block
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)

    def free(self, key: int) -> None:
        """Give a block back. A key without a block has none to give back."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        small = block.page == SMALL_PAGE
        before, after = block.before, block.after
        if before is not None and before.free:
            self._take(small, before)
            block = self._joined(small, before, block)
        if after is not None and after.free:
            self._take(small, after)
            block = self._joined(small, block, after)
        self._give(small, block)

    def _found(self, small: bool, size: int) -> Block | None:
        """Take the smallest free block of at least `size` bytes; the growing end of a segment only if no other is."""
        pool = self._free[small]
        place = bisect_left(pool, (size, 0), key=_order)
        if place == len(pool):
            return None
        block = pool[place][2]
        if block is self._last[small] and place + 1 < len(pool):
            block = pool[place + 1][2]
        self._take(small, block)
        return block

    def _grown(self, small: bool, size: int) -> Block:
        """Take the end of the pool's segment, enlarged by as many pages as that needs."""
        page = SMALL_PAGE if small else LARGE_PAGE
        last = self._last[small]
        if last is not None and last.free:
            self._take(small, last)
            more = _multiple(size - last.size, page)
            last.size += more
        else:
            more = _multiple(size, page)
            address = 0 if last is None else last.address + last.size
            block = Block(address, more, before=last, page=page)
            if last is not None:
                last.after = block
            last = self._last[small] = block
        self.reserved += more
        return last

    def _new(self, small: bool, size: int) -> Block:
        """Take a new segment of fixed size."""
        whole = SMALL_PAGE if small else LARGE_PAGE if size < OWN_SEGMENT else _multiple(size, 2 * MIB)
        block = Block(self._end, whole, page=SMALL_PAGE if small else LARGE_PAGE)
        self._end += whole
        self.reserved += whole
        return block

    def _split(self, small: bool, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block, block.after, page=block.page)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        if self._last[small] is block:
            self._last[small] = rest
        self._give(small, rest)

    def _joined(self, small: bool, first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._last[small] is second:
            self._last[small] = first
        return first

    def _give(self, small: bool, block: Block) -> None:
        block.free = True
        insort(self._free[small], (block.size, block.address, block), key=_order)

    def _take(self, small: bool, block: Block) -> None:
        pool = self._free[small]
        del pool[bisect_left(pool, (block.size, block.address), key=_order)]
        block.free = False


def _order(entry: tuple[int, int, Block]) -> tuple[int, int]:
    return entry[:2]


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit
