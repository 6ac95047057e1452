import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from fairlead.runtime.slab import ALIGNMENT, Ranges, Slab, StaleRange, create_slab

SIZE = 64 * ALIGNMENT


class RangesInUse(RuleBasedStateMachine):
    """Whatever is asked for and given back in whatever order: ranges never overlap and none is lost."""

    generations = Bundle("generations")

    def __init__(self):
        super().__init__()
        self.ranges = Ranges(SIZE)
        self.held: dict[int, tuple[int, int]] = {}

    @rule(target=generations, nbytes=st.integers(0, SIZE + 1))
    def allocate(self, nbytes):
        found = self.ranges.allocate(nbytes)
        if found is None:
            return 0
        offset, generation = found
        assert generation > max(self.held, default=0)
        assert offset % ALIGNMENT == 0 and offset >= 0 and offset + nbytes <= SIZE
        assert all(offset + nbytes <= other or other + size <= offset for other, size in self.held.values())
        self.held[generation] = (offset, nbytes)
        return generation

    @rule(generation=generations)
    def release(self, generation):
        self.ranges.release(generation)
        self.held = {g: place for g, place in self.held.items() if g > generation}

    @invariant()
    def nothing_is_lost(self):
        taken = sum(-(-max(size, 1) // ALIGNMENT) * ALIGNMENT for _, size in self.held.values())
        assert self.ranges.num_free_bytes + taken == SIZE

    def teardown(self):
        self.ranges.release(self.ranges.generation)
        assert self.ranges.num_free_bytes == SIZE
        assert self.ranges.allocate(SIZE) is not None  # in one piece again


TestRangesInUse = RangesInUse.TestCase


@given(st.integers(1, 1000))
def test_a_range_that_was_never_given_out_cannot_be_given_back(generation):
    ranges = Ranges(SIZE)
    with pytest.raises(StaleRange):
        ranges.release(generation)


def test_a_full_slab_says_so_and_recovers():
    ranges = Ranges(SIZE)
    assert ranges.allocate(SIZE) == (0, 1)
    assert ranges.allocate(1) is None
    ranges.release(1)
    assert ranges.allocate(1) == (0, 2)


def test_the_reader_sees_what_was_written_and_can_change_neither_bytes_nor_size():
    fd = create_slab(1 << 20, "test")
    writer, reader = Slab(fd, writer=True), Slab(fd, writer=False)
    writer.memory[5] = 7
    assert reader.memory[5] == 7
    with pytest.raises(ValueError):
        reader.memory[5] = 8
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    assert writer.memory[5] == 7  # the mapping lives on
