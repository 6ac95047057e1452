"""The part of the composition root that jobs are: their store, runner, files, webhooks and doors."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import structlog

from fairlead.api.artifacts import ArtifactRoutes
from fairlead.api.jobs.administration import JobAdministration
from fairlead.api.jobs.bfl import BlackForest
from fairlead.api.jobs.canonical import Canonical
from fairlead.api.jobs.face import Shared
from fairlead.api.jobs.openai_images import OpenAIImages
from fairlead.api.jobs.replicate import Replicate
from fairlead.api.openapi import Operation
from fairlead.api.webhooks import WebhookRoutes
from fairlead.core.caller import Caller
from fairlead.core.errors import Unsupported
from fairlead.core.settings import Settings
from fairlead.gateway.gateway import Gateway
from fairlead.gateway.identity.identity import Identity
from fairlead.gateway.usage import UsageLog
from fairlead.jobs.addresses import check_url
from fairlead.jobs.artifacts import Artifacts
from fairlead.jobs.changes import Changes
from fairlead.jobs.desk import Desk
from fairlead.jobs.links import Links
from fairlead.jobs.runner import Runner
from fairlead.jobs.secrets import Secrets
from fairlead.jobs.webhooks import Deliveries, new_secret
from fairlead.observe.counts import Counts
from fairlead.observe.finished import Finished
from fairlead.observe.tracing.tracing import Tracing
from fairlead.runtime.repository import ModelRepository
from fairlead.store.database import default_folder
from fairlead.store.job_rows import DeliveryRow, JobRow
from fairlead.store.jobs import JobStore
from fairlead.store.rows import UsageRow
from fairlead.store.store import Store

log = structlog.get_logger("fairlead.jobs")

POLL_SECONDS = 0.5
"""How often the store is asked for what other processes did, where it does not tell (SQLite) ..."""
NOTIFIED_POLL_SECONDS = 5.0
"""... and where it does (PostgreSQL)."""

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
"""(name, work): something that goes on for ever, begun again where it fails."""


class Jobs:
    """All of it, of one server."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        gateway: Gateway,
        identity: Identity,
        usage: UsageLog | None,
        repository: ModelRepository,
        finished: Finished,
        tracing: Tracing | None,
        counts: Counts,
    ) -> None:
        """Raises ConfigError."""
        self.settings = settings
        self.store: JobStore = store.jobs
        self.identity = identity
        self.repository = repository
        self.gateway = gateway
        self.changes = Changes()
        self.id = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        poll_seconds = NOTIFIED_POLL_SECONDS if self.store.notifies else POLL_SECONDS
        self.files = Artifacts(settings.artifacts, _folder(settings, store))
        self.links = Links(Secrets(self.store, "links", new_secret), settings.artifacts)
        self.desk = Desk(self.store, settings.jobs, self.changes, gateway.welcome, poll_seconds=poll_seconds)
        self.runner = (
            Runner(
                self.id,
                store=self.store,
                files=self.files,
                inference=gateway,
                inspect=gateway.inspect,
                callers=self._caller,
                models=self._models,
                late=usage.add if usage is not None else _nowhere,
                books=usage is not None,
                settings=settings.jobs,
                log_seconds=settings.webhooks.log_seconds,
                changes=self.changes,
                finished=finished,
                counts=counts,
                poll_seconds=poll_seconds,
            )
            if settings.jobs.run
            else None
        )
        webhook_secrets = Secrets(self.store, "webhook", new_secret)
        self.deliveries = (
            Deliveries(
                self.store, settings.webhooks, webhook_secrets, self._render, counts, runner=self.id, finished=finished, tracing=tracing
            )
            if settings.webhooks.enabled and settings.jobs.run
            else None
        )
        if self.deliveries is not None:
            self.changes.deliver = self.deliveries.look
        shared = Shared(
            self.desk,
            repository,
            gateway,
            finished,
            self.links.to,
            self._check_webhook,
            settings.limits.max_request_bytes,
            settings.artifacts.public_url,
        )
        self.canonical, self.bfl, self.replicate = Canonical(shared), BlackForest(shared), Replicate(shared)
        self._doors = (
            self.canonical,
            OpenAIImages(shared, self.files),
            ArtifactRoutes(self.store.get, self.files, self.links, finished),
            WebhookRoutes(self.store, webhook_secrets, settings.webhooks, self.deliveries, finished),
            self.replicate,
            self.bfl,
        )
        self.administration = JobAdministration(self.canonical, lambda did: store.record((), (did,)))
        self._stop_listening = Event()

    @property
    def operations(self) -> Iterator[Operation]:
        """Black Forest Labs' last: its path could be any."""
        for door in self._doors:
            yield from door.operations

    async def start(self, begin: Begin) -> None:
        """Raises Unavailable."""
        await self.links.start()
        begin("links", self.links.run)
        if self.runner is not None:
            begin("jobs", self.runner.run)
        if self.deliveries is not None:
            begin("webhooks", self.deliveries.run)
        if self.store.notifies:
            begin("job-news", self._listen)

    async def stop(self, seconds: float) -> None:
        """Before the gateway and its models stop: what runs may end."""
        if self.runner is not None:
            await self.runner.stop(seconds)
        if self.deliveries is not None:
            await self.deliveries.stop(min(seconds, 5.0))

    async def close(self) -> None:
        self._stop_listening.set()
        self.files.close()

    async def _listen(self) -> None:
        """News of what other processes did."""
        loop = asyncio.get_running_loop()

        def heard(job: str) -> None:
            if self.runner is not None:
                self.runner.heard(job)
            else:
                self.changes.tell(job)

        def passed_on(job: str) -> None:
            loop.call_soon_threadsafe(heard, job)

        await asyncio.to_thread(self.store.listen, passed_on, self._stop_listening)

    def _check_webhook(self, url: str, field: str) -> None:
        """Raises InvalidRequest, Unsupported."""
        if not self.settings.webhooks.enabled:
            raise Unsupported(f"`{field}`: this server calls none (`webhooks.enabled` is false)")
        check_url(url, self.settings.webhooks, field)

    def _caller(self, row: JobRow) -> Caller:
        return self.identity.stored(tenant=row.tenant, project=row.project, key=row.key, address=row.address)

    def _models(self) -> list[str]:
        """Those that can be asked now. While a model's replicas start again its jobs wait, and use up no tries."""
        repository = self.repository
        names = {entry.name for entry in repository.index(ready=True)}
        ready = {name for name in names if any(repository.find(name, each).ready for each in repository.versions(name))}
        return sorted({*ready, *self.gateway.remote_models()})

    async def _render(self, delivery: DeliveryRow) -> bytes | None:
        """What a webhook says, in the words of the job's face."""
        row = await asyncio.to_thread(self.store.get, delivery.job, delivery.tenant)
        if row is None:
            return None
        match row.face:
            case "bfl":
                return msgspec.json.encode(self.bfl.told(row, None))
            case "replicate":
                return msgspec.json.encode(self.replicate.told(row, None))
        event = {
            "type": f"job.{delivery.event}",
            "timestamp": datetime.fromtimestamp(row.ended or time.time(), UTC).isoformat().replace("+00:00", "Z"),
            "data": await self.canonical.job(row, None),
        }
        return msgspec.json.encode(event)


def _nowhere(_: UsageRow) -> None:
    """Of a server that keeps no usage records."""


def _folder(settings: Settings, store: Store) -> Path:
    """Beside the store's file; in the user's data folder where it is no file."""
    file = store.file
    return (default_folder() if file is None else file.parent) / "artifacts"
