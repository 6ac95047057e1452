"""Which tokens the grammars of a step's answers allow."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLExecutor

from fairlead.llm.grammar import Matcher

MaskRows = np.ndarray[Any, np.dtype[np.int32]]
"""[R, W]: a bit for every token of the vocabulary, from the lowest on."""

MIN_CORES = 8
"""From so many on, masks are found several at a time."""
MAX_THREADS = 8
SLOW_SECONDS = 0.005
"""For a mask; usual are 10 to 200 microseconds."""
MAX_SLOW_SECONDS = 5.0
"""That one answer may take of the others' time with masks that are slow."""
TOO_SLOW = "the answer cannot go on as its grammar demands: it takes too long to find out which tokens may follow"


class Guided(NamedTuple):
    """One answer of a step."""

    matcher: Matcher
    draft: list[int]


class Masks:
    """For one step at a time."""

    def __init__(self, vocab_size: int, num_cores: int = 0) -> None:
        """`num_cores`: 0 for the machine's."""
        self._num_cores = num_cores or os.cpu_count() or 1
        self._num_words = -(-vocab_size // 32)
        self._rows_RW = np.zeros((0, self._num_words), np.int32)
        self._memory = (0, 0, 0)
        """Where they begin, bytes of one, how many there are."""
        self._num_found = 0
        """In this step."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._slow = False
        """The last step's were: it is to be seen whose."""

    @cached_property
    def _library(self) -> LLExecutor:
        return LLExecutor(max(1, min(MAX_THREADS, self._num_cores // 4)))

    @contextmanager
    def alongside(self, guided: Sequence[Guided]) -> Iterator[list[tuple[MaskRows, int]]]:
        """In a thread of their own while the step computes. When this ends, what `find` gives."""
        self._num_found = 0
        found: list[tuple[MaskRows, int]] = []
        if not guided:
            yield found
            return
        job = self._thread.submit(self.find, guided)
        try:
            yield found
        finally:
            found += job.result()

    def find(self, guided: Sequence[Guided]) -> list[tuple[MaskRows, int]]:
        """For each in order, the step's masks and where its own begin: that for its next token, and those for what follows each
        token of its draft."""
        starts, begin = [], self._num_found
        for each in guided:
            starts.append(self._num_found)
            self._num_found += 1 + len(each.draft)
        end = self._num_found
        if len(self._rows_RW) < end:
            self._rows_RW = np.zeros((max(end, 2 * len(self._rows_RW)), self._num_words), np.int32)
            self._memory = (self._rows_RW.ctypes.data, self._rows_RW.itemsize * self._num_words, len(self._rows_RW))
        if self._num_cores >= MIN_CORES and not self._slow:
            started = time.perf_counter()
            self._fill(guided, starts)
            self._slow = time.perf_counter() - started > SLOW_SECONDS * (end - begin)
        else:
            self._slow = self._fill_timed(guided, starts)
        return [(self._rows_RW, start) for start in starts]

    def _fill(self, guided: Sequence[Guided], starts: Sequence[int]) -> None:
        """Several at a time."""
        if plain := [(each.matcher.inner, start) for each, start in zip(guided, starts, strict=True) if not each.draft]:
            self._library.unsafe_compute_mask_ptr(plain, *self._memory)
        if drafted := [(each.matcher.inner, start, each.draft) for each, start in zip(guided, starts, strict=True) if each.draft]:
            self._library.unsafe_compute_mask_ptr_with_draft_token(drafted, *self._memory)

    def _fill_timed(self, guided: Sequence[Guided], starts: Sequence[int]) -> bool:
        """One after another. Returns whether any was slow; it is told so."""
        data, num_bytes, _ = self._memory
        slow = False
        before = time.perf_counter()
        for (matcher, draft), start in zip(guided, starts, strict=True):
            if draft:
                self._library.unsafe_compute_mask_ptr_with_draft_token([(matcher.inner, start, draft)], *self._memory)
            else:
                matcher.inner.unsafe_compute_mask_ptr(data + start * num_bytes, num_bytes)
            after = time.perf_counter()
            if after - before > SLOW_SECONDS * (1 + len(draft)):
                slow = True
                _blame(matcher, after - before)
            before = after
        return slow


def _blame(matcher: Matcher, seconds: float) -> None:
    matcher.slow_seconds += seconds
    if matcher.slow_seconds > MAX_SLOW_SECONDS:
        matcher.exhausted = TOO_SLOW
