"""Signed links to artifacts: good for one file of one tenant, until they expire. Whoever has one may read.

/v1/artifacts/<key>?tenant=...&expires=<seconds since 1970>&signature=<base64url of HMAC-SHA256(secret, key|expires|tenant)>
"""

import asyncio
import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlencode

import structlog

from fairlead.core.errors import Forbidden, Unavailable
from fairlead.core.jobs import Artifact
from fairlead.core.policy import ArtifactSettings
from fairlead.jobs.secrets import FRESH_SECONDS, Secrets, settled

PATH = "/v1/artifacts/"
SERVER = ""
"""Whose the secrets are: no tenant's."""

log = structlog.get_logger("fairlead.jobs")


class Links:
    """Made here, and good at any server of the same store. Lives in the event loop."""

    def __init__(self, secrets: Secrets, settings: ArtifactSettings, now: Callable[[], float] = time.time) -> None:
        self.secrets = secrets
        self.settings = settings
        self.now = now

    async def start(self) -> None:
        """Raises Unavailable."""
        await self.secrets.rows(SERVER)

    async def run(self) -> None:
        """For ever: learn what other servers made the secrets to be."""
        while True:
            await asyncio.sleep(FRESH_SECONDS / 2)
            try:
                await self.secrets.read(SERVER)
            except Unavailable as error:
                log.warning("secrets_not_read", error=error.message)

    def to(self, artifact: Artifact, tenant: str, now: float) -> tuple[str, float]:
        """Path and query, and until when they are good. Once started."""
        secret = settled(self.secrets.known(SERVER), now)
        expires = int(now + self.settings.link_seconds)
        return link(artifact.key, tenant=tenant, expires=expires, secret=secret), float(expires)

    async def check(self, key: str, *, tenant: str, expires: str, signed: str) -> float:
        """For how many seconds it is good. Raises Forbidden, Unavailable."""
        secrets = [row.value for row in await self.secrets.rows(SERVER)]
        now = self.now()
        return check(key, tenant=tenant, expires=expires, signed=signed, secrets=secrets, now=now) - now

    async def rotate(self) -> None:
        """Another secret; links made with those before stay good until they expire. Raises Unavailable."""
        await self.secrets.rotate(SERVER, self.settings.link_seconds)


def link(key: str, *, tenant: str, expires: int, secret: str) -> str:
    """Path and query."""
    query = urlencode({"tenant": tenant, "expires": expires, "signature": signature(key, tenant=tenant, expires=expires, secret=secret)})
    return f"{PATH}{key}?{query}"


def check(key: str, *, tenant: str, expires: str, signed: str, secrets: Sequence[str], now: float) -> float:
    """When it expires. Raises Forbidden for a link that was not made here, or is good no longer."""
    number = int(expires) if expires.isascii() and expires.isdigit() and len(expires) < 16 else -1
    # As bytes: as texts, only ASCII can be compared.
    right = [signature(key, tenant=tenant, expires=number, secret=secret).encode() for secret in secrets]
    if number < 0 or not any(hmac.compare_digest(each, signed.encode()) for each in right):
        raise Forbidden("this link is not signed by this server: take it whole, as the job gave it")
    if now >= number:
        raise Forbidden("this link has expired: ask the job for another one")
    return float(number)


def signature(key: str, *, tenant: str, expires: int, secret: str) -> str:
    """No key holds a `|`, and the tenant stands last: no two links sign the same text."""
    digest = hmac.digest(secret.encode(), f"{key}|{expires}|{tenant}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
