"""Port 8002: metrics and health, for those who run the server."""

from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fairlead.api.doorkeeper import Doorkeeper
from fairlead.api.openapi import Operation, document
from fairlead.api.problems import Problems
from fairlead.api.web import Readiness, Serve, Shapes, health_response, json_app, json_response, live_response, ready_response
from fairlead.core.policy import Scope

OPS_SHAPES: Shapes = {"/admin": Problems(), "/ui": Problems()}
MetricsText = Callable[[str], Awaitable[tuple[str, bytes]]]
"""Takes an Accept header; returns the content type and the text: OpenMetrics where it is asked for, else Prometheus's own."""


def ops_app(
    repository: Readiness,
    metrics_text: MetricsText,
    admin: Iterable[Operation] = (),
    doorkeeper: Doorkeeper | None = None,
    pages: Iterable[tuple[str, str, Serve, Scope | None]] = (),
) -> ASGIApp:
    """`admin`: operations under /admin, which `doorkeeper` lets nobody do but callers of that scope. `pages`: the dashboard's."""

    async def metrics(request: Request) -> Response:
        content_type, text = await metrics_text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def health(_: Request) -> Response:
        return health_response(repository)

    async def live(_: Request) -> Response:
        return live_response()

    async def ready(_: Request) -> Response:
        return ready_response(repository)

    operations = tuple(admin)

    async def openapi(_: Request) -> Response:
        return json_response(document(operations, {}))

    return json_app(
        [
            ("GET", "/metrics", metrics, None),
            ("GET", "/healthz", health, None),
            ("GET", "/healthz/live", live, None),
            ("GET", "/healthz/ready", ready, None),
            *((each.method, each.path, each.serve, each.scope) for each in operations),
            *((("GET", "/admin/openapi.json", openapi, Scope.ADMIN),) if operations else ()),
            *pages,
        ],
        OPS_SHAPES,
        None if doorkeeper is None else doorkeeper.admit,
    )
