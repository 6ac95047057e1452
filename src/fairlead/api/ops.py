"""Port 8002: metrics and health, for those who run the server."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fairlead.api.web import Readiness, health_response, json_app, live_response, ready_response

MetricsText = Callable[[str], tuple[str, bytes]]
"""Takes an Accept header; returns the content type and the text: OpenMetrics where it is asked for, else Prometheus's own."""


def ops_app(repository: Readiness, metrics_text: MetricsText) -> ASGIApp:
    async def metrics(request: Request) -> Response:
        content_type, text = metrics_text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def health(_: Request) -> Response:
        return health_response(repository)

    async def live(_: Request) -> Response:
        return live_response()

    async def ready(_: Request) -> Response:
        return ready_response(repository)

    return json_app(
        [("GET", "/metrics", metrics), ("GET", "/healthz", health), ("GET", "/healthz/live", live), ("GET", "/healthz/ready", ready)]
    )
