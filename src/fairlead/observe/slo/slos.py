"""Objectives and alerts at work: what finished is counted, looked at every few seconds, and written to the store every minute."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Protocol

import structlog
from msgspec import Struct

from fairlead.core.errors import Unavailable
from fairlead.core.slo import AlertSettings, Objective
from fairlead.core.timeline import Timeline
from fairlead.observe.counts import Counts
from fairlead.observe.slo.alerts import BURN, Signals, Watcher
from fairlead.observe.slo.board import Alert, Board, Sighting
from fairlead.observe.slo.burn import conditions, span_name
from fairlead.observe.slo.ledger import Hour, Ledger, Reading

WRITE_SECONDS = 60.0
HEAR_LOOKS = 5
"""Writes between two looks at what other servers counted."""
PURGE_LOOKS = 1440
KEPT_SECONDS = 180 * 86_400.0
TRUSTED_SECONDS = 3600.0
"""Nothing is purged once the calendar has moved on by so much more, or less, than time has passed."""
STOP_SECONDS = 5.0

log = structlog.get_logger("fairlead.slo")


class Store(Protocol):
    """It blocks, and raises Unavailable."""

    def write(self, server: str, hours: Sequence[Hour]) -> None: ...

    def read(self, *, slos: Collection[str], since: float, but: str) -> Sequence[Hour]: ...

    def purge(self, before: float) -> int: ...


class Shown(Struct, frozen=True):
    """An objective, as it stands."""

    reading: Reading
    alerts: tuple[Alert, ...]


class Slos:
    """Of one server. Lives in the event loop; the store works in threads."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        settings: AlertSettings,
        counts: Counts,
        *,
        server: str,
        signals: Callable[[], Awaitable[Signals]],
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`server`: another one for each life of each process. `now`: of a clock that only goes on."""
        self.objectives = {each.name: each for each in objectives}
        self.settings = settings
        self.server = server
        self.signals = signals
        self.now = now
        self.wall = wall
        self.ledger = Ledger(objectives, counts)
        self.board = Board(server)
        self.told: list[Callable[[Sequence[Alert]], None]] = []
        """Called with alerts that begin to fire, and with those that are resolved."""
        self.store: Store | None = None
        """None: what was counted is forgotten with this process."""
        self._counts = counts
        self._watcher = Watcher()
        self._began = (now(), wall())
        self._failing = False
        self._looks = 0
        self.rounds = 0
        """Times that the store was asked, with success or without."""

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        """A listener of `Finished`."""
        if self.objectives:
            self.ledger.add(timelines, self.now(), self.wall())

    # Alerts

    async def watch(self) -> None:
        """For ever."""
        while True:
            self.look(await self.signals())
            await asyncio.sleep(self.settings.every)

    def look(self, signals: Signals) -> None:
        now, wall = self.now(), self.wall()
        changed = self.board.look([*self._burning(now), *self._watcher.look(signals, now)], now, wall)
        for alert in changed:
            (log.error if alert.state == "firing" else log.info)(
                f"alert_{alert.state}",
                alert=alert.name,
                severity=alert.severity,
                subject=alert.subject,
                summary=alert.summary,
                runbook=self.runbook(alert.name),
            )
        if changed:
            for listener in self.told:
                try:
                    listener(changed)
                except Exception:
                    log.exception("alert_not_told")

    def _burning(self, now: float) -> Iterator[Sighting]:
        for name, counted in self.ledger.counted.items():
            for condition in conditions(counted.objective, partial(counted.within, now=now)):
                row = condition.row
                burn = counted.within(row.long, now).burn(counted.objective)
                summary = f"{name}: the error budget burns {burn:.3g} times as fast as it may, over {span_name(row.long)}"
                yield Sighting(BURN, condition.severity, name, summary, condition.active, condition.holds, row.pending, row.calm)

    def runbook(self, alert: str) -> str:
        return f"{self.settings.runbooks.rstrip('/')}/{alert}.md"

    # Showing

    def shown(self) -> list[Shown]:
        now, alerts = self.now(), self.board.alerts()
        return [
            Shown(self.ledger.read(name, now), tuple(each for each in alerts if each.name == BURN and each.subject == name))
            for name in self.objectives
        ]

    def gauges(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """(metric, labels, value)."""
        now = self.now()
        for name, objective in self.objectives.items():
            reading = self.ledger.read(name, now)
            yield "fairlead_slo_target_ratio", (name,), objective.target
            yield "fairlead_slo_budget_ratio", (name,), reading.budget_left
            for span, burn in reading.burn.items():
                yield "fairlead_slo_burn_rate", (name, span_name(span)), burn
        firing: dict[tuple[str, ...], float] = {}
        for alert in self.board.alerts():
            if alert.state == "firing":
                key = (alert.name, alert.subject if alert.name == BURN else "", alert.severity)
                firing[key] = firing.get(key, 0.0) + 1
        for labels, number in firing.items():
            yield "fairlead_alerts", labels, number

    # The store

    async def keep(self) -> None:
        """For ever, where there is a store."""
        store = self.store
        if store is None or not self.objectives:
            await asyncio.Event().wait()
            return
        while True:
            try:
                await self._write(store)
                if self._looks % HEAR_LOOKS == 0:
                    await self._hear(store)
                if self._looks % PURGE_LOOKS == 1 and self._calendar_is_sane():
                    await asyncio.to_thread(store.purge, self.wall() - KEPT_SECONDS)
            except Unavailable as error:
                self._failed(error)
            else:
                self._looks += 1
                self._failing = False
            self.rounds += 1
            await asyncio.sleep(WRITE_SECONDS)

    async def stop(self) -> None:
        """What was counted since the last minute is written."""
        if self.store is not None and self.objectives:
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._write(self.store)
            except (Unavailable, TimeoutError) as error:
                log.error("slo_not_written", error=str(error) or f"no answer within {STOP_SECONDS:g} s")

    async def _write(self, store: Store) -> None:
        """Raises Unavailable."""
        hours = self.ledger.unwritten()
        if hours:
            await asyncio.to_thread(store.write, self.server, hours)
            self.ledger.written(hours)

    async def _hear(self, store: Store) -> None:
        """Raises Unavailable."""
        longest = max(each.window for each in self.objectives.values())
        since = self.wall() - longest
        hours = await asyncio.to_thread(store.read, slos=list(self.objectives), since=since, but=self.server)
        # in a thread: a month of a hundred objectives would hold up requests
        await asyncio.to_thread(self.ledger.hear, hours, self.now(), self.wall())

    def _failed(self, error: Unavailable) -> None:
        self._counts.add("fairlead_slo_store_failures_total")
        dropped = self.ledger.give_up()
        if not self._failing or dropped:
            log.error("slo_not_written", error=error.message, dropped_hours=dropped)
        self._failing = True

    def _calendar_is_sane(self) -> bool:
        now, wall = self._began
        return abs((self.wall() - wall) - (self.now() - now)) < TRUSTED_SECONDS
