"""A model of torch's caching allocator for CUDA: what it holds from the card for a sequence of allocations.

Source: `c10/cuda/CUDACachingAllocator.cpp` of PyTorch 2.11 to 2.15, with its default settings: `round_size`,
`get_pool`, `get_allocation_size`, `get_free_block`, `should_split`, `try_merge_blocks`, `release_cached_blocks`, and
for `expandable_segments:True` `find_expandable_block`, `map_block`, `unmap_block`. One stream; `max_split_size_mb`,
`roundup_power2_divisions` and `garbage_collection_threshold` off. A tiny worked use::

    allocator = CachingAllocator()
    block = allocator.malloc(3 << 20)     # 3 MiB: a segment of 20 MiB, split
    allocator.usage                       # Usage(requested=3 MiB, allocated=3 MiB, reserved=20 MiB)
    allocator.free(block)
    allocator.empty_cache()               # Usage(0, 0, 0)

Addresses are made up: segments lie one after another, with a gap between, in the order in which they were asked for.
The driver may give others, which matters only where two free blocks of one size compete.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from keepless.errors import AllocatorError
from keepless.ir.budget import format_bytes

ALIGNMENT = 512
"""kMinBlockSize: sizes are rounded up to a multiple of it."""
SMALL_REQUEST = 1 << 20
"""kSmallSize: the largest request that goes to the pool of small blocks."""
SMALL_SEGMENT = 2 << 20
"""kSmallBuffer: bytes of a segment of small blocks, and of a page there."""
LARGE_SEGMENT = 20 << 20
"""kLargeBuffer: bytes of a segment for requests below `OWN_SEGMENT`, and of a page of the pool of large blocks."""
OWN_SEGMENT = 10 << 20
"""kMinLargeAlloc: from this size on a request gets a segment of its own size."""
SEGMENT_ROUNDING = 2 << 20
"""kRoundLarge: to which such a segment is rounded up."""
ADDRESS_SPACE = 1 << 40
"""Addresses of one expandable segment, in bytes; torch takes 9/8 of the card's memory."""
_GAP = 1 << 21


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes.

    Arguments:
        requested: what the tensors asked for.
        allocated: blocks in use: requests rounded up, and what a block holds beyond that because it is not split. With
            one stream these are torch's active bytes, too.
        reserved: held from the driver.
    """

    requested: int = 0
    allocated: int = 0
    reserved: int = 0


@dataclass(slots=True, eq=False)
class _Block:
    pool: _Pool
    address: int
    size: int
    is_expandable: bool = False
    mapped: bool = True
    in_use: bool = False
    requested: int = 0
    prev: _Block | None = None
    next: _Block | None = None


@dataclass(slots=True, eq=False)
class _Pool:
    """Free blocks by (size, address), blocks without memory by address."""

    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)
    at: dict[int, _Block] = field(default_factory=dict)

    @property
    def page(self) -> int:
        return SMALL_SEGMENT if self.is_small else LARGE_SEGMENT

    def add(self, block: _Block) -> None:
        insort(self.free, (block.size, block.address))
        self.at[block.address] = block

    def take(self, block: _Block) -> None:
        self.free.pop(bisect_left(self.free, (block.size, block.address)))
        del self.at[block.address]

    def add_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, block.address)
        self.at[block.address] = block

    def take_unmapped(self, block: _Block) -> None:
        self.unmapped.pop(bisect_left(self.unmapped, block.address))
        del self.at[block.address]


class CachingAllocator:
    """The allocator's state.

    Arguments:
        limit: bytes that it may hold from the driver (the card's free memory, or what
            `torch.cuda.set_per_process_memory_fraction` allows); None for no limit. As in torch, an expandable
            segment may go over it by less than a page.
        expandable: `expandable_segments:True`: segments grow and shrink by pages, of 2 MiB for small blocks and 20 MiB
            for large ones.

    Attributes:
        usage: now.
        peaks: highest of each so far; they need not fall together.
        num_segments: that were asked for from the driver, or pages.
        num_flushes: how often the cache was given back because the limit was met.
    """

    def __init__(self, *, limit: int | None = None, expandable: bool = False) -> None:
        self.limit = limit
        self.is_expandable = expandable
        self.usage = Usage()
        self.peaks = Usage()
        self.num_segments = 0
        self.num_flushes = 0
        self._small, self._large = _Pool(True), _Pool(False)
        self._used: dict[int, _Block] = {}
        self._next_address = _GAP

    def malloc(self, nbytes: int) -> int:
        """The address of a new block. Nothing is allocated for 0 bytes, and the address is 0.

        Raises:
            AllocatorError: the limit is met, also without the cache; or `nbytes` is negative.
        """
        if nbytes <= 0:
            if nbytes < 0:
                raise AllocatorError(f"{nbytes} bytes cannot be allocated.", nbytes=nbytes, reserved=0)
            return 0
        size = rounded(nbytes)
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = self._best_fit(pool, size) or self._new(pool, size)
        if block is None:
            self.num_flushes += 1
            self.empty_cache()
            block = self._new(pool, size)
        if block is None:
            raise AllocatorError(
                f"An allocation of {format_bytes(nbytes)} ({nbytes} bytes) fails: {format_bytes(self.usage.reserved)} "
                f"are held, {format_bytes(self.usage.allocated)} of them in use, and the limit is "
                f"{format_bytes(self.limit or 0)}. Give it more, or let less stand at once.",
                nbytes=nbytes,
                reserved=self.usage.reserved,
            )
        remaining = block.size - size
        if remaining >= ALIGNMENT if pool.is_small or self.is_expandable else remaining > SMALL_REQUEST:
            rest = _Block(pool, block.address + size, remaining, block.is_expandable)
            _link(block, rest, block.next)
            block.size = size
            pool.add(rest)
        block.in_use, block.requested = True, nbytes
        self._used[block.address] = block
        self._count(requested=nbytes, allocated=block.size)
        return block.address

    def free(self, address: int) -> None:
        """Gives a block back to the cache.

        Raises:
            AllocatorError: no block in use begins there.
        """
        if not address:
            return
        block = self._used.pop(address, None)
        if block is None:
            raise AllocatorError(f"No block in use begins at {address}.", nbytes=0, reserved=self.usage.reserved)
        self._count(requested=-block.requested, allocated=-block.size)
        block.in_use, block.requested = False, 0
        self._merge(block)
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Gives what is free back to the driver: whole segments, or whole pages."""
        for pool in (self._large, self._small):
            for _, address in list(pool.free):
                block = pool.at[address]
                if block.is_expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.take(block)
                    self._count(reserved=-block.size)

    def blocks(self) -> list[tuple[int, int]]:
        """Address and bytes of each block in use, by address."""
        return [(address, self._used[address].size) for address in sorted(self._used)]

    def largest_free(self) -> int:
        """Bytes of the largest free block that stands."""
        return max((pool.free[-1][0] for pool in (self._small, self._large) if pool.free), default=0)

    # ---- how a block is found

    def _best_fit(self, pool: _Pool, size: int) -> _Block | None:
        index = bisect_left(pool.free, (size, 0))
        if index == len(pool.free):
            return None
        if self.is_expandable:  # a block before room to grow counts as large as it may become
            while index + 1 < len(pool.free) and _room(self._free_at(pool, index + 1)) < _room(
                self._free_at(pool, index)
            ):
                index += 1
        block = self._free_at(pool, index)
        pool.take(block)
        return block

    @staticmethod
    def _free_at(pool: _Pool, index: int) -> _Block:
        return pool.at[pool.free[index][1]]

    def _new(self, pool: _Pool, size: int) -> _Block | None:
        """A block from the driver, which may be larger; None where the limit does not let it."""
        nbytes = segment_nbytes(size)
        if self.limit is not None and self.usage.reserved + nbytes > self.limit:
            return None
        if self.is_expandable:
            return self._grow(pool, size)
        block = _Block(pool, self._addresses(nbytes), nbytes)
        self.num_segments += 1
        self._count(reserved=nbytes)
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """A block of at least this size in an expandable segment, by mapping pages behind or between free blocks."""
        block = self._expandable(pool, size)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            following = block.next
            assert following is not None, "the segment has room"
            block = self._map(following, min(size - block.size, following.size))
        pool.take(block)
        return block

    def _expandable(self, pool: _Pool, size: int) -> _Block:
        """The first block in which, and in the free ones behind it, this size has room."""
        for address in pool.unmapped:
            block = pool.at[address]
            if block.prev is not None and not block.prev.in_use:
                block = block.prev
            room = 0
            walker: _Block | None = block
            while walker is not None and not walker.in_use and room < size:
                room += walker.size
                walker = walker.next
            if room >= size:
                return block
        space = -(-max(ADDRESS_SPACE, size) // pool.page) * pool.page
        fresh = _Block(pool, self._addresses(space), space, is_expandable=True, mapped=False)
        pool.add_unmapped(fresh)
        return fresh

    def _map(self, block: _Block, size: int) -> _Block:
        """Gives the first pages of a block without memory some, and merges it with its neighbours."""
        pool = block.pool
        nbytes = -(-size // pool.page) * pool.page
        pool.take_unmapped(block)
        block.mapped = True
        if nbytes < block.size:
            rest = _Block(pool, block.address + nbytes, block.size - nbytes, is_expandable=True, mapped=False)
            _link(block, rest, block.next)
            block.size = nbytes
            pool.add_unmapped(rest)
        self._merge(block)
        pool.add(block)
        self.num_segments += nbytes // pool.page
        self._count(reserved=nbytes)
        return block

    def _unmap(self, block: _Block) -> None:
        """Takes the whole pages of a free block away; what is left at its ends stays free."""
        pool = block.pool
        begin = -(-(block.address - _GAP) // pool.page) * pool.page + _GAP
        end = (block.address + block.size - _GAP) // pool.page * pool.page + _GAP
        if begin >= end:
            return
        pool.take(block)
        if before := begin - block.address:
            rest = _Block(pool, block.address, before, is_expandable=True)
            _link(block.prev, rest, block)
            pool.add(rest)
        if after := block.address + block.size - end:
            rest = _Block(pool, end, after, is_expandable=True)
            _link(block, rest, block.next)
            pool.add(rest)
        block.address, block.size, block.mapped = begin, end - begin, False
        self._merge(block)
        pool.add_unmapped(block)
        self._count(reserved=begin - end)

    def _merge(self, block: _Block) -> None:
        """Takes in the neighbours that are free too (or have no memory either). The block itself is in no list."""
        pool = block.pool
        for other in (block.prev, block.next):
            if other is None or other.in_use or other.mapped != block.mapped:
                continue
            if other.mapped:
                pool.take(other)
            else:
                pool.take_unmapped(other)
            if other is block.prev:
                block.address = other.address
                _link(other.prev, block, block.next)
            else:
                _link(block.prev, block, other.next)
            block.size += other.size

    def _addresses(self, nbytes: int) -> int:
        """The next free addresses. Each begins a multiple of both page sizes behind `_GAP`."""
        step = LARGE_SEGMENT
        start = self._next_address
        self._next_address += -(-(nbytes + _GAP) // step) * step
        return start

    def _count(self, *, requested: int = 0, allocated: int = 0, reserved: int = 0) -> None:
        now, peaks = self.usage, self.peaks
        self.usage = now = Usage(now.requested + requested, now.allocated + allocated, now.reserved + reserved)
        self.peaks = Usage(
            max(peaks.requested, now.requested),
            max(peaks.allocated, now.allocated),
            max(peaks.reserved, now.reserved),
        )


def rounded(nbytes: int) -> int:
    """Bytes of a block for a request."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


def segment_nbytes(size: int) -> int:
    """Bytes that are asked for from the driver where no block of this (rounded) size is free."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING


def _room(block: _Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)


def _link(before: _Block | None, block: _Block, after: _Block | None) -> None:
    block.prev, block.next = before, after
    if before is not None:
        before.next = block
    if after is not None:
        after.prev = block
