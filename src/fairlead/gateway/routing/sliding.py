"""Sums over the last seconds, in a fixed amount of memory."""

NUM_BUCKETS = 10


class Sliding:
    """Sums of some numbers over the last `seconds`, to within a tenth of them. Time is an argument and never goes back."""

    __slots__ = ("_bucket", "_buckets", "_slot", "_turns_at", "_width", "totals")

    def __init__(self, seconds: float, num_sums: int) -> None:
        self.totals = [0.0] * num_sums
        """As of the last `turn`, and what was added since."""
        self._width = seconds / NUM_BUCKETS
        self._buckets = [[0.0] * num_sums for _ in range(NUM_BUCKETS)]
        self._slot = 0
        self._turns_at = 0.0
        """When the next slot begins: until then nothing becomes too old."""
        self._bucket = self._buckets[0]

    def add(self, index: int, amount: float = 1.0) -> None:
        """At the time of the last `turn`."""
        self._bucket[index] += amount
        self.totals[index] += amount

    def turn(self, now: float) -> None:
        """Forget what is too old."""
        if now < self._turns_at:
            return
        slot = int(now / self._width)
        if slot <= self._slot:
            return
        for gone in range(max(self._slot + 1, slot - NUM_BUCKETS + 1), slot + 1):
            self._buckets[gone % NUM_BUCKETS] = [0.0] * len(self.totals)
        self._slot = slot
        self._turns_at = (slot + 1) * self._width
        self._bucket = self._buckets[slot % NUM_BUCKETS]
        # Added up anew, so that rounding does not pile up over days
        self.totals[:] = map(sum, zip(*self._buckets, strict=True))

    def clear(self) -> None:
        for bucket in (*self._buckets, self.totals):
            bucket[:] = [0.0] * len(self.totals)
