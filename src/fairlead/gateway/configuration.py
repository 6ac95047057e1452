"""The policies that the gateway runs with: read again, replaced and taken back without a restart."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog
from msgspec import Struct

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.policy import GatewaySettings
from fairlead.core.settings import Settings, parse_settings, read_text, variables
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

Replace = Callable[[], None]

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
        self,
        settings: Settings,
        path: Path | None,
        text: str,
        store: Store | None,
        prepare: Callable[[GatewaySettings], Awaitable[Replace]],
    ) -> None:
        """`settings` are in force, and were read from `text`. `prepare` makes everything ready for other policies, or raises
        ConfigError; what it returns replaces them, all at once."""
        self._path = path
        self._store = store
        self._prepare = prepare
        self._names = frozenset(variables(text))
        """Environment variables that were meant for the server: a text that comes later may name no others."""
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
        unknown = sorted(set(variables(text)) - self._names)
        if unknown:
            raise ConfigError(f"`${{{unknown[0]}}}` is not among the variables of the file that the server was started with")
        return await self._alone(self._change(text, "config.put", actor, "configuration"))

    async def reload(self, actor: str) -> int:
        """Read the file again. Raises ConfigError."""
        if self._path is None:
            raise InvalidRequest("the server was started without --config: there is no file to read again")
        text = await asyncio.to_thread(read_text, self._path)
        return await self._alone(self._change(text, "config.reload", actor, str(self._path)))

    async def rollback(self, actor: str) -> int:
        """Take back the last change. Raises InvalidRequest where there is none."""
        return await self._alone(self._take_back(actor))

    async def _alone(self, change: Coroutine[Any, Any, int]) -> int:
        """One after the other, each to its end: whoever asked for it may leave in the middle."""

        async def in_turn() -> int:
            async with self._changing:
                return await change

        return await asyncio.shield(asyncio.create_task(in_turn(), name="configure"))

    async def _change(self, text: str, action: str, actor: str, source: str) -> int:
        settings = await asyncio.to_thread(self._read, text, source)
        self._check(settings)
        replace = await self._prepare(settings.gateway)
        number = await self._keep(text, action, actor)
        replace()
        self._versions.append(_Version(number, text, settings, source))
        if len(self._versions) > MAX_VERSIONS:
            del self._versions[0]
        return self._told(actor)

    async def _take_back(self, actor: str) -> int:
        if len(self._versions) < 2:
            raise InvalidRequest("nothing was changed since the server started: there is nothing to take back")
        before = self._versions[-2]
        replace = await self._prepare(before.settings.gateway)
        number = await self._keep(before.text, "config.rollback", actor)
        replace()
        del self._versions[-2:]
        self._versions.append(_Version(number, before.text, before.settings, before.source))
        return self._told(actor)

    def _read(self, text: str, source: str) -> Settings:
        """Raises ConfigError, which shows no value of an environment variable."""
        try:
            return parse_settings(text, source)
        except ConfigError as error:
            message = error.message
            for name in variables(text):
                if value := os.environ.get(name, ""):
                    message = message.replace(value, f"${{{name}}}")
            raise ConfigError(message) from None

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
