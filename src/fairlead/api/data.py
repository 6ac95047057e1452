"""The data port's app: every protocol's operations in one table, and the document made from it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fairlead.api.kserve.rest import Rest
from fairlead.api.openai.errors import refusal
from fairlead.api.openai.routes import OpenAI
from fairlead.api.openapi import Operation, document, examples_of
from fairlead.api.web import json_app, json_response
from fairlead.observe.access import AccessLog
from fairlead.runtime.repository import ModelRepository

MAX_EXAMPLES = 16
"""Models that the OpenAPI document shows bodies for."""


def data_app(repository: ModelRepository, *, access_log: AccessLog | None = None, max_body_bytes: int = 64 << 20) -> ASGIApp:
    """The ASGI app of port 8000. KServe's `infer` answers here with server-sent events only: plain answers are the server's own business."""
    log = access_log or AccessLog(None)
    operations = [*Rest(repository, log, max_body_bytes).operations, *OpenAI(repository, log, max_body_bytes).operations]

    async def openapi(_: Request) -> Response:
        ready = sorted({entry.name for entry in repository.index(ready=True) if repository.versions(entry.name)})
        return json_response(document(operations, examples_of(repository.find(name).spec for name in ready[:MAX_EXAMPLES])))

    operations.append(
        Operation(
            name="openapi",
            method="GET",
            path="/openapi.json",
            tag="document",
            summary="OpenAPI 3.1",
            serve=openapi,
            answer=dict[str, Any],
            errors=(500,),
        )
    )
    return json_app([(each.method, each.path, each.serve) for each in operations], {"/v1": refusal})
