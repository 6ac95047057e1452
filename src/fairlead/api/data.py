"""The data port's app: every protocol's operations in one table, and the document made from it."""

from collections.abc import Iterable, Iterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from fairlead.api.anthropic.errors import AnthropicErrors
from fairlead.api.anthropic.routes import Anthropic
from fairlead.api.doorkeeper import Doorkeeper, caller_of
from fairlead.api.jobs.bfl import BlackForestErrors
from fairlead.api.jobs.canonical import JobProblems
from fairlead.api.jobs.details import Details
from fairlead.api.kserve.rest import Rest
from fairlead.api.line import AccessLine
from fairlead.api.openai.door import Elsewhere
from fairlead.api.openai.errors import OpenAIErrors
from fairlead.api.openai.ranking import Rankings
from fairlead.api.openai.responses import Responses
from fairlead.api.openai.responses_kept import Kept
from fairlead.api.openai.routes import OpenAI
from fairlead.api.openapi import Operation, document, examples_of
from fairlead.api.status import http_status
from fairlead.api.web import Admit, Shapes, json_app, json_response
from fairlead.core.errors import FairleadError
from fairlead.core.policy import ResponseSettings, Scope
from fairlead.core.request import Inference
from fairlead.gateway.identity.identity import may_use
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

DATA_SHAPES: Shapes = {
    "/v1/jobs": JobProblems(),
    "/v1/artifacts": JobProblems(),
    "/v1/deliveries": JobProblems(),
    "/v1/webhooks": JobProblems(),
    "/v1/predictions": Details(),
    "/v1/models/fairlead/": Details(),
    "/v1/models/{owner}/": Details(),
    "/v1/get_result": BlackForestErrors(),
    "/v1/messages": AnthropicErrors(),
    "/v1/{model}": BlackForestErrors(),
    "/v1": OpenAIErrors(),
}
"""By the beginning of a path, or of an operation's pattern; the first that fits counts."""
MAX_EXAMPLES = 16
"""Models that the OpenAPI document shows bodies for."""


def data_app(
    repository: ModelRepository,
    *,
    gateway: Inference | None = None,
    doorkeeper: Doorkeeper | None = None,
    elsewhere: Elsewhere | None = None,
    more: Iterable[Operation] = (),
    finished: Finished | None = None,
    max_body_bytes: int = 64 << 20,
    kept: Kept | None = None,
    responses: ResponseSettings | None = None,
) -> ASGIApp:
    """The ASGI app of port 8000; `more`: of jobs; `kept`: responses that are, None for a server that keeps none. KServe's `infer` answers here with server-sent events only: plain answers are the server's own business."""
    finished = finished or Finished()
    inference = gateway or repository
    operations = [
        *data_operations(repository, inference, finished, elsewhere, max_body_bytes),
        *Responses(repository, inference, finished, max_body_bytes, elsewhere, kept, responses).operations,
        *more,
    ]

    async def openapi(http: Request) -> Response:
        caller, _ = caller_of(http)
        loaded = {entry.name for entry in repository.index(ready=True) if repository.versions(entry.name)}
        ready = sorted(name for name in loaded if may_use(caller, name))
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

    def unknown(http: Request, error: HTTPException) -> None:
        AccessLine(finished, http).end(error.status_code, error.detail)

    table = [(each.method, each.path, each.serve, each.scope) for each in operations]
    return json_app(table, DATA_SHAPES, _admit(doorkeeper, finished), unknown)


def data_operations(
    repository: ModelRepository, gateway: Inference, finished: Finished, elsewhere: Elsewhere | None, max_body_bytes: int
) -> Iterator[Operation]:
    """All but those of what is stored."""
    yield from Rest(repository, gateway, finished, max_body_bytes).operations
    yield from OpenAI(repository, gateway, finished, max_body_bytes, elsewhere).operations
    yield from Rankings(repository, gateway, finished, max_body_bytes, elsewhere).operations
    yield from Anthropic(repository, gateway, finished, max_body_bytes, elsewhere).operations


def _admit(doorkeeper: Doorkeeper | None, finished: Finished) -> Admit | None:
    """The doorkeeper's, with a line in the access log for everyone it sends away."""
    if doorkeeper is None:
        return None

    async def admit(http: Request, scope: Scope | None) -> None:
        try:
            await doorkeeper.admit(http, scope)
        except FairleadError as error:
            line = AccessLine(finished, http)
            line.end(http_status(error), error.message)
            error.headers = {**line.headers, **error.headers}
            raise

    return admit
