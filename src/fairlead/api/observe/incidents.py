"""Incidents: begun, ended, listed, and their archives."""

from typing import Annotated

from msgspec import Meta, Struct, structs
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from fairlead.api.admin_bodies import NoQuery, decoded, query_of
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.web import json_response
from fairlead.observe.incidents.incidents import MAX_TITLE, Incident, Incidents
from fairlead.store.transactions import Conflict

ARCHIVE = "application/gzip"


class NewIncident(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    title: Annotated[str, Meta(max_length=MAX_TITLE, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")] = ""


class ShownIncidents(Struct, frozen=True, kw_only=True):
    incidents: list[Incident]
    """The newest first; one that runs has no `ended`."""


class IncidentOperations:
    def __init__(self, incidents: Incidents) -> None:
        self.incidents = incidents
        self.operations = (
            operation("GET", "/admin/incidents", "adminIncidents", "The incident that runs, and those that are over", self.list, ShownIncidents),
            operation("POST", "/admin/incidents/start", "adminStartIncident", "Keep what is to be seen from now on, and a while before", self.start, Incident, NewIncident, 409),
            operation("POST", "/admin/incidents/stop", "adminStopIncident", "End it: one archive, with a post-mortem begun", self.stop, Incident, None, 404),
            structs.replace(
                operation("GET", "/admin/incidents/{incident}", "adminIncident", "Its archive (.tar.gz)", self.archive, None, None, 404),
                media=(ARCHIVE,),
            ),
        )  # fmt: skip

    async def list(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(ShownIncidents(incidents=await self.incidents.list()))

    async def start(self, http: Request) -> Response:
        body = await body_of(http)
        wanted = decoded(body, NewIncident) if body else NewIncident()
        if self.incidents.running is not None:
            raise Conflict(f"incident {self.incidents.running.incident.id} runs: stop it first")
        return json_response(await self.incidents.start(wanted.title, actor_of(http)))

    async def stop(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(await self.incidents.stop(actor_of(http)))

    async def archive(self, http: Request) -> Response:
        query_of(http, NoQuery)
        path = self.incidents.path(http.path_params["incident"])
        return FileResponse(path, media_type=ARCHIVE, filename=path.name, headers={"Cache-Control": "no-store"})
