"""What a tenant may do about its webhooks: see what was delivered and what was not, have it sent again, know and replace its secret."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fairlead.api.admin_bodies import Problem
from fairlead.api.artifacts import ended
from fairlead.api.doorkeeper import caller_of
from fairlead.api.line import AccessLine
from fairlead.api.openapi import Operation
from fairlead.api.web import Serve, json_response
from fairlead.core.errors import NotFound
from fairlead.core.policy import WebhookSettings
from fairlead.jobs.secrets import Rows, Secrets
from fairlead.jobs.webhooks import Deliveries
from fairlead.observe.finished import Finished
from fairlead.store.job_rows import DeliveryRow, DeliveryState
from fairlead.store.jobs import JobStore

NOT_STORED = {"Cache-Control": "no-store"}

Answer = Callable[[HttpRequest, str], Awaitable[Response]]
"""(request, tenant)."""


class Delivery(Struct, frozen=True, kw_only=True):
    """One webhook. Times are seconds since 1970."""

    id: str
    """The receiver's `webhook-id`."""
    job: str
    event: str
    url: str
    state: DeliveryState
    tries: int
    created: float
    next_at: float | None
    """When it is tried next; null: never."""
    ended: float | None
    last_status: int | None
    last_error: str


class DeliveryLog(Struct, frozen=True, kw_only=True):
    deliveries: list[Delivery]
    """The oldest first."""


class Secret(Struct, frozen=True, kw_only=True):
    key: str
    """`whsec_...`: what a library that verifies Standard Webhooks takes."""
    created: float
    until: float | None
    """Until when the one before it signs, too; null: there is none."""


class ReplicateSecret(Struct, frozen=True):
    key: str


class WebhookRoutes:
    """Its operations."""

    def __init__(
        self,
        store: JobStore,
        secrets: Secrets,
        settings: WebhookSettings,
        deliveries: Deliveries | None,
        finished: Finished,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`deliveries`: None where another server makes them."""
        self.store = store
        self.secrets = secrets
        self.settings = settings
        self.deliveries = deliveries
        self.finished = finished
        self.now = now
        get, post = "GET", "POST"
        self.operations = (
            self._operation(get, "/v1/jobs/{job}/deliveries", "jobDeliveries", "Webhooks of a job", self.log, DeliveryLog),
            self._operation(post, "/v1/deliveries/{delivery}/replay", "deliveryReplay", "Call once more, from the first try on", self.replay, Delivery),
            self._operation(get, "/v1/webhooks/secret", "webhookSecret", "What signs the tenant's webhooks", self.secret, Secret),
            self._operation(post, "/v1/webhooks/secret/rotate", "webhookSecretRotate", "Another secret; both sign for a while", self.rotate, Secret),
            self._operation(get, "/v1/webhooks/default/secret", "replicateWebhookSecret", "The same as Replicate's clients ask for it", self.replicate, ReplicateSecret),
        )  # fmt: skip

    async def log(self, http: HttpRequest, tenant: str) -> Response:
        job = http.path_params["job"]
        rows = await asyncio.to_thread(self.store.deliveries, job, tenant)
        if not rows and await asyncio.to_thread(self.store.get, job, tenant) is None:
            raise NotFound(f"there is no job `{job[:64]}`")
        return json_response(DeliveryLog(deliveries=list(map(_delivery, rows))))

    async def replay(self, http: HttpRequest, tenant: str) -> Response:
        id = http.path_params["delivery"]
        row = await asyncio.to_thread(self.store.replay, id, tenant, self.now())
        if row is None:
            raise NotFound(f"there is no delivery `{id[:64]}`")
        if self.deliveries is not None:
            self.deliveries.look()
        return json_response(_delivery(row))

    async def secret(self, _: HttpRequest, tenant: str) -> Response:
        return json_response(_secret(await self.secrets.rows(tenant)), headers=NOT_STORED)

    async def rotate(self, _: HttpRequest, tenant: str) -> Response:
        return json_response(_secret(await self.secrets.rotate(tenant, self.settings.rotation_seconds)), headers=NOT_STORED)

    async def replicate(self, _: HttpRequest, tenant: str) -> Response:
        return json_response(ReplicateSecret((await self.secrets.rows(tenant))[0].value), headers=NOT_STORED)

    def _operation(self, method: str, path: str, name: str, summary: str, serve: Answer, answer: Any) -> Operation:
        return Operation(
            name=name, method=method, path=path, tag="jobs", summary=summary, serve=self._lined(serve), answer=answer, errors=(500,), error=Problem
        )  # fmt: skip

    def _lined(self, serve: Answer) -> Serve:
        async def endpoint(http: HttpRequest) -> Response:
            line = AccessLine(self.finished, http)
            with ended(line):
                response = await serve(http, caller_of(http)[0].tenant)
            response.headers.update(line.headers)
            line.end(response.status_code, "")
            return response

        return endpoint


def _delivery(row: DeliveryRow) -> Delivery:
    return Delivery(
        id=row.id,
        job=row.job,
        event=row.event,
        url=row.url,
        state=row.state,
        tries=row.tries,
        created=row.created,
        next_at=row.next_at if row.state is DeliveryState.PENDING else None,
        ended=row.ended,
        last_status=row.last_status,
        last_error=row.last_error,
    )


def _secret(rows: Rows) -> Secret:
    return Secret(key=rows[0].value, created=rows[0].created, until=rows[1].expires if len(rows) > 1 else None)
