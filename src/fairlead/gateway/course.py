"""What the gateway's policies come to for one model: worked out once, asked on every request."""

import asyncio
import time
from collections.abc import Callable

import structlog

from fairlead.core.errors import ConfigError, Unavailable
from fairlead.core.policy import FilterPolicy, GatewaySettings, ModelPolicy, rules_of
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.limits.meter import Subject
from fairlead.gateway.limits.price import FREE
from fairlead.gateway.queue import FairQueue, Waiting

log = structlog.get_logger("fairlead.gateway")

MAX_COURSES = 4096
MAX_FILTERS = 256
"""Compiled ones of tenants."""


class Course:
    """One model, as its requests find it. Made anew when the configuration changes; the queue goes on."""

    def __init__(self, name: str, settings: GatewaySettings, queue: FairQueue | None, *, known: bool) -> None:
        """`known`: it is served here or elsewhere."""
        policy = settings.model(name)
        self.name = name
        self.policy: ModelPolicy = policy
        self.price = policy.price if policy.price != FREE else FREE
        rules = rules_of(policy.limits)
        self.subject = Subject(f"model:{name}", rules) if rules else None
        self.queue = queue
        self.known = known
        self.label = name if known else ""
        """In metrics: names that anybody may make up are not theirs."""
        self.falls_back = bool(policy.routing.fallback)
        self.reuses = policy.cache.mode != "off" or policy.cache.single_flight

    @property
    def plain(self) -> bool:
        """Nothing is asked of a request that its caller does not bring with it."""
        return (
            self.queue is None
            and self.policy.filters is None
            and self.subject is None
            and not self.reuses
            and not self.falls_back
            and not self.policy.require_signature
        )


class Courses:
    """By model. Queues outlive a change of the configuration: whoever waits in them goes on waiting."""

    def __init__(
        self,
        settings: GatewaySettings,
        max_in_flight: Callable[[str], int],
        changed: Callable[[], object],
        come: Callable[[Waiting], None],
        known: Callable[[str], bool],
    ) -> None:
        """`known`: whether a model is served. `come`: their turn has come. `max_in_flight`: what a model's engines compute at once, 0
        for others. Another object of `changed` says that these two may be different now."""
        self.settings = settings
        self._changed = changed
        self._come = come
        self._known = known
        self._max_in_flight = max_in_flight
        self._seen: object = None
        self._courses: dict[str, Course] = {}
        self._filters: dict[FilterPolicy, Filters] = {}
        self._compiling: dict[FilterPolicy, asyncio.Task[Filters]] = {}
        self.queues: dict[str, FairQueue] = {}

    def configure(self, settings: GatewaySettings, filters: dict[FilterPolicy, Filters]) -> None:
        self.settings = settings
        self._filters = dict(filters)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._courses = {}
        for model in self.queues:
            self._queue(model)  # it may have more room, for those who wait

    def __getitem__(self, model: str) -> Course:
        changed = self._changed()
        if changed is not self._seen:
            self._seen = changed
            self._begin_anew()
        found = self._courses.get(model)
        if found is None:
            if len(self._courses) >= MAX_COURSES:
                self._courses.clear()  # names that nobody serves
            known = self._known(model)
            found = self._courses[model] = Course(model, self.settings, self._queue(model) if known else None, known=known)
        return found

    def filters(self, policy: FilterPolicy) -> Filters | None:
        """None: to be compiled first."""
        return self._filters.get(policy)

    async def compile(self, policy: FilterPolicy) -> Filters:
        """A tenant's own, on its first request: once, however many there are at the same time. Raises Unavailable where they cannot be."""
        compiling = self._compiling.get(policy)
        if compiling is None:
            compiling = self._compiling[policy] = asyncio.create_task(self._compile(policy), name="filters")
            compiling.add_done_callback(lambda _: self._compiling.pop(policy))
        return await asyncio.shield(compiling)

    async def _compile(self, policy: FilterPolicy) -> Filters:
        try:
            found = await asyncio.to_thread(Filters.of, policy)
        except ConfigError as error:
            log.error("filters_not_compiled", error=error.message)
            raise Unavailable("the filters of this tenant cannot be used: the operator's log says why") from None
        if len(self._filters) >= MAX_FILTERS:
            self._filters.clear()
        self._filters[policy] = found
        return found

    def _queue(self, model: str) -> FairQueue | None:
        settings = self.settings.model(model).queue
        limit = self._max_in_flight(model) if settings.max_in_flight is None else settings.max_in_flight
        queue = self.queues.get(model)
        if queue is None:
            if not limit:
                return None
            queue = self.queues[model] = FairQueue(settings, limit)
        queue.configure(settings)
        for item in queue.resize(limit, time.perf_counter()):
            self._come(item)
        return queue


def compiled(settings: GatewaySettings) -> dict[FilterPolicy, Filters]:
    """All filters that a configuration names. Takes a while: not for the event loop. Raises ConfigError."""
    models = [policy.filters for policy in settings.models.values()]
    tenants = [policy.filters for policy in settings.tenants.values()]
    return {policy: Filters.of(policy) for policy in (*models, *tenants) if policy is not None}
