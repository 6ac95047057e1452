"""Counts how the requests of watched models end, by the version that traffic gave them: `core.window`."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from fairlead.core.errors import Cancelled, FairleadError
from fairlead.core.request import Request, Response
from fairlead.core.watch import Watch
from fairlead.core.window import Tally, Window, bucket_of
from fairlead.gateway.books import plain
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.onlooker import Look, Onlooker
from fairlead.gateway.routing.trip import Trip
from fairlead.store.registry_rows import ExposureRow

MAX_EXPOSURES = 100_000
"""That wait to be taken: some 40 MB."""
LOOKED_AT = 8192
"""Elements of each output that are searched for NaN and infinity: every n-th of larger ones."""
FEW = 16
"""Elements up to which plain Python is quicker."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Watches:
    """Called from the event loop only. Costs nothing for models that nobody watches."""

    def __init__(self, dispatch: Dispatch, *, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970."""
        self._dispatch = dispatch
        self._clock = clock
        self._watched: dict[str, Watched] = {}
        self._exposures: deque[ExposureRow] = deque(maxlen=MAX_EXPOSURES)
        self.num_dropped = 0
        """Exposures that nobody took before there were too many."""
        dispatch.looks_of.append(self._watched.get)

    def set(self, watches: Mapping[str, Watch]) -> None:
        """From now on these, and no others. What was counted of a model goes on, unless it is for another rollout."""
        now = self._clock()
        before = dict(self._watched)
        self._watched.clear()
        for model, watch in watches.items():
            known = before.get(model)
            if known is None or known.watch.rollout != watch.rollout:
                known = Watched(self, self._dispatch, model, watch, now)
            known.watch = watch
            self._watched[model] = known
        if before.keys() != self._watched.keys() or any(before[model] is not known for model, known in self._watched.items()):
            self._dispatch.look_again()

    def take(self, now: float) -> list[Window]:
        """What happened since the last time: one window for each watched model, without tallies where there were no requests."""
        return [watched.take(now) for watched in self._watched.values()]

    def take_exposures(self, limit: int = MAX_EXPOSURES) -> list[ExposureRow]:
        """Which version answered which request, of models whose watch wants feedback; the oldest first."""
        exposures = self._exposures
        return [exposures.popleft() for _ in range(min(limit, len(exposures)))]

    def expose(self, model: str, version: str, request_id: str, rollout: str) -> None:
        row = ExposureRow(request_id=request_id, model=model, version=version, rollout=rollout, time=self._clock())
        if len(self._exposures) == MAX_EXPOSURES:
            self.num_dropped += 1
        self._exposures.append(row)


class Watched(Look):
    """One model's window, as it fills."""

    def __init__(self, watches: Watches, dispatch: Dispatch, model: str, watch: Watch, now: float) -> None:
        self.watches = watches
        self.model = model
        self.watch = watch
        self.clock = dispatch.clock
        self.tallies: dict[tuple[str, str], Tally] = {}
        """By version and class."""
        self._begin = now

    def begin(self, request: Request, version: str, trip: Trip | None) -> "Counted":
        return Counted(self, request, version, trip)

    def take(self, now: float) -> Window:
        window = Window(model=self.model, begin=self._begin, end=now)
        for (version, qos_class), tally in self.tallies.items():
            window.tallies.setdefault(version, {})[qos_class] = tally
        self.tallies, self._begin = {}, now
        return window


class Counted(Onlooker):
    """One request, until it is counted."""

    __slots__ = ("began", "finite", "first_at", "num", "num_tokens", "request", "trip", "version", "watched", "well")

    def __init__(self, watched: Watched, request: Request, version: str, trip: Trip | None) -> None:
        self.watched = watched
        self.request = request
        self.version = version
        self.trip = trip
        self.num = 0
        """Responses."""
        self.num_tokens = 0
        self.well = True
        self.finite = True
        self.first_at = 0.0
        self.began = watched.clock()

    def saw(self, response: Response) -> None:
        self.num += 1
        delta = response.delta
        if self.num == 1:
            self.well = response.status < 400
            if delta is not None or response.raw is not None:
                self.first_at = self.watched.clock()
        if delta is not None:
            usage = delta.usage
            self.num_tokens += len(delta.token_ids)
            if delta.finish_reason == "abort":
                self.well = False
            if delta.vector:
                self.finite = finite(np.frombuffer(delta.vector, "<f4"))
        else:
            usage = response.usage
            for array in response.outputs.values():
                if not finite(array):
                    self.finite = False
        if usage is not None and usage.completion_tokens:
            self.num_tokens = usage.completion_tokens

    def ended(self, error: FairleadError | None) -> None:
        watched, request, trip = self.watched, self.request, self.trip
        key = self.version, request.qos_class or request.caller.qos_class
        tally = watched.tallies.get(key)
        if tally is None:
            tally = watched.tallies[key] = Tally()
        if isinstance(error, Cancelled):
            tally.cancelled += 1
            return
        tally.requests += 1
        # Another model's answer is none of this version's.
        if error is not None or not self.well or (trip is not None and trip.fell_back):
            tally.errors += 1
            return
        if not self.finite:
            tally.nonfinite += 1
        now = watched.clock()
        seconds = now - self.began
        bucket = bucket_of(seconds)
        tally.latency[bucket] = tally.latency.get(bucket, 0) + 1
        num_tokens = self.num_tokens
        if self.num > 1 and self.first_at:
            bucket = bucket_of(self.first_at - self.began)
            tally.first[bucket] = tally.first.get(bucket, 0) + 1
            if num_tokens > 1:
                bucket = bucket_of((now - self.first_at) / (num_tokens - 1))
                tally.per_token[bucket] = tally.per_token.get(bucket, 0) + 1
        elif num_tokens:  # all at once: the time to the first one is part of it
            bucket = bucket_of(seconds / num_tokens)
            tally.per_token[bucket] = tally.per_token.get(bucket, 0) + 1
        if watched.watch.feedback and request.num_requests and (name := request.log_id or plain(request.id)):
            watched.watches.expose(request.model, self.version, name, watched.watch.rollout)


def finite(array: np.ndarray) -> bool:
    """Whether neither NaN nor infinity is among the elements that are looked at."""
    dtype = array.dtype
    if dtype.kind != "f":
        return dtype != BFLOAT16 or bool(np.isfinite(sample(array)).all())
    if array.size > LOOKED_AT:
        array = sample(array)
    # One pass in few calls; what overflows it may still be finite.
    total = sum(array.ravel().tolist()) if array.size <= FEW else np.vdot(array, array)
    return math.isfinite(total) or bool(np.isfinite(array).all())


def sample(array: np.ndarray) -> np.ndarray:
    """At most LOOKED_AT elements, from all over it, or (where that would copy it) the first ones."""
    if array.size <= LOOKED_AT:
        return array
    return array.reshape(-1)[:: -(-array.size // LOOKED_AT)] if array.flags.c_contiguous else array.flat[:LOOKED_AT]
