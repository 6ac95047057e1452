"""The part of the composition root that keeps promises: objectives, alerts, who is told of them, and incidents."""

import asyncio
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
import yaml

from fairlead import __version__
from fairlead.api.observe.incidents import IncidentOperations
from fairlead.api.observe.slo import SloOperations, slo_state
from fairlead.api.openapi import Operation
from fairlead.control.rollout_state import Rollout
from fairlead.core.errors import ConfigError
from fairlead.core.settings import Settings
from fairlead.jobs.alerts import AlertCalls
from fairlead.observe.explain import Explained, explained
from fairlead.observe.incidents.exhibits import Exhibit, Happening, Rows, Span
from fairlead.observe.incidents.incidents import BEFORE_SECONDS, Incidents
from fairlead.observe.logs import journal
from fairlead.observe.metrics import Metrics, Sample
from fairlead.observe.recent import Kind, Recent
from fairlead.observe.redaction import SECRET, redacted
from fairlead.observe.slo.alerts import Signals
from fairlead.observe.slo.slos import Slos
from fairlead.runtime.repository import ModelRepository
from fairlead.store.database import default_folder
from fairlead.store.rows import AuditQuery, AuditRow
from fairlead.store.store import Store

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
"""(name, work): something that goes on for ever, begun again where it fails."""

MODELS_AT_ONCE = 100
"""Versions whose numbers are read before others have their turn."""
COUNTS_AT_ONCE = 300
"""The same of counters."""
DISK_SECONDS = 30.0
STOP_SECONDS = 5.0
MAX_AUDIT = 5000
MAX_REQUESTS = 1000
MAX_SHOWN = 10
MAX_ROLLOUTS = 200
MAX_VERSIONS = 1000
SHED = frozenset(("queue-full", "predicted-wait", "queue-timeout", "evicted"))

SIGNALS = {
    "fairlead_usage_failed_writes_total": "store_failures",
    "fairlead_control_store_failures_total": "store_failures",
    "fairlead_slo_store_failures_total": "store_failures",
    "fairlead_limits_redis_outages_total": "redis_outages",
}
"""Counters without labels that matter."""

log = structlog.get_logger("fairlead.slo")


