"""What metrics ask of the rooms: numbers that nobody counts, because they are there to be read."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import structlog

from fairlead import __version__
from fairlead.api.observe.replicas import ReplicaOperations, ServerProcess
from fairlead.control.rollout import Phase
from fairlead.control.rollout_state import Rollout
from fairlead.core.errors import Unavailable
from fairlead.core.policy import CALENDAR
from fairlead.core.settings import MetricsSettings
from fairlead.gateway.gateway import Gateway
from fairlead.gateway.limits.ledger import Limiter
from fairlead.gateway.limits.meter import Standing
from fairlead.observe.counts import Counts
from fairlead.observe.hardware import Devices
from fairlead.observe.lag import GcPauses, GilWait, LoopLag
from fairlead.observe.metrics import Metrics, Sample
from fairlead.observe.processes import Processes
from fairlead.observe.traffic import Traffic
from fairlead.runtime.replicas import Replica, replicas_of
from fairlead.runtime.repository import ModelRepository
from fairlead.store.job_rows import Backlog
from fairlead.store.jobs import JobStore

BUILD: tuple[Sample, ...] = (("fairlead_build_info", (__version__,), 1),)
STATES = ("ready", "starting", "failed", "asleep")
BACKLOG_SECONDS = 5.0

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
"""(name, work): something that goes on for ever, begun again where it fails."""

log = structlog.get_logger("fairlead.observe")


def replica_pids(repository: ModelRepository) -> Iterator[tuple[tuple[str, str, str], int | None]]:
    for version in repository.loaded():
        for replica in replicas_of(version):
            if replica.kind == "process":
                yield (replica.model, replica.version, str(replica.instance)), replica.pid


def replica_samples(repository: ModelRepository) -> Iterator[Sample]:
    for version in repository.loaded():
        states = Counter[str](replica.state for replica in replicas_of(version))
        for state in STATES:
            yield "fairlead_replicas", (version.name, version.version, state), states[state]


def kv_samples(repository: ModelRepository) -> Iterator[Sample]:
    for device in repository.kv.devices:
        if total := repository.kv.total(device):
            yield "fairlead_kv_budget_bytes", (device,), total


def gateway_samples(gateway: Gateway) -> Iterator[Sample | None]:
    cache = gateway.recalls.cache
    yield "fairlead_response_cache_entries", (), len(cache)
    yield "fairlead_response_cache_bytes", (), cache.num_bytes
    yield "fairlead_response_cache_capacity_bytes", (), cache.max_bytes
    yield "fairlead_response_cache_evicted_total", (), cache.num_evicted
    for model, shares in gateway.dispatch.routes.shares.items():
        for version, share in shares:
            yield "fairlead_traffic_share_ratio", (model, version), share
    yield from _refusals(gateway.counts)
    if isinstance(gateway.limits, Limiter):
        yield from _holds(gateway.limits, time.time())


def _refusals(counts: Counts) -> Iterator[Sample]:
    refused: Counter[tuple[str, str]] = Counter()
    for name, labels, number in counts.samples():
        if name == "fairlead_gateway_refused_total":
            kind, dash, unit = labels[1].partition("-")
            if dash and kind in ("limit", "budget"):
                refused[kind, unit.replace("-", "_")] += number
    for of, number in refused.items():
        yield "fairlead_limits_rejected_total", of, number


def _holds(limiter: Limiter, now: float) -> Iterator[Sample | None]:
    held: dict[tuple[str, str], float] = {}
    """(subject, unit): several rules of one subject hold the same."""
    rest: dict[tuple[str, str], float] = {}
    for standing in limiter.overview(now):
        unit = _unit(standing)
        held[standing.subject, unit] = max(held.get((standing.subject, unit), 0.0), standing.held)
        if standing.rule.amount:
            key = ("budget" if standing.rule.window in CALENDAR else "limit", unit)
            rest[key] = min(rest.get(key, 1.0), standing.remaining / standing.rule.amount)
        yield None
    sums: dict[tuple[str, str], float] = {}
    for (subject, unit), amount in held.items():
        kind = subject.partition(":")[0]
        sums[kind, unit] = sums.get((kind, unit), 0.0) + amount
        yield None
    for of, amount in sums.items():
        yield "fairlead_limits_held", of, amount
    for key, ratio in rest.items():
        yield "fairlead_limits_remaining_ratio", key, ratio


def _unit(standing: Standing) -> str:
    return "concurrent" if standing.unit is None else standing.unit


def rollout_samples(rollouts: Callable[[], Iterator[Rollout]]) -> Iterator[Sample]:
    for rollout in rollouts():
        step = rollout.current
        share = max(step.share, step.shadow) if step else float(rollout.promoted and rollout.phase is not Phase.ABORTED)
        for member in rollout.members:
            candidate = (member.model, str(member.candidate))
            yield "fairlead_rollout_phase", (*candidate, rollout.phase.value), 1
            yield "fairlead_rollout_step", candidate, rollout.step + 1 if step else 0
            yield "fairlead_rollout_steps", candidate, len(rollout.policy.steps)
            yield "fairlead_rollout_share_ratio", candidate, share
            for name, test in rollout.tests.get(member.model, {}).items():
                yield "fairlead_rollout_evidence", (*candidate, name), test.evidence


class JobBacklog:
    """How much there is to do, as the store says every BACKLOG_SECONDS."""

    def __init__(self, store: JobStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._known: Backlog | None = None
        """None where it could not be read."""

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(BACKLOG_SECONDS)

    async def look(self) -> None:
        try:
            self._known = await asyncio.to_thread(self._store.backlog)
        except Unavailable as error:
            if self._known is not None:
                log.warning("backlog_not_read", error=error.message)
            self._known = None

    def samples(self) -> Iterator[Sample]:
        known = self._known
        if known is None:
            return
        oldest: dict[str, float] = {}
        for (model, status), (number, since) in known.jobs.items():
            yield "fairlead_unfinished_jobs", (model, status), number
            oldest[status] = min(oldest.get(status, since), since)
        for status, since in oldest.items():
            yield "fairlead_unfinished_jobs_oldest_seconds", (status,), max(self._clock() - since, 0.0)
        yield "fairlead_webhooks_pending", (), known.num_calls


class Instruments:
    """All that measures without being asked to, of one server."""

    def __init__(
        self,
        settings: MetricsSettings,
        metrics: Metrics,
        *,
        repository: ModelRepository,
        gateway: Gateway,
        rollouts: Callable[[], Iterator[Rollout]] | None,
        jobs: JobStore | None,
        known: Callable[[str], bool],
    ) -> None:
        """`known`: whether a model is served here or elsewhere."""
        self.traffic = Traffic(max_tenants=settings.max_tenants, vllm_names=settings.vllm_names, known=known)
        """A listener of finished requests."""
        self.processes = Processes(partial(replica_pids, repository))
        self.loop_lag = LoopLag()
        self.gil_wait = GilWait() if settings.gil else None
        self.gc_pauses = GcPauses()
        self.devices = Devices()
        self.backlog = JobBacklog(jobs) if jobs is not None else None
        self._repository = repository
        self._began = time.monotonic()
        metrics.sources += [
            lambda: BUILD,
            self.traffic.samples,
            self.processes.samples,
            self.loop_lag.samples,
            self.gc_pauses.samples,
            self.devices.samples,
            partial(replica_samples, repository),
            partial(kv_samples, repository),
            partial(gateway_samples, gateway),
        ]
        if self.gil_wait is not None:
            metrics.sources.append(self.gil_wait.samples)
        if rollouts is not None:
            metrics.sources.append(partial(rollout_samples, rollouts))
        if self.backlog is not None:
            metrics.sources.append(self.backlog.samples)
        self.operations = ReplicaOperations(
            self._replicas, self.processes.replicas.get, lambda: self.devices.devices, self._process
        ).operations

    def start(self, begin: Begin) -> None:
        begin("processes", self.processes.run)
        begin("loop-lag", self.loop_lag.run)
        if self.backlog is not None:
            begin("job-backlog", self.backlog.run)
        if self.gil_wait is not None:
            self.gil_wait.start()
        self.gc_pauses.start()
        self.devices.start()

    def stop(self) -> None:
        """Blocks for a moment, where a device does not answer."""
        self.gc_pauses.stop()
        if self.gil_wait is not None:
            self.gil_wait.stop()
        self.devices.stop()

    def _replicas(self) -> Iterator[Replica]:
        for version in self._repository.loaded():
            yield from replicas_of(version)

    def _process(self) -> ServerProcess:
        own = self.processes.own
        return ServerProcess(
            pid=os.getpid(),
            rss_bytes=own.rss_bytes,
            cpu_percent=round(own.cpu_percent, 1),
            cpu_seconds=own.cpu_seconds,
            loop_lag_seconds=self.loop_lag.latest,
            uptime_seconds=time.monotonic() - self._began,
        )
