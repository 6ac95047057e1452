"""What watches one server: put together here, of parts that know nothing of each other."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import IO, Any

from fairlead import __version__
from fairlead.api.observe.requests import RequestRoutes
from fairlead.api.observe.slo import ShownAlert, shown_alerts
from fairlead.api.openapi import Operation
from fairlead.app_control import ControlPlane
from fairlead.app_inspect import Inspection
from fairlead.app_jobs import Jobs
from fairlead.app_metrics import Instruments
from fairlead.app_slo import Reliability
from fairlead.core.settings import Settings
from fairlead.gateway.gateway import Gateway
from fairlead.observe.access import AccessLog
from fairlead.observe.finished import FLUSH_SECONDS, Finished
from fairlead.observe.metrics import Metrics
from fairlead.observe.recent import Recent
from fairlead.observe.tracing.tracing import Tracing
from fairlead.runtime.repository import ModelRepository
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
"""(name, work): something that goes on for ever, begun again where it fails."""


class Telemetry:
    """Of one server."""

    def __init__(self, settings: Settings, metrics: Metrics, stream: IO[str]) -> None:
        """`stream`: of the access log. Raises ConfigError."""
        self.settings = settings
        self.metrics = metrics
        self.access_log = AccessLog(stream if settings.logs.requests else None, metrics.responses)
        self.recent = Recent(settings.requests)
        self.finished = Finished(self.access_log, self.recent)
        self.finished.afterwards = self.recent.afterwards
        self.request_routes = RequestRoutes(self.recent, self.finished)
        self.tracing = Tracing.of(settings.traces, metrics.counts, __version__)
        """None where nothing is traced."""
        if self.tracing is not None:
            self.finished.listeners.insert(0, self.tracing)  # what is kept has a trace id, which the others tell
            self.tracing.kept.append(metrics.exemplify)
        self.inspection: Inspection | None = None
        self.instruments: Instruments | None = None
        """Once it is connected."""
        self.reliability: Reliability | None = None

    def connect(
        self, repository: ModelRepository, gateway: Gateway, control: ControlPlane | None, jobs: Jobs | None, known: Callable[[str], bool]
    ) -> None:
        """With the rooms, of which it asks more than they tell. `known`: whether a model is served here or elsewhere."""
        self.instruments = Instruments(
            self.settings.metrics,
            self.metrics,
            repository=repository,
            gateway=gateway,
            rollouts=None if control is None else control.leader.rollouts,
            jobs=None if jobs is None else jobs.store,
            known=known,
        )
        self.finished.listeners.append(self.instruments.traffic)
        self.inspection = Inspection(self.settings, repository=repository, gateway=gateway, finished=self.finished)

    def promise(
        self, repository: ModelRepository, store: Store | None, config: Callable[[], str], audit: Callable[[AuditRow], None]
    ) -> None:
        """Objectives, alerts and incidents. `config`: the text in force. Raises ConfigError."""
        assert self.instruments is not None
        lag = self.instruments.loop_lag
        self.reliability = Reliability(
            self.settings,
            self.metrics,
            scrape=self.scrape,
            recent=self.recent,
            repository=repository,
            store=store,
            loop_lag=lambda: lag.latest,
            config=config,
            audit=audit,
        )
        self.finished.listeners.append(self.reliability.slos)

    @property
    def operations(self) -> Iterator[Operation]:
        """Of the ops port."""
        yield from self.request_routes.operations
        if self.instruments is not None:
            yield from self.instruments.operations
        if self.inspection is not None:
            yield from self.inspection.operations
        if self.reliability is not None:
            yield from self.reliability.operations

    def alerts(self) -> list[ShownAlert]:
        """What is pending or fires, for the dashboard."""
        if self.reliability is None:
            return []
        slos = self.reliability.slos
        return shown_alerts(slos.board.alerts(), slos.runbook)

    async def scrape(self, accept: str) -> tuple[str, bytes]:
        """The metrics, with all that has ended by now."""
        self.finished.flush()
        return await self.metrics.scrape(accept)

    def start(self, begin: Begin) -> None:
        begin("finished", self._flush)
        if self.instruments is not None:
            self.instruments.start(begin)
        if self.inspection is not None:
            self.inspection.start(begin)
        if self.tracing is not None:
            self.tracing.start()
        if self.reliability is not None:
            self.reliability.start(begin)

    async def stop(self) -> None:
        """After the doors."""
        if self.instruments is not None:
            await asyncio.to_thread(self.instruments.stop)
        if self.inspection is not None:
            await self.inspection.stop()
        self.finished.flush()
        # at once: each waits a while for somebody who may not answer
        await asyncio.gather(*(each.stop() for each in (self.reliability, self.tracing) if each is not None))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.finished.flush()