class Reliability:
    """All of it, of one server."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        scrape: Callable[[str], Awaitable[tuple[str, bytes]]],
        recent: Recent,
        repository: ModelRepository,
        store: Store | None,
        loop_lag: Callable[[], float],
        config: Callable[[], str],
        audit: Callable[[AuditRow], None],
    ) -> None:
        """`config`: the text in force. Raises ConfigError."""
        self.settings = settings
        self.metrics = metrics
        self.recent = recent
        self.repository = repository
        self.store = store
        self.loop_lag = loop_lag
        self.config = config
        self.audit = audit
        self.server = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.slos = Slos(settings.slos, settings.alerts, metrics.counts, server=self.server, signals=self._signals)
        self.slos.store = None if store is None else store.slos
        self.calls = AlertCalls(settings.alerts, settings.webhooks, metrics.counts, runbook=self.slos.runbook)

        async def text() -> bytes:
            return (await scrape(""))[1]

        self.incidents = Incidents(settings.incidents, self._folder, text, server=self.server, release=__version__)
        self.incidents.alerts = lambda: [*self.slos.board.past, *self.slos.board.alerts()]
        self.incidents.versions = self._versions
        self.incidents.told = self._audit
        self.incidents.provide(
            {
                "slow.json": self._timelines("slow"),
                "failed.json": self._timelines("failed"),
                "logs.ndjson": self._logs,
                "config.yaml": self._config,
                "slo.json": self._slo,
                "versions.json": self._deployed,
            }
        )
        if store is not None:
            self.incidents.provide({"audit.json": self._audited, "configs.json": self._configs, "rollouts.json": self._rollouts})
        self.slos.told += [self.calls.tell, self.incidents.on_alerts]
        metrics.sources += [self.slos.gauges, self._disk]
        self._disk_free: float | None = None
        self._slo_operations = SloOperations(self.slos)
        self._incident_operations = IncidentOperations(self.incidents)

    @property
    def operations(self) -> Iterator[Operation]:
        """Of the ops port."""
        yield from self._slo_operations.operations
        yield from self._incident_operations.operations

    def start(self, begin: Begin) -> None:
        self.calls.start()
        begin("alerts", self.slos.watch)
        begin("slo-hours", self.slos.keep)
        begin("incidents", self.incidents.run)
        begin("disk", self._look_at_disk)

    async def stop(self) -> None:
        """Before the store is closed."""
        await asyncio.gather(self.slos.stop(), self.calls.stop(STOP_SECONDS))
        await self.incidents.stop_sampling()

    # What alerts look at

    async def _signals(self) -> Signals:
        found: dict[str, dict[str, float]] = {"not_loaded": dict.fromkeys(self.repository.failures(), 1.0)}
        restarts, preemptions, kv_free = Counter[str](), Counter[str](), dict[str, float]()
        asked = Counter[str]()
        for number, m in enumerate(list(self.metrics.models.values())):
            if number % MODELS_AT_ONCE == 0:
                await asyncio.sleep(0)
            name = f"{m.model}@{m.version}"
            restarts[name] = m.restarts()
            asked[m.model] += m.success.count + m.fail.count + m.cancelled + m.refused
            if m.engine is not None:
                stats = m.engine()
                preemptions[name] = stats.num_preemptions
                if stats.num_blocks and stats.num_waiting:
                    kv_free[name] = stats.num_free_blocks / stats.num_blocks
        found |= {"restarts": dict(restarts), "preemptions": dict(preemptions), "kv_free": kv_free}
        counted = await _counted(self.metrics)
        for model, shed in counted["shed"].items():
            asked[model] += int(shed)
        found |= {**counted, "asked": dict(asked), "loop_lag": {"": self.loop_lag()}}
        if self._disk_free is not None:
            found["disk_free"] = {"": self._disk_free}
        return found

    async def _look_at_disk(self) -> None:
        while True:
            try:
                usage = await asyncio.to_thread(shutil.disk_usage, self._data_folder())
                self._disk_free = usage.free / usage.total if usage.total else None
            except (OSError, ConfigError) as error:
                self._disk_free = None
                log.warning("disk_not_read", error=str(error))
            await asyncio.sleep(DISK_SECONDS)

    def _disk(self) -> Iterator[Sample]:
        if self._disk_free is not None:
            yield "fairlead_disk_free_ratio", (), self._disk_free

    # Incidents

    def _data_folder(self) -> Path:
        """Raises ConfigError."""
        file = None if self.store is None else self.store.file
        return default_folder() if file is None else file.parent.resolve()

    def _folder(self) -> Path:
        """Raises ConfigError."""
        folder = self.settings.incidents.folder
        return Path(folder) if folder else self._data_folder() / "incidents"

    def _audit(self, actor: str, action: str, id: str) -> None:
        self.audit(AuditRow(time=self.slos.wall(), actor=actor, action=action, subject=id))

    def _timelines(self, kind: Kind) -> Callable[[Span], Awaitable[Exhibit]]:
        async def exhibit(_: Span) -> Exhibit:
            timelines = self.recent.listed(kind, limit=MAX_REQUESTS)
            since = self.slos.wall() - time.perf_counter()
            told = await asyncio.to_thread(lambda: [explained(each, since) for each in timelines])
            return Exhibit(told, shown=_slowest(told) if kind == "slow" else _errors(told))

        return exhibit

    async def _logs(self, _: Span) -> Exhibit:
        return Exhibit("".join(f"{kept.line}\n" for kept in journal().ring.since()))

    async def _config(self, _: Span) -> Exhibit:
        return Exhibit(await asyncio.to_thread(shown_config, self.config()))

    async def _slo(self, _: Span) -> Exhibit:
        return Exhibit(slo_state(self.slos))

    async def _deployed(self, _: Span) -> Exhibit:
        versions = [{"model": model, "version": version, "digest": digest} for model, version, digest in self._versions()]
        failures = self.repository.failures()
        return Exhibit({"loaded": versions, "not_loaded": failures})

    def _versions(self) -> Sequence[tuple[str, str, str]]:
        loaded = sorted((each.name, each.version) for each in self.repository.loaded())[:MAX_VERSIONS]
        return [(name, version, self.repository.edition(name, version)) for name, version in loaded]

    async def _audited(self, span: Span) -> Exhibit:
        assert self.store is not None
        query = AuditQuery(since=span.begin - BEFORE_SECONDS, until=span.end + 1.0)
        rows = (await asyncio.to_thread(self.store.audit, query, MAX_AUDIT))[::-1]
        happenings = [Happening(row.time, f"{row.actor}: {row.action} {row.subject}", change=_changes(row)) for row in rows]
        return Exhibit(redacted(msgspec.to_builtins(rows), texts=True), tuple(happenings))

    async def _configs(self, span: Span) -> Exhibit:
        assert self.store is not None
        rows = [row for row in await asyncio.to_thread(self.store.configs) if span.begin - BEFORE_SECONDS <= row.time <= span.end]
        shown = [{"version": row.version, "time": row.time, "actor": row.actor, "text": shown_config(row.text)} for row in rows[::-1]]
        return Exhibit(shown)

    async def _rollouts(self, span: Span) -> Exhibit:
        assert self.store is not None
        since = span.begin - BEFORE_SECONDS
        rows = await asyncio.to_thread(self.store.control.rollouts, limit=MAX_ROLLOUTS)
        rollouts = [msgspec.json.decode(row.state, type=Rollout) for row in rows if row.updated >= since and row.created <= span.end]
        happenings = [
            Happening(
                past.began, f"rollout {each.id} of {_members(each)}: {past.phase}{_share(past.share)} {past.reason}".strip(), change=True
            )
            for each in rollouts
            for past in each.history
            if since <= past.began <= span.end
        ]
        return Exhibit(rollouts[::-1], tuple(happenings))


async def _counted(metrics: Metrics) -> dict[str, dict[str, float]]:
    """Signals of what is counted."""
    names = (
        "shed",
        "store_failures",
        "usage_lost",
        "redis_outages",
        "breakers",
        "traces_dropped",
        "alerts_lost",
        "jobs",
        "jobs_failed",
        "rollouts_aborted",
    )
    found: dict[str, Counter[str]] = {name: Counter() for name in names}
    for nth, (name, labels, number) in enumerate(metrics.counts.samples()):
        if nth % COUNTS_AT_ONCE == 0:
            await asyncio.sleep(0)
        match name, labels:
            case "fairlead_gateway_refused_total", (model, reason) if reason in SHED:
                found["shed"][model] += number
            case "fairlead_auth_refresh_failures_total", ("store",):
                found["store_failures"][""] += number
            case "fairlead_usage_records_total", ("dropped" | "refused",):
                found["usage_lost"][""] += number
            case "fairlead_gateway_breaker_opened_total", (model, place, _):
                found["breakers"][f"{model} at {place}"] += number
            case "fairlead_traces_total", ("dropped" | "failed",):
                found["traces_dropped"][""] += number
            case "fairlead_alert_calls_total", ("dropped" | "failed",):
                found["alerts_lost"][""] += number
            case "fairlead_jobs_total", (model, status, _):
                found["jobs"][model] += number
                found["jobs_failed"][model] += number if status == "failed" else 0
            case "fairlead_rollouts_total", (model, "aborted"):
                found["rollouts_aborted"][model] += number
            case _ if name in SIGNALS:
                found[SIGNALS[name]][""] += number
    return {name: dict(counter) for name, counter in found.items()}


def shown_config(text: str) -> str:
    """Without secrets: those that have a secret's name or form, and addresses of who is told of alerts, which often are one."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return "it cannot be read\n"
    if isinstance(config, dict):
        alerts = config.get("alerts")
        for receiver in alerts.get("webhooks") or () if isinstance(alerts, dict) else ():
            if isinstance(receiver, dict) and "url" in receiver:
                receiver["url"] = SECRET
    return str(yaml.safe_dump(_without_keys(redacted(config, texts=True)), sort_keys=False, allow_unicode=True))


