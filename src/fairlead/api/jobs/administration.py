"""`/admin/jobs`: every tenant's jobs, for whoever runs the server."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Annotated

from msgspec import Meta, Struct, structs
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField, NoQuery, query_of
from fairlead.api.admin_route import actor_of, operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.jobs.canonical import MAX_LISTED, Canonical, Job
from fairlead.api.jobs.face import JOB_ID
from fairlead.api.openapi import Operation
from fairlead.api.web import json_response
from fairlead.core.caller import Caller
from fairlead.core.jobs import JobStatus
from fairlead.jobs.desk import unknown
from fairlead.store.job_rows import JobQuery, JobRow
from fairlead.store.rows import AuditRow

Record = Callable[[AuditRow], None]
"""Into the audit log; it waits for the store."""


class JobsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    status: str = ""
    """With commas between."""
    model: str | None = None
    tenant: str | None = None
    before: str | None = None
    """`next` of the page before."""
    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] = 50


class AdminJob(Job, kw_only=True):
    """Addresses are paths of the data port."""

    tenant: str
    project: str
    key: str
    face: str
    """The protocol that it was submitted by."""
    request_id: str


class AdminJobs(Struct):
    jobs: list[AdminJob]
    """Without results: each job has its own. Previews are of those that run in this server."""
    next: str | None


class JobAdministration:
    def __init__(self, canonical: Canonical, record: Record) -> None:
        self.canonical = canonical
        self.desk = canonical.desk
        self.record = record

    @property
    def operations(self) -> Iterator[Operation]:
        yield operation("GET", "/admin/jobs", "adminJobs", "All tenants' jobs, the newest first", self.list, AdminJobs)
        yield operation("GET", "/admin/jobs/{job}", "adminJob", "One job, whoever's it is", self.get, AdminJob, None, 404)
        yield operation("POST", "/admin/jobs/{job}/cancel", "adminCancelJob", "Cancel it", self.cancel, AdminJob, None, 404)

    async def list(self, http: Request) -> Response:
        query = query_of(http, JobsQuery)
        statuses = [each for each in query.status.split(",") if each]
        if any(each not in set(JobStatus) for each in statuses):
            raise BadField(f"must be of {', '.join(JobStatus)}", "status")
        if query.before is not None and not JOB_ID.fullmatch(query.before):
            raise BadField("is none that was given", "before")
        wanted = JobQuery(
            tenant=query.tenant,
            statuses=tuple(map(JobStatus, statuses)),
            model=query.model,
            before=query.before,
            limit=query.limit,
        )
        rows = await self.desk.list(wanted)
        jobs = [await self._told(row, listed=True) for row in rows]
        return json_response(AdminJobs(jobs, rows[-1].id if len(rows) == query.limit else None))

    async def get(self, http: Request) -> Response:
        query_of(http, NoQuery)
        id = http.path_params["job"]
        return json_response(await self._told(await self.desk.get(id, await self._owner(id))))

    async def cancel(self, http: Request) -> Response:
        """As it is then; one that had ended stays as it was."""
        query_of(http, NoQuery)
        id = http.path_params["job"]
        row = await self.desk.cancel(id, await self._owner(id))
        address = caller_of(http)[0].address or (http.client.host if http.client else "")
        details = {"tenant": row.tenant, "model": row.model, "status": str(row.status)}
        did = AuditRow(time=time.time(), actor=actor_of(http), action="job.cancel", subject=id, details=details, address=address)
        await asyncio.to_thread(self.record, did)
        return json_response(await self._told(row))

    async def _owner(self, id: str) -> Caller:
        """Raises NotFound."""
        row = await asyncio.to_thread(self.desk.store.get, id)
        if row is None:
            raise unknown(id)
        return Caller(tenant=row.tenant)

    async def _told(self, row: JobRow, *, listed: bool = False) -> AdminJob:
        job = await self.canonical.job(row, None, listed=listed)
        said = {name: getattr(job, name) for name in structs.asdict(job)}
        return AdminJob(**said, tenant=row.tenant, project=row.project, key=row.key, face=row.face, request_id=row.request_id)
