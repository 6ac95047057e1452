"""Secrets that sign webhooks and links: made at first use, kept by the store for all servers, replaced with an overlap."""

import asyncio
import time
from collections.abc import Callable

from fairlead.store.job_rows import SecretRow
from fairlead.store.jobs import JobStore

FRESH_SECONDS = 10.0
"""How long a server may go on with what it knows."""
MAX_KNOWN = 10_000
"""Tenants whose secrets are remembered."""

Rows = tuple[SecretRow, ...]
"""The newest first."""


class Secrets:
    """Those of one purpose. Lives in the event loop; the store works in threads."""

    def __init__(self, store: JobStore, name: str, new: Callable[[], str], now: Callable[[], float] = time.time) -> None:
        """`name`: of the purpose, in the store. `new`: makes one up."""
        self.store = store
        self.name = name
        self.new = new
        self.now = now
        self._known: dict[str, tuple[float, Rows]] = {}

    async def rows(self, tenant: str) -> Rows:
        """Those that are good now, at least one. Raises Unavailable."""
        now = self.now()
        read, rows = self._known.get(tenant, (0.0, ()))
        rows = tuple(row for row in rows if row.expires is None or now < row.expires)
        return rows if rows and read <= now < read + FRESH_SECONDS else await self.read(tenant)

    async def read(self, tenant: str) -> Rows:
        """The same as the store has them. Raises Unavailable."""
        now = self.now()
        rows = await asyncio.to_thread(self.store.secrets, self.name, tenant, now)
        if not rows:
            rows = await asyncio.to_thread(self.store.put_secret, self.name, tenant, self.new(), now)
        return self._keep(tenant, now, rows)

    def known(self, tenant: str) -> Rows:
        """As last read."""
        return self._known[tenant][1]

    async def rotate(self, tenant: str, overlap: float) -> Rows:
        """A new one; those before stay good for `overlap` seconds, and as long as other servers may go on using them. Raises Unavailable."""
        now = self.now()
        until = now + overlap + FRESH_SECONDS
        rows = await asyncio.to_thread(self.store.rotate, self.name, tenant, self.new(), expires_old=until, now=now)
        return self._keep(tenant, now, rows)

    def _keep(self, tenant: str, now: float, rows: Rows) -> Rows:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[tenant] = (now, rows)
        return rows


def settled(rows: Rows, now: float) -> str:
    """The newest that every server knows by now, whichever made it."""
    return next((row.value for row in rows if row.created + FRESH_SECONDS <= now), rows[-1].value)