def _without_keys(config: Any) -> Any:
    """Without what settings call a `key` (of an upstream), and the values of `headers` (of a collector), whose names say nothing."""
    if isinstance(config, list):
        return [_without_keys(each) for each in config]
    if not isinstance(config, dict):
        return config
    shown = {name: SECRET if name == "key" and each else _without_keys(each) for name, each in config.items()}
    if isinstance(headers := shown.get("headers"), dict):
        shown["headers"] = dict.fromkeys(headers, SECRET)
    return shown


def _slowest(told: Sequence[Explained]) -> Rows:
    rows = [(each.request.id, each.request.model, f"{each.request.seconds:.3g} s", each.why) for each in told[:MAX_SHOWN]]
    return Rows("The slowest requests", ("request", "model", "took", "why"), tuple(rows))


def _errors(told: Sequence[Explained]) -> Rows:
    counted = Counter((each.request.model, each.request.error) for each in told)
    rows = [(model, error, str(number)) for (model, error), number in counted.most_common(MAX_SHOWN)]
    return Rows("Errors of the latest requests that failed", ("model", "error", "requests"), tuple(rows))


def _changes(row: AuditRow) -> bool:
    return not row.action.startswith(("abuse.", "incident."))


def _members(rollout: Rollout) -> str:
    return ", ".join(f"{member.model}@{member.candidate}" for member in rollout.members)


def _share(share: float) -> str:
    return f" at {share:.0%}" if share else ""
