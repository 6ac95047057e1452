"""Counters of the gateway and what stands around it: those rows of `observe.table` that are `counted`."""

from collections import Counter
from collections.abc import Iterator


class Counts:
    """Added to in the event loop only."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, name: str, *labels: str, by: int = 1) -> None:
        """`name`: of a row of the table, whose labels these are."""
        self._counts[name, *labels] += by

    def get(self, name: str, *labels: str) -> int:
        return self._counts[name, *labels]

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], int]]:
        """(name, labels, number)."""
        for (name, *labels), number in list(self._counts.items()):
            yield name, tuple(labels), number
