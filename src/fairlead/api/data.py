"""The data port's app: every protocol's operations in one table."""

from starlette.types import ASGIApp

from fairlead.api.kserve.rest import Rest
from fairlead.api.openai.routes import OpenAI
from fairlead.api.web import json_app
from fairlead.observe.access import AccessLog
from fairlead.runtime.repository import ModelRepository


def data_app(repository: ModelRepository, *, access_log: AccessLog | None = None, max_body_bytes: int = 64 << 20) -> ASGIApp:
    """The ASGI app of port 8000. KServe's `infer` answers here with server-sent events only: plain answers are the server's own business."""
    log = access_log or AccessLog(None)
    kserve = [(operation.method, operation.path, operation.serve) for operation in Rest(repository, log, max_body_bytes).operations]
    return json_app([*kserve, *OpenAI(repository, log, max_body_bytes).routes])
