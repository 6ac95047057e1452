"""The part of the administration that explains requests: the last ones, the failed ones, the slow ones, and each step by step."""

import asyncio
import time
from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import query_of
from fairlead.api.admin_route import operation
from fairlead.api.web import json_response
from fairlead.core.errors import NotFound
from fairlead.observe.explain import Explained, Summary, explained, summary_of
from fairlead.observe.finished import Finished
from fairlead.observe.recent import Kind, Recent

MAX_RELATED = 20
AT_ONCE = 20
"""Requests that are summed up before others have their turn."""


class RequestsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: Kind = "recent"
    model: str = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class ShownRequests(Struct, frozen=True):
    requests: list[Summary]
    """The newest first; of slow ones the slowest."""


class RequestRoutes:
    def __init__(self, recent: Recent, finished: Finished) -> None:
        self.recent = recent
        self.finished = finished
        self.operations = (
            operation(
                "GET", "/admin/requests", "adminRequests", "Finished requests: recent, failed or slow ones", self.list, ShownRequests
            ),
            operation(
                "GET",
                "/admin/requests/{request:path}",
                "adminRequest",
                "What became of one, step by step, and where its time went",
                self.show,
                Explained,
                None,
                404,
            ),
        )

    async def list(self, http: Request) -> Response:
        query = query_of(http, RequestsQuery)
        self.finished.flush()
        since = time.time() - time.perf_counter()
        found = self.recent.listed(query.kind, model=query.model, limit=query.limit)
        shown: list[Summary] = []
        for each in found:
            shown.append(summary_of(each, since))
            if len(shown) % AT_ONCE == 0:
                await asyncio.sleep(0)
        return json_response(ShownRequests(shown))

    async def show(self, http: Request) -> Response:
        """Raises NotFound."""
        id = http.path_params["request"]
        self.finished.flush()
        timeline = self.recent.find(id) if id else None
        if timeline is None:
            kept = self.recent.settings
            raise NotFound(
                f"no finished request '{id[:128]}' is remembered here: of all requests the last {kept.keep} are, and the failed and slow ones"
                " for longer (`requests` in fairlead.yaml)"
            )
        since = time.time() - time.perf_counter()
        related = tuple(self.recent.related(timeline, MAX_RELATED))
        return json_response(explained(timeline, since, median=self.recent.median_seconds(timeline), related=related))
