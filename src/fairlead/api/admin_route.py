"""What every operation of the administration shares: its scope, its errors, who may ask, and what may stand in its address."""

from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from fairlead.api.admin_bodies import BadField, Problem, storable
from fairlead.api.doorkeeper import caller_of, is_local, is_origin_of
from fairlead.api.openapi import Operation
from fairlead.api.problems import Problems
from fairlead.api.status import INTERNAL
from fairlead.api.web import Serve, read_body
from fairlead.core.errors import FairleadError, Forbidden
from fairlead.core.policy import Scope
from fairlead.gateway.identity.keys import PREFIX

MAX_BODY_BYTES = 1 << 20

log = structlog.get_logger(__name__)

ANONYMOUS = "anonymous"
"""Who acts on a server that asks nobody."""


def operation(method: str, path: str, name: str, summary: str, serve: Serve, answer: Any, body: Any = None, *errors: int) -> Operation:
    return Operation(
        name=name,
        method=method,
        path=path,
        tag="admin",
        summary=summary,
        serve=administered(serve),
        answer=answer,
        body=body,
        scope=Scope.ADMIN,
        errors=(400, 401, 403, *errors, 503),
        error=Problem,
    )


def administered(serve: Serve) -> Serve:
    """For pages of this site only, and with errors as problems."""

    async def endpoint(http: Request) -> Any:
        try:
            _same_site(http)
            _check_address(http)
            return await serve(http)
        except FairleadError as error:
            return Problems().response(error, {})
        except (HTTPException, ClientDisconnect):
            raise
        except Exception:
            log.exception("request_failed", method=http.method, path=http.url.path)
            return Problems().response(INTERNAL, {})

    return endpoint


def _same_site(http: Request) -> None:
    """Raises Forbidden for a page of another site that lets an administrator's browser ask: on a server that asks for no key it could."""
    origin, host = http.headers.get("origin"), http.headers.get("host", "")
    if not caller_of(http)[0].key and not is_local(host):
        # a page whose name was made to point here (DNS rebinding) is its own site
        raise Forbidden(f"{host} may not administer this server: ask it by its address, or as localhost")
    if origin is not None and not is_origin_of(origin, host):
        raise Forbidden(f"pages of {origin} may not administer this server")


def _check_address(http: Request) -> None:
    """Raises BadField."""
    for name, value in (*http.path_params.items(), *http.query_params.multi_items()):
        storable(name, value)
        if name == "key" and value.startswith(PREFIX):
            raise BadField("is a key itself, which must not get into addresses: give its id", "key")


def actor_of(http: Request) -> str:
    return caller_of(http)[0].key or ANONYMOUS


async def body_of(http: Request) -> bytes:
    return await read_body(http, MAX_BODY_BYTES)
