"""The simulated caching allocator: against the numbers of torch's own, and by what it promises."""

import pytest
import torch

from bench.allocator import random_requests, simulated
from fastpref.memory.allocations import PeakStorage
from fastpref.memory.caching_allocator import LARGE_PAGE, MIB, SMALL_PAGE, CachingAllocator, replayed

# The bytes that torch 2.11's allocator allocates and reserves at most for `random_requests(seed)`, with segments that
# grow and with segments of fixed size, as `python -m bench.allocator` printed them.
REAL = [
    (0, True, (1_761_506_304, 2_021_654_528)),
    (0, False, (1_778_375_680, 2_338_324_480)),
    (1, True, (1_864_460_800, 2_191_523_840)),
    (1, False, (1_883_886_080, 2_493_513_728)),
]


@pytest.mark.parametrize(("seed", "expandable", "sizes"), REAL, ids=str)
def test_it_takes_what_torch_takes(seed: int, expandable: bool, sizes: tuple[int, int]):
    """Allocated and reserved bytes are those of torch's allocator, to the byte."""
    assert simulated(random_requests(seed), expandable=expandable) == sizes


@pytest.mark.parametrize("expandable", [True, False])
def test_what_is_given_back_is_used_again(expandable: bool):
    """The same requests take nothing more a second time, and what was split serves as a whole again."""
    allocator = CachingAllocator(expandable=expandable)
    reserved = []
    for _ in range(3):
        for key, size in enumerate((1, 700, 3 * MIB, 40 * MIB, 5 * MIB)):
            allocator.allocate(key, size)
        for key in (1, 3, 0, 4, 2):
            allocator.free(key)
        reserved.append(allocator.reserved)
        assert allocator.allocated == 0
    assert len(set(reserved)) == 1
    allocator.allocate(9, 40 * MIB)
    assert allocator.reserved == reserved[0]


def test_sizes_of_blocks_and_pages():
    """A block has a multiple of 512 bytes, and segments grow by pages, those of small blocks by smaller ones."""
    allocator = CachingAllocator()
    allocator.allocate(0, 1)
    assert (allocator.allocated, allocator.reserved) == (512, SMALL_PAGE)
    allocator.allocate(1, MIB + 1)
    assert (allocator.allocated, allocator.reserved) == (512 + MIB + 512, SMALL_PAGE + LARGE_PAGE)
    allocator.allocate(2, 0)
    allocator.free(2)
    allocator.free(7)
    assert allocator.allocated == 512 + MIB + 512


def test_a_shorter_micro_batch_leaves_a_gap():
    """What does not depend on the length keeps its size in a replay, and with segments of fixed size a longer step
    after a shorter one finds its blocks too small."""
    with PeakStorage() as count:
        weights = torch.empty(3 * MIB, dtype=torch.uint8)
        trace = count.record()
        gradient, inputs = torch.empty_like(weights), torch.empty(30 * MIB, dtype=torch.uint8)
        count.relabel(gradient, "gradients")
        once = replayed(trace, (1.0,))
        assert once.peak == count.current == 36 * MIB
        assert replayed(trace, (0.5, 1.0)).peak == once.peak
        assert replayed(trace, (0.5,)).peak == 21 * MIB
        assert replayed(trace, (0.5, 1.0), expandable=False).reserved > replayed(trace, expandable=True).reserved
        assert replayed(trace, (0.5,), fixed={30 * MIB}).peak == once.peak
        del gradient, inputs
