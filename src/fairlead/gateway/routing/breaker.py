"""Which places are left out for a while. A pure state machine: outcomes and the time go in.

| state | means | ends |
|---|---|---|
| closed | it gets requests | after too many failures, or answers far slower than the others' |
| open | it is left out | after `open_seconds`, doubled each time that the trial fails, up to a minute |
| half-open | one request is tried | with that request: closed, or open again |
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from statistics import median

from fairlead.core.policy import Breaker
from fairlead.gateway.routing.sliding import NUM_BUCKETS, Sliding

LONGEST_OPEN = 60.0
LEAST_LATENCY = 0.05
"""Seconds: what answers faster is no outlier, however fast the others are."""
ANSWERS, FAILURES, SECONDS = range(3)


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Circuit:
    """What is known of one place's health."""

    __slots__ = ("_compare_at", "_failures", "_sliding", "_trial", "_until", "_wait", "opened", "policy", "why")

    def __init__(self, policy: Breaker) -> None:
        self.policy = policy
        self.opened = 0
        """How often."""
        self.why = ""
        """It opened last: `failures`, `error-rate`, `latency` or `trial`."""
        self._sliding = Sliding(policy.window, 3)
        self._compare_at = 0.0
        """When its latency is held against the others' next."""
        self._failures = 0
        """In a row."""
        self._until = 0.0
        """When it may be tried again; 0: closed."""
        self._wait = policy.open_seconds
        self._trial = False
        """One is under way."""

    def state(self, now: float) -> State:
        if not self._until:
            return State.CLOSED
        return State.HALF_OPEN if now >= self._until else State.OPEN

    def allows(self, now: float) -> bool:
        return not self._until or (now >= self._until and not self._trial)

    def sent(self, now: float) -> bool:
        """A request goes there; True: it is the trial, and must be reported as such."""
        if self._until and now >= self._until and not self._trial:
            self._trial = True
            return True
        return False

    def succeeded(self, now: float, seconds: float, *, trial: bool, others: Callable[[], Sequence[float]]) -> None:
        """It answered after `seconds`. `others`: the latencies of the other places, asked for now and then."""
        if trial:
            self._trial = False
            if _slow(seconds, others(), self.policy.latency_factor):
                self._open(now, "trial")
            else:
                self._close()
        elif not self._until:
            self._failures = 0
            sliding = self._sliding
            sliding.turn(now)
            sliding.add(ANSWERS)
            sliding.add(SECONDS, seconds)
            if now >= self._compare_at:
                self._compare_at = now + self.policy.window / NUM_BUCKETS
                mine = self.latency(now)
                if mine is not None and _slow(mine, others(), self.policy.latency_factor):
                    self._open(now, "latency")

    def failed(self, now: float, *, trial: bool) -> None:
        if trial:
            self._trial = False
            self._open(now, "trial")
        elif not self._until:
            self._failures += 1
            if self._failures >= self.policy.failures:
                self._open(now, "failures")
            else:
                self._count_failure(now, "error-rate")

    def outrun(self, now: float, *, trial: bool) -> None:
        """It was asked first, and another place answered before it: too slow, however long it would have taken."""
        if trial:
            self._trial = False
            self._open(now, "trial")
        elif not self._until:
            self._count_failure(now, "latency")

    def _count_failure(self, now: float, why: str) -> None:
        self._sliding.turn(now)
        self._sliding.add(ANSWERS)
        self._sliding.add(FAILURES)
        num_answers, num_failures, _ = self._sliding.totals
        if num_answers >= self.policy.min_requests and num_failures >= self.policy.error_rate * num_answers:
            self._open(now, why)

    def returned(self, *, trial: bool) -> None:
        """It came to no verdict: cancelled, or refused for being busy."""
        if trial:
            self._trial = False

    def latency(self, now: float) -> float | None:
        """Mean seconds to the first byte in the window; None where there were too few."""
        self._sliding.turn(now)
        num_answers, num_failures, seconds = self._sliding.totals
        timed = num_answers - num_failures
        return seconds / timed if timed >= self.policy.min_requests and not self._until else None

    def _open(self, now: float, why: str) -> None:
        longest = max(LONGEST_OPEN, self.policy.open_seconds)
        self._wait = min(self._wait * 2, longest) if why == "trial" else self.policy.open_seconds
        self._until = now + self._wait
        self.opened += 1
        self.why = why

    def _close(self) -> None:
        self._until = 0.0
        self._failures = 0
        self._sliding.clear()


def _slow(seconds: float, others: Sequence[float], factor: float) -> bool:
    return bool(others) and seconds > max(factor * median(others), LEAST_LATENCY)
