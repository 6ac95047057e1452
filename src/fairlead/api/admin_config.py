"""The part of the administration under `/admin/config`: the policies that a server runs with."""

import asyncio
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField, Config, NoQuery, Version, config_version, query_of
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.web import json_response
from fairlead.core.errors import Unsupported
from fairlead.store.store import Store

VERSIONS_SHOWN = 20


class Configured(Protocol):
    """The policies that the server runs with. Each change is checked first, and becomes a version of the store with its audit row."""

    @property
    def version(self) -> int: ...

    def text(self) -> str: ...

    async def put(self, text: str, actor: str) -> int: ...

    async def rollback(self, actor: str) -> int: ...

    async def reload(self, actor: str) -> int: ...


class AdminConfig:
    """The operations upon one server's configuration."""

    def __init__(self, store: Store, configured: Configured | None) -> None:
        """`configured`: None where no server runs."""
        self.store = store
        self.configured = configured
        self.operations = (
            operation("GET", "/admin/config", "adminConfig", "The policies, and their latest versions", self.config, Config, None, 501),
            operation("PUT", "/admin/config", "adminPutConfig", "Other policies: the body is YAML", self.put, Version, None, 501),
            operation("POST", "/admin/config/rollback", "adminRollbackConfig", "Back to the version before", self.rollback, Version, None, 409, 501),
            operation("POST", "/admin/config/reload", "adminReloadConfig", "Read fairlead.yaml again", self.reload, Version, None, 501),
        )  # fmt: skip

    async def config(self, http: Request) -> Response:
        query_of(http, NoQuery)
        configured = self._configured()
        versions = [config_version(row) for row in await asyncio.to_thread(self.store.configs, VERSIONS_SHOWN)]
        return json_response(Config(version=configured.version, text=configured.text(), versions=versions))

    async def put(self, http: Request) -> Response:
        body = await body_of(http)
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError:
            raise BadField("the body is not UTF-8", "") from None
        return json_response(Version(version=await self._configured().put(text, actor_of(http))))

    async def rollback(self, http: Request) -> Response:
        return json_response(Version(version=await self._configured().rollback(actor_of(http))))

    async def reload(self, http: Request) -> Response:
        return json_response(Version(version=await self._configured().reload(actor_of(http))))

    def _configured(self) -> Configured:
        """Raises Unsupported."""
        if self.configured is None:
            raise Unsupported("no server runs here: ask one with --url, or change fairlead.yaml")
        return self.configured
