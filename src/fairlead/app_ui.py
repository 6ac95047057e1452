"""The dashboard of one server, put together: what it shows, and who may look."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp

from fairlead import __version__
from fairlead.api.doorkeeper import Doorkeeper
from fairlead.api.openapi import Operation
from fairlead.api.ui.doorkeeper import SessionDoorkeeper
from fairlead.api.ui.files import Files
from fairlead.api.ui.live import Live
from fairlead.api.ui.models import ModelList, Registered, state_of
from fairlead.api.ui.routes import UiRoute, UiRoutes, WithDashboard
from fairlead.api.ui.sessions import Sessions
from fairlead.core.ui import UiSettings
from fairlead.gateway.gateway import Gateway
from fairlead.observe.history import BIN_SECONDS, Gauge, History, Read
from fairlead.observe.metrics import Metrics
from fairlead.observe.processes import Processes
from fairlead.runtime.repository import Control, IndexEntry, ModelRepository
from fairlead.store.registry import RegistryStore

NUM_BUSIEST = 20
CACHE_SECONDS = 1.5
"""How long what the registry has may be shown without asking it."""

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
Alerts = Callable[[], Sequence[Any]]
"""What is pending or fires now, as JSON."""


class Dashboard:
    def __init__(
        self,
        settings: UiSettings,
        *,
        doorkeeper: Doorkeeper,
        metrics: Metrics,
        processes: Processes,
        repository: ModelRepository,
        gateway: Gateway,
        registry: RegistryStore | None,
        operations: Iterable[Operation],
        known: Callable[[str], bool],
        alerts: Alerts = tuple,
    ) -> None:
        """`operations`: of the administration. `known`: whether a model is served here or elsewhere."""
        self._metrics = metrics
        self._processes = processes
        self._repository = repository
        self._registry = registry
        self._alerts = alerts
        self._started = time.time()
        self._counted: tuple[float, dict[str, int]] = (-CACHE_SECONDS, {})
        self._registered: tuple[float, Mapping[str, Registered]] = (0.0, {})
        self.history = History(self._read, known)
        """A listener of finished requests."""
        self.live = Live(self._snapshot, max_viewers=settings.max_viewers)
        self.doorkeeper = SessionDoorkeeper(doorkeeper, Sessions(settings, doorkeeper.identity))
        self._routes = UiRoutes(
            Files(),
            self.doorkeeper,
            self.history,
            self.live,
            ModelList(repository.index, gateway.remote_models, self.history.model),
            self._read_registry,
            {*(each.path.split("/")[2] for each in operations), *(("load",) if repository.settings.control is Control.EXPLICIT else ())},
        )

    @property
    def routes(self) -> list[UiRoute]:
        return self._routes.routes

    def app(self, ops: ASGIApp, data: ASGIApp) -> ASGIApp:
        return WithDashboard(ops, data)

    def start(self, begin: Begin) -> None:
        begin("dashboard", self._tick)

    def stop(self) -> None:
        """Before the ops port closes."""
        self.live.stop()

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + BIN_SECONDS, loop.time())
            await asyncio.sleep(due - loop.time())
            self.history.tick(time.time())
            self.live.publish()

    def _read(self) -> Read:
        in_flight: dict[str, int] = {}
        waiting: dict[str, int] = {}
        tokens: dict[str, int] = {}
        blocks: dict[str, tuple[int, int]] = {}
        """(used, all)."""
        for each in list(self._metrics.models.values()):
            name, num_waiting = each.model, each.queue()[0]
            if num_waiting:
                waiting[name] = waiting.get(name, 0) + num_waiting
            if each.engine is not None:
                stats = each.engine()
                in_flight[name] = in_flight.get(name, 0) + stats.num_running
                tokens[name] = tokens.get(name, 0) + stats.num_generated_tokens
                used, total = blocks.get(name, (0, 0))
                blocks[name] = (used + stats.num_blocks - stats.num_free_blocks, total + stats.num_blocks)
        for line in self._metrics.lines():
            if num_waiting := sum(line.waiting.values()):
                waiting[line.model] = waiting.get(line.model, 0) + num_waiting
            in_flight[line.model] = line.in_flight
        models = {
            name: Gauge(
                in_flight=in_flight.get(name),
                waiting=waiting.get(name, 0),
                tokens=tokens.get(name),
                kv=_share(*blocks[name]) if name in blocks else None,
            )
            for name in {*in_flight, *waiting}
        }
        usages = [self._processes.own, *self._processes.replicas.values()]
        server = Gauge(
            waiting=sum(waiting.values()),
            kv=_share(*map(sum, zip(*blocks.values(), strict=True))) if blocks else None,
            cpu=round(sum(each.cpu_percent for each in usages) / 100, 3),
            rss=sum(each.rss_bytes for each in usages),
        )
        return Read(server, models)

    def _snapshot(self) -> dict[str, Any]:
        repository = self._repository
        return {
            "at": round(time.time(), 3),
            "server": {
                "version": __version__,
                "started": round(self._started),
                "ready": repository.ready,
                "stopping": repository.stopping,
                "cpus": os.cpu_count() or 1,
            },
            "models": self._count_models(),
            "totals": self.history.totals(),
            "reasons": self.history.reasons(),
            "busiest": self.history.busiest(NUM_BUSIEST),
            "alerts": list(self._alerts()),
        }

    def _count_models(self) -> dict[str, int]:
        """Not at each tick: of ten thousand models it takes a while."""
        now = time.monotonic()
        if now - self._counted[0] >= CACHE_SECONDS:
            by_name: dict[str, list[IndexEntry]] = {}
            for entry in self._repository.index():
                by_name.setdefault(entry.name, []).append(entry)
            states = Counter(state_of(entries)[0] for entries in by_name.values())
            took = time.monotonic() - now
            counts = {"known": len(by_name), "loaded": states["ready"], "failed": states["failed"], "loading": states["loading"]}
            self._counted = (now + took * 100, counts)  # at most a hundredth of the time
        return self._counted[1]

    def _read_registry(self) -> Mapping[str, Registered]:
        """Blocks."""
        read_at, found = self._registered
        if self._registry is None or time.monotonic() - read_at < CACHE_SECONDS:
            return found
        found = {row.name: Registered([], {}) for row in self._registry.models()}
        for version in self._registry.versions():
            found.setdefault(version.model, Registered([], {})).numbers.append(version.number)
        for alias in self._registry.aliases():
            found.setdefault(alias.model, Registered([], {})).aliases[alias.alias] = alias.number
        self._registered = (time.monotonic(), found)
        return found


def _share(used: int, total: int) -> float | None:
    return used / total if total else None
