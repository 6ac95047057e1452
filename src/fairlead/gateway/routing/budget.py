"""How much of the load may be requests that are sent once more: an outage must not multiply it."""

from fairlead.gateway.routing.sliding import Sliding

SECONDS = 10.0
REQUESTS, SPENT = 0, 1


class Budget:
    """A share of the requests of the last ten seconds, and a few besides."""

    __slots__ = ("_sliding", "floor", "share")

    def __init__(self, share: float, floor: int) -> None:
        """`floor`: may always be spent in ten seconds, unless `share` is 0."""
        self.share = share
        self.floor = floor if share else 0
        self._sliding = Sliding(SECONDS, 2)

    def count(self, now: float) -> None:
        """A request came, for the first time."""
        self._sliding.turn(now)
        self._sliding.add(REQUESTS)

    def spend(self, now: float) -> bool:
        """Whether one may be sent once more; it counts as sent."""
        self._sliding.turn(now)
        requests, spent = self._sliding.totals
        if spent + 1 > self.floor + self.share * requests:
            return False
        self._sliding.add(SPENT)
        return True
