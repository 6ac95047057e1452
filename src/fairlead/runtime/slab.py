"""Shared memory for large tensors: one slab for each direction between two processes of a host.

A slab has one writer, which owns the bookkeeping (`Ranges`), and one reader, which maps the same memory.
Ranges are handed out with ever higher generations; the reader says up to which generation it is done, so a
range is never given back twice, nor by name of a range that has moved on.
"""

import fcntl
import mmap
import os
from bisect import bisect_left
from collections import deque

import numpy as np

SLAB_BYTES = 256 << 20
"""Of address space; memory is taken only as it is written to."""
ALIGNMENT = 64


class StaleRange(Exception):
    """The peer named a range that it cannot have."""


class Ranges:
    """A free-list allocator over `size` bytes: first fit, so that the same low pages stay warm."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.generation = 0
        """Of the youngest range given out."""
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (offset, length), by offset, never adjacent
        self._held: deque[tuple[int, int, int]] = deque()  # (generation, offset, length), oldest first

    @property
    def num_free_bytes(self) -> int:
        return sum(length for _, length in self._free)

    def allocate(self, nbytes: int) -> tuple[int, int] | None:
        """Offset and generation of a range of at least `nbytes`; None where none is free."""
        length = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        for i, (offset, free) in enumerate(self._free):
            if free >= length:
                if free == length:
                    del self._free[i]
                else:
                    self._free[i] = (offset + length, free - length)
                self.generation += 1
                self._held.append((self.generation, offset, length))
                return offset, self.generation
        return None

    def release(self, generation: int) -> None:
        """Give back all ranges up to this generation. Raises StaleRange for one that was never given out."""
        if generation > self.generation:
            raise StaleRange(f"range {generation} was never given out; the last one is {self.generation}")
        while self._held and self._held[0][0] <= generation:
            _, offset, length = self._held.popleft()
            i = bisect_left(self._free, (offset, 0))
            if i < len(self._free) and offset + length == self._free[i][0]:
                length += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == offset:
                i -= 1
                offset, before = self._free.pop(i)
                length += before
            self._free.insert(i, (offset, length))


class Slab:
    """The memory of one direction, mapped. Lives as long as it or a view of it is referenced."""

    def __init__(self, fd: int, *, writer: bool) -> None:
        size = os.fstat(fd).st_size
        access = mmap.PROT_READ | mmap.PROT_WRITE if writer else mmap.PROT_READ
        self.memory = np.frombuffer(mmap.mmap(fd, size, prot=access), np.uint8)
        self.ranges = Ranges(size)
        """The writer's."""
        self.received = 0
        """The reader's: the youngest generation it has seen."""


def create_slab(nbytes: int, name: str) -> int:
    """The descriptor of new anonymous shared memory whose size nobody can change: a reader of it cannot be made to fault."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
