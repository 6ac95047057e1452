"""One call of a webhook: to an address that may be called, within a deadline, and what came of it."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp
from msgspec import Struct
from yarl import URL

from fairlead.core.errors import InvalidRequest
from fairlead.core.policy import WebhookSettings
from fairlead.jobs.addresses import Guard, Lookup, RefusedAddress, check_url

MAX_ANSWER_BYTES = 64 << 10
"""Read of an answer, and thrown away."""


class Answer(Struct, frozen=True):
    """What came of one call."""

    status: int = 0
    """0: there was no answer."""
    error: str = ""
    """Why not, or what is wrong with it. The tenant reads it."""
    retry_after: float = 0.0
    """Seconds that the receiver asks for."""

    @property
    def taken(self) -> bool:
        return 200 <= self.status < 300


class Calls:
    """Lives in the event loop."""

    def __init__(self, settings: WebhookSettings, now: Callable[[], float]) -> None:
        """Raises ConfigError for an `allow` that is no network."""
        self.settings = settings
        self.now = now
        self.guard = Guard(settings.allow)
        self.lookup = Lookup(self.guard)
        self._session: aiohttp.ClientSession | None = None

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            check_url(url, self.settings)
        except InvalidRequest as error:
            return Answer(error=error.message)
        answer = Answer()
        try:
            async with (
                asyncio.timeout(self.settings.timeout),
                self._client().post(URL(url, encoded=True), data=body, headers=headers, allow_redirects=False) as response,
            ):
                answer = _answer(response, self.now())
                await _skim(response)
        except TimeoutError:
            # What was said before its body hung counts.
            return answer if answer.status else Answer(error=f"no answer within {self.settings.timeout:g} seconds")
        except aiohttp.ClientConnectorError as error:
            return Answer(error=_why(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return answer if answer.status else Answer(error=f"no answer: {type(error).__name__}")
        return answer

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self.lookup.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,  # of calls there are no more than their owner begins
                force_close=True,  # each call's address is looked at
                use_dns_cache=False,
                resolver=self.lookup,
                socket_factory=self.guard.socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def retry_after(header: str, now: float) -> float:
    """Seconds; 0 for what says nothing, or nothing that can be read."""
    if header.isascii() and header.isdigit():
        return float(header[:12])
    try:
        when = parsedate_to_datetime(header)
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


def _answer(response: aiohttp.ClientResponse, now: float) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status)
    error = f"answered {status}" + (", and redirects are not followed" if 300 <= status < 400 else "")
    return Answer(status, error, retry_after(response.headers.get("retry-after", ""), now))


async def _skim(response: aiohttp.ClientResponse) -> None:
    """Let the receiver say what it says, within reason."""
    num_bytes = 0
    while num_bytes < MAX_ANSWER_BYTES and (chunk := await response.content.readany()):
        num_bytes += len(chunk)


def _why(error: aiohttp.ClientConnectorError) -> str:
    """Why no connection came about."""
    if isinstance(error, aiohttp.ClientConnectorDNSError) and not isinstance(error.os_error, RefusedAddress):
        return "its name has no address"
    if isinstance(error.os_error, RefusedAddress):
        return str(error.os_error)
    if isinstance(error, aiohttp.ClientConnectorSSLError | aiohttp.ClientConnectorCertificateError):
        return "its certificate is not good, or it speaks no TLS"
    return "no connection"
