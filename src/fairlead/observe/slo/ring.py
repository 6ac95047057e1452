"""Events of the last while, in buckets of one width."""

from fairlead.observe.slo.burn import Events


class Ring:
    """The time is one that only goes on; what comes from before the newest bucket is counted in that."""

    def __init__(self, width: float, num_buckets: int) -> None:
        """`width`: seconds."""
        self.width = width
        self._good = [0] * num_buckets
        self._bad = [0] * num_buckets
        self._newest: int | None = None
        """The number of the newest bucket, since the clock's beginning."""

    def add(self, good: int, bad: int, now: float) -> None:
        at = self._advance(now) % len(self._good)
        self._good[at] += good
        self._bad[at] += bad

    def within(self, seconds: float, now: float) -> Events:
        """The bucket that is not over counts as a whole one."""
        newest, length = self._advance(now), len(self._good)
        num = min(max(round(seconds / self.width), 1), length)
        begin = (newest - num + 1) % length
        if begin + num <= length:
            return Events(sum(self._good[begin : begin + num]), sum(self._bad[begin : begin + num]))
        rest = begin + num - length
        return Events(sum(self._good[begin:]) + sum(self._good[:rest]), sum(self._bad[begin:]) + sum(self._bad[:rest]))

    def _advance(self, now: float) -> int:
        number, length = int(now // self.width), len(self._good)
        if self._newest is None:
            self._newest = number
        for each in range(max(self._newest + 1, number - length + 1), number + 1):
            self._good[each % length] = self._bad[each % length] = 0
        self._newest = max(self._newest, number)
        return self._newest
