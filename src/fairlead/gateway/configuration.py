"""The policies that the gateway runs with: read again, replaced and taken back without a restart."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from msgspec import Struct

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.policy import GatewaySettings
from fairlead.core.settings import Settings, parse_settings, read_text
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

log = structlog.get_logger("fairlead.configuration")

FIXED = ("redis_url", "limits", "reuse")
"""Of the section `gateway`: what connections and stores of answers were made for."""
MAX_VERSIONS = 100
"""Kept in memory, where there is no store."""


class _Version(Struct, frozen=True):
    number: int
    text: str
    settings: Settings
    source: str


class Configuration:
    """`fairlead.yaml`, of which the section `gateway` may change while the server runs. Called from the event loop."""

    def __init__(
        self, settings: Settings, path: Path | None, text: str, store: Store | None, apply: Callable[[GatewaySettings], Awaitable[None]]
    ) -> None:
        """`settings` are in force, and were read from `text`. `apply` replaces the policies, all at once; it may raise ConfigError."""
        self._path = path
        self._store = store
        self._apply = apply
        self._changing = asyncio.Lock()
        self._versions = [_Version(0, text, settings, str(path or "flags"))]

    @property
    def version(self) -> int:
        """0 is what the server was started with."""
        return self._versions[-1].number

    @property
    def settings(self) -> Settings:
        return self._versions[-1].settings

    def text(self) -> str:
        """As it was written: `${NAME}` is not filled in."""
        return self._versions[-1].text

    async def put(self, text: str, actor: str) -> int:
        """Run with this. Raises ConfigError, which names the line, and changes nothing then."""
        async with self._changing:
            return await self._change(text, "config.put", actor, "configuration")

    async def reload(self, actor: str) -> int:
        """Read the file again. Raises ConfigError."""
        if self._path is None:
            raise InvalidRequest("the server was started without --config: there is no file to read again")
        async with self._changing:
            text = await asyncio.to_thread(read_text, self._path)
            return await self._change(text, "config.reload", actor, str(self._path))

    async def rollback(self, actor: str) -> int:
        """Take back the last change. Raises InvalidRequest where there is none."""
        async with self._changing:
            if len(self._versions) < 2:
                raise InvalidRequest("nothing was changed since the server started: there is nothing to take back")
            before = self._versions[-2]
            self._check(before.settings)
            await self._apply(before.settings.gateway)
            number = await self._keep(before.text, "config.rollback", actor)
            del self._versions[-2:]
            self._versions.append(_Version(number, before.text, before.settings, before.source))
            return self._told(actor)

    async def _change(self, text: str, action: str, actor: str, source: str) -> int:
        settings = parse_settings(text, source)
        self._check(settings)
        await self._apply(settings.gateway)
        number = await self._keep(text, action, actor)
        self._versions.append(_Version(number, text, settings, source))
        if len(self._versions) > MAX_VERSIONS:
            del self._versions[0]
        return self._told(actor)

    def _check(self, settings: Settings) -> None:
        """Raises ConfigError for what only a restart can change."""
        now = self.settings
        for name in Settings.__struct_fields__:
            if name != "gateway" and getattr(settings, name) != getattr(now, name):
                raise ConfigError(f"`{name}` can only change with a restart: nothing was changed")
        for name in FIXED:
            if getattr(settings.gateway, name) != getattr(now.gateway, name):
                raise ConfigError(f"`gateway.{name}` can only change with a restart: nothing was changed")

    async def _keep(self, text: str, action: str, actor: str) -> int:
        number = self.version + 1
        if self._store is not None:
            audit = AuditRow(time=time.time(), actor=actor, action=action, subject="gateway", details={})
            number = (await asyncio.to_thread(self._store.add_config, text, audit)).version
        return number

    def _told(self, actor: str) -> int:
        log.info("configured", version=self.version, source=self._versions[-1].source, actor=actor)
        return self.version
