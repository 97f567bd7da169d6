"""The model of torch's CUDA allocator: cases worked by hand from its source, and what must hold for any sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepless.errors import AllocatorError
from keepless.machine.allocator import (
    ALIGNMENT,
    LARGE_SEGMENT,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    CachingAllocator,
    Usage,
    rounded,
    segment_nbytes,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "size", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (33 * MIB, 33 * MIB, 34 * MIB),
    ],
)
def test_sizes(nbytes: int, size: int, segment: int) -> None:
    assert (rounded(nbytes), segment_nbytes(rounded(nbytes))) == (size, segment)


def test_a_small_request_takes_a_segment_of_2_mib_and_the_next_ones_fill_it() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(700)
    assert allocator.usage == Usage(700, 1024, 2 * MIB)
    second = allocator.malloc(MIB)
    assert second == first + 1024
    assert allocator.usage.reserved == 2 * MIB
    allocator.malloc(MIB)  # 1 MiB - 1 KiB is left
    assert allocator.usage == Usage(700 + 2 * MIB, 1024 + 2 * MIB, 4 * MIB)


def test_a_large_block_is_split_only_where_more_than_1_mib_is_left() -> None:
    allocator = CachingAllocator()
    allocator.malloc(11 * MIB)  # a segment of 12 MiB; 1 MiB is left, and stays with the block
    assert allocator.usage == Usage(11 * MIB, 12 * MIB, 12 * MIB)
    other = CachingAllocator()
    other.malloc(9 * MIB)  # a segment of 20 MiB; 11 MiB are left
    assert other.usage == Usage(9 * MIB, 9 * MIB, 20 * MIB)
    other.malloc(11 * MIB)
    assert other.usage.reserved == 20 * MIB


def test_best_fit_takes_the_smallest_block_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    large, middle, exact = (allocator.malloc(n * MIB) for n in (40, 30, 14))
    for block in (large, middle, exact):
        allocator.free(block)
    assert allocator.malloc(14 * MIB) == exact
    assert allocator.malloc(14 * MIB) == middle  # split: 16 MiB are left
    assert allocator.usage == Usage(28 * MIB, 28 * MIB, 84 * MIB)
    assert allocator.malloc(17 * MIB) == large


def test_neighbours_merge() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(5 * MIB) for _ in range(4)]
    assert allocator.usage.reserved == 20 * MIB
    for index in (0, 2, 1):
        allocator.free(blocks[index])
    assert allocator.malloc(15 * MIB) == blocks[0]
    assert allocator.usage.reserved == 20 * MIB


def test_fragments_that_no_request_fits_are_the_difference() -> None:
    """Four of 5 MiB fill a segment; with every other one gone 10 MiB are free and 6 MiB need another segment."""
    allocator = CachingAllocator()
    blocks = [allocator.malloc(5 * MIB) for _ in range(4)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    allocator.malloc(6 * MIB)
    assert allocator.usage == Usage(16 * MIB, 16 * MIB, 40 * MIB)


def test_the_cache_is_given_back_before_an_allocation_fails() -> None:
    allocator = CachingAllocator(limit=40 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    assert allocator.usage.reserved == 30 * MIB
    allocator.malloc(32 * MIB)
    assert allocator.usage == Usage(32 * MIB, 32 * MIB, 32 * MIB)
    assert allocator.num_flushes == 1
    with pytest.raises(AllocatorError, match=r"10\.00 MiB .* fails: 32\.00 MiB are held") as caught:
        allocator.malloc(10 * MIB)
    assert (caught.value.nbytes, caught.value.reserved) == (10 * MIB, 32 * MIB)
    assert allocator.usage == Usage(32 * MIB, 32 * MIB, 32 * MIB)


def test_a_segment_with_one_small_block_in_it_is_not_given_back() -> None:
    allocator = CachingAllocator()
    allocator.malloc(2 * MIB)
    rest = allocator.malloc(4 * MIB)
    allocator.free(rest)
    allocator.empty_cache()
    assert allocator.usage == Usage(2 * MIB, 2 * MIB, 20 * MIB)


def test_expandable_segments_grow_by_pages_and_give_whole_pages_back() -> None:
    allocator = CachingAllocator(expandable=True)
    first = allocator.malloc(30 * MIB)
    assert allocator.usage.reserved == 40 * MIB
    second = allocator.malloc(15 * MIB)  # 10 MiB are free, and one page behind them is mapped
    assert second == first + 30 * MIB
    assert allocator.usage == Usage(45 * MIB, 45 * MIB, 60 * MIB)
    allocator.free(first)
    allocator.empty_cache()  # the first page, whole; of the second 10 MiB are free; of the third 15 MiB
    assert allocator.usage == Usage(15 * MIB, 15 * MIB, 40 * MIB)
    again = allocator.malloc(25 * MIB)  # the page is mapped again, and merged with the 10 MiB behind it
    assert again == first
    assert allocator.usage.reserved == 60 * MIB


def test_expandable_segments_fragment_less() -> None:
    """Growing requests, each freed before the next: plain segments pile up, an expandable one grows."""
    reserved = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        for size in range(20, 200, 20):
            allocator.free(allocator.malloc(size * MIB))
        reserved.append(allocator.usage.reserved)
    assert reserved == [sum(range(20, 200, 20)) * MIB, 180 * MIB]


def test_nothing_is_allocated_for_nothing_and_nothing_strange_is_freed() -> None:
    allocator = CachingAllocator()
    assert allocator.malloc(0) == 0
    allocator.free(0)
    assert allocator.usage == Usage()
    with pytest.raises(AllocatorError, match="No block in use begins at 77"):
        allocator.free(77)
    with pytest.raises(AllocatorError, match="-1 bytes"):
        allocator.malloc(-1)


SIZES = st.one_of(
    st.integers(1, 4096), st.integers(1, 2 * SMALL_REQUEST), st.integers(MIB, 12 * MIB), st.integers(8 * MIB, 90 * MIB)
)


@settings(max_examples=200)
@given(st.data(), st.booleans(), st.sampled_from([None, 64 * MIB, 256 * MIB]))
def test_any_sequence(data: st.DataObject, expandable: bool, limit: int | None) -> None:
    """Blocks never overlap; sums are right after each event; all freed and the cache emptied leaves nothing."""
    allocator = CachingAllocator(limit=limit, expandable=expandable)
    held: dict[int, int] = {}
    highest = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["malloc", "malloc", "free", "empty"]))
        if action == "malloc":
            nbytes = data.draw(SIZES)
            try:
                address = allocator.malloc(nbytes)
            except AllocatorError:
                assert limit is not None
            else:
                assert address not in held
                held[address] = nbytes
        elif action == "free" and held:
            address = data.draw(st.sampled_from(sorted(held)))
            allocator.free(address)
            del held[address]
        elif action == "empty":
            allocator.empty_cache()
        blocks = allocator.blocks()
        assert [address for address, _ in blocks] == sorted(held)
        ends = [0, *(address + size for address, size in blocks)]
        assert all(end <= address for end, (address, _) in zip(ends[:-1], blocks, strict=True))
        sizes = dict(blocks)
        for address, nbytes in held.items():
            spare = sizes[address] - rounded(nbytes)
            is_small = rounded(nbytes) <= SMALL_REQUEST
            assert 0 <= spare < ALIGNMENT if is_small or expandable else 0 <= spare <= SMALL_REQUEST
        usage = allocator.usage
        assert usage.requested == sum(held.values())
        assert usage.allocated == sum(sizes.values())
        assert usage.reserved >= usage.allocated
        assert usage.reserved % SMALL_SEGMENT == 0
        page = LARGE_SEGMENT if expandable else 0  # torch compares the request with the limit, and maps whole pages
        assert limit is None or usage.reserved < limit + max(page, 1)
        highest = max(highest, usage.reserved)
    assert allocator.peaks.reserved >= highest
    for address in held:
        allocator.free(address)
    allocator.empty_cache()
    assert allocator.usage == Usage()
    assert allocator.largest_free() == 0


@settings(max_examples=100)
@given(st.lists(SIZES, min_size=1, max_size=20), st.booleans())
def test_a_sequence_that_repeats_settles(sizes: list[int], expandable: bool) -> None:
    """Blocks freed in the order of allocation come back: a steady step asks the driver for nothing."""
    allocator = CachingAllocator(expandable=expandable)
    seen = []
    for _ in range(6):
        for address in [allocator.malloc(size) for size in sizes]:
            allocator.free(address)
        seen.append(allocator.usage.reserved)
    assert seen[0] <= seen[-1]
    assert len(set(seen[-2:])) == 1
    assert seen[-1] <= sum(max(segment_nbytes(rounded(size)), LARGE_SEGMENT) for size in sizes) * 2
