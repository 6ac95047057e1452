"""A small HTTP/1.1 client: requests as bytes, answers as calls from the event loop. No task and no coroutine once connected.

send → [connect] → write → answer's head and pieces → `received`, the last one with `complete`
                                                    → or `failed`, once
Not there, because nobody needs it: redirects, cookies, compression, proxies, pipelining, HEAD, trailers.
"""

import asyncio
import ssl
from urllib.parse import urlsplit

import httptools
import structlog

from fairlead import __version__
from fairlead.core.errors import ConfigError
from fairlead.runtime.upstream.errors import UpstreamCut, UpstreamGone

log = structlog.get_logger("fairlead.gateway")

MAX_HEAD_BYTES = 64 << 10
"""Of headers, and of whatever else comes without a byte of body: trailers, interim answers."""
JOIN_BYTES = 64 << 10
"""Smaller requests are written in one piece."""
IDLE_SECONDS = 60.0
"""How long an unused connection is kept."""
MAX_IDLE = 256
MAX_PROBE_BYTES = 4 << 20
"""Of what a probe is answered: a list of models, at most."""
SILENCE_CHECKS = 8
"""How many times in `timeout` silence is looked for, at least once a second."""


class Address:
    """Where an upstream is: its URL, taken apart."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"upstream `{url}`: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"upstream `{url}` must be a URL such as http://10.0.0.7:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(
                f"the URL of the upstream at {parts.hostname} must hold neither a password, a query nor a fragment; `key` is for its key"
            )
        prefix = parts.path.rstrip("/")
        if prefix.endswith(("/v1", "/v2")):
            raise ConfigError(f"upstream `{url}`: leave out {prefix[-3:]}, which is added to each request")
        if not all("!" <= char <= "~" for char in url):
            raise ConfigError(f"upstream `{url}` holds characters that a URL must escape")
        if any(not 0 < len(label) < 64 for label in parts.hostname.removesuffix(".").split(".")):
            raise ConfigError(f"upstream `{url}`: {parts.hostname} is no name of a host")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = port or (443 if self.tls else 80)
        self.authority = parts.netloc
        self.prefix = prefix
        self.url = f"{parts.scheme}://{parts.netloc}{prefix}"


class Exchange:
    """A request to an upstream and its answer. `received` and `failed` are for subclasses: they may not raise."""

    # Defaults stand on the class: most are never set.
    connection: "Connection | None" = None
    dial: "asyncio.Task[None] | None" = None
    retried = False
    passed_on = False
    """Something of the answer has left: from now on a failure is a cut."""
    status = 0
    """0 until the answer's head is here."""
    headers: dict[bytes, bytes]
    """Of the answer; names in lower case."""

    def __init__(self, head: bytes, body: bytes | memoryview) -> None:
        self.head = head
        self.body = body

    def received(self, data: bytes, complete: bool) -> None:
        """More of the answer's body, of which this may be all; `status` and `headers` are set."""
        raise NotImplementedError

    def failed(self, error: UpstreamGone | UpstreamCut) -> None:
        """No more will come."""
        raise NotImplementedError

    def drop(self) -> None:
        """The answer is not wanted any more. Closing the connection is what tells the upstream."""
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        connection = self.connection
        if connection is not None:
            self.connection = None
            connection.exchange = None
            connection.transport.abort()

    def pause(self) -> None:
        """Read no more of the answer for now."""
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time or none."""

    transport: asyncio.Transport

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.exchange: Exchange | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.num_answers = 0
        self.heard = False
        """A byte of this answer came."""
        self.num_silent = 0
        """Looks at it since a byte came last."""
        self.paused = False
        self.lost = False
        # of the answer that comes in
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self.complete = False
        self.keep_alive = False
        self.excess = False
        """More came than was asked for."""
        self.num_empty_bytes = 0

    def send(self, exchange: Exchange) -> None:
        self.exchange = exchange
        exchange.connection = self
        self.heard = False
        self.num_silent = 0
        body = exchange.body
        if len(body) < JOIN_BYTES:
            self.transport.write(exchange.head + body)
        else:
            self.transport.writelines((exchange.head, body))

    def pause(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.num_silent = 0
            if not self.transport.is_closing():
                self.transport.resume_reading()

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport  # event loops set TCP_NODELAY by themselves
        self.pool.opened(self)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # a late 408, say: nobody asked
            self.transport.abort()
            return
        self.heard = True
        self.num_silent = 0
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # what came before the nonsense in the same read goes with it
            self._fail(exchange, "answered with something that is not HTTP/1.1", repr(error))
            return
        if self.excess:
            self._fail(exchange, "answered more than it was asked", "a second answer to one request")
            return
        if self.complete:
            self._finish(exchange)
        elif self.parts:
            self.num_empty_bytes = 0
            exchange.status, exchange.headers = self.status, self.headers
            parts = self.parts
            part = parts[0] if len(parts) == 1 else b"".join(parts)
            self.parts = []
            exchange.received(part, False)
        else:
            self.num_empty_bytes += len(data)
            if self.num_empty_bytes > MAX_HEAD_BYTES:
                self._fail(exchange, "answered with too long headers", f"more than {MAX_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.pool.closed(self)
        exchange = self.exchange
        if exchange is None:
            return
        self.exchange = exchange.connection = None
        if not self.heard and self.num_answers and not exchange.retried:
            # Kept alive by us, closed by the upstream just then: it has not read the request.
            exchange.retried = True
            self.pool.connect(exchange)
        elif exc is None and self.status and not self.headers.keys() & {b"content-length", b"transfer-encoding"}:
            exchange.status, exchange.headers = self.status, self.headers
            exchange.received(b"", True)
        else:
            exchange.failed(self.pool.failure(exchange, "closed the connection", str(exc or "end of file")))

    # From the parser

    def on_message_begin(self) -> None:
        if self.complete:
            self.excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if not self.complete:
            self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:  # Continue, Early Hints: the answer is still to come
            self.status = 0
            self.headers = {}
        else:
            self.complete = True
            self.keep_alive = self.parser.should_keep_alive()

    # Ends

    def _finish(self, exchange: Exchange) -> None:
        """The connection is free before the answer is told, so that what follows from it may use it."""
        exchange.status, exchange.headers = self.status, self.headers
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.exchange = exchange.connection = None
        if self.keep_alive:
            self.status = self.num_empty_bytes = 0
            self.headers = {}
            self.parts = []
            self.complete = False
            self.num_answers += 1
            self.num_silent = 0
            if self.paused:
                self.resume()
            self.pool.release(self)
        else:
            self.transport.abort()
        exchange.received(data, True)

    def _fail(self, exchange: Exchange, what: str, detail: str) -> None:
        self.exchange = exchange.connection = None
        self.transport.abort()
        exchange.failed(self.pool.failure(exchange, what, detail))

    def look(self) -> None:
        """Now and then: has it been silent, or unused, for too long?"""
        if self.paused:
            return
        self.num_silent += 1
        exchange = self.exchange
        if exchange is None:
            if self.num_silent * self.pool.check_seconds > IDLE_SECONDS:
                self.transport.abort()
        elif self.num_silent > self.pool.timeout / self.pool.check_seconds:
            self._fail(exchange, "did not answer in time", f"silent for {self.pool.timeout:g} s")


class Pool:
    """The connections to one upstream. Whoever sends bounds how many exchanges there are at once."""

    def __init__(self, address: Address, model: str, *, connect_timeout: float, timeout: float) -> None:
        self.address = address
        self.model = model
        """For messages."""
        self.connect_timeout = connect_timeout
        self.timeout = timeout
        self.check_seconds = min(1.0, timeout / SILENCE_CHECKS)
        self.connections: set[Connection] = set()
        self.idle: list[Connection] = []
        """The one that was used last is used next, so that superfluous ones grow old."""
        self._dials: dict[asyncio.Task[None], Exchange] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None

    def send(self, exchange: Exchange) -> None:
        """Errors go to the exchange, never before this returns."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.send(exchange)
                return
        self.connect(exchange)

    def connect(self, exchange: Exchange) -> None:
        """Send over a new connection."""
        if self._closed:
            self._loop.call_soon(exchange.failed, self.failure(exchange, "was taken out of service", "closed"))
            return
        exchange.dial = task = self._loop.create_task(self._dial(exchange), name=f"connect {self.address.url}")
        self._dials[task] = exchange
        task.add_done_callback(self._dials.pop)

    async def _dial(self, exchange: Exchange) -> None:
        connection = Connection(self)
        address = self.address
        error: UpstreamGone | UpstreamCut | None = None
        try:
            if address.tls and self._tls is None:
                self._tls = await asyncio.to_thread(_verifying_context)  # reads a few hundred certificates
            async with asyncio.timeout(self.connect_timeout):
                await self._loop.create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=self._tls,
                    server_hostname=address.host if address.tls else None,
                )
        except TimeoutError:
            error = self.failure(exchange, "cannot be reached", f"no connection within {self.connect_timeout:g} s")
        except OSError as failure:  # refused, no such host, a certificate that does not verify
            error = self.failure(exchange, "cannot be reached", str(failure))
        except Exception as failure:
            log.exception("upstream_connect_failed", upstream=address.url)
            error = self.failure(exchange, "cannot be reached", repr(failure))
        except asyncio.CancelledError:
            if connection in self.connections:
                connection.transport.abort()
            raise
        exchange.dial = None
        if error is not None:
            exchange.failed(error)
        elif connection.lost:
            exchange.failed(self.failure(exchange, "closed the connection", "end of file"))
        else:
            connection.send(exchange)

    def failure(self, exchange: Exchange, what: str, detail: str) -> UpstreamGone | UpstreamCut:
        message = f"the server that computes model '{self.model}' {what}"
        if exchange.passed_on:
            return UpstreamCut(f"{message}: its answer ends here")
        return UpstreamGone(message, f"{self.address.url} {what}: {detail}")

    async def get(self, head: bytes) -> tuple[int, bytes]:
        """(status, body) of a request without a body, for probes. Raises UpstreamGone."""
        probe = _Probe(self, head, self._loop.create_future())
        self.send(probe)
        try:
            async with asyncio.timeout(self.connect_timeout + min(self.timeout, self.connect_timeout)):
                return await probe.answer
        except TimeoutError:
            raise UpstreamGone(f"the server that computes model '{self.model}' did not answer in time") from None
        finally:
            probe.drop()

    async def close(self) -> None:
        """What is under way fails."""
        self._closed = True
        under_way = [connection.exchange for connection in self.connections] + list(self._dials.values())
        for connection in self.connections:
            connection.transport.abort()
        for exchange in under_way:
            if exchange is not None:
                exchange.drop()
                exchange.failed(self.failure(exchange, "was taken out of service", "closed"))
        if self._dials:
            await asyncio.wait(list(self._dials))
        if self.connections:
            self._emptied = self._loop.create_future()
            await self._emptied

    # From the connections

    def opened(self, connection: Connection) -> None:
        self.connections.add(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(self.check_seconds, self._look)

    def release(self, connection: Connection) -> None:
        if len(self.idle) < MAX_IDLE:
            self.idle.append(connection)
        else:
            connection.transport.abort()

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        if self.connections:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def _look(self) -> None:
        self._timer = self._loop.call_later(self.check_seconds, self._look)
        for connection in list(self.connections):
            connection.look()


class _Probe(Exchange):
    def __init__(self, pool: Pool, head: bytes, answer: "asyncio.Future[tuple[int, bytes]]") -> None:
        super().__init__(head, b"")
        self.pool = pool
        self.answer = answer
        self.data = bytearray()

    def received(self, data: bytes, complete: bool) -> None:
        self.data += data
        if len(self.data) > MAX_PROBE_BYTES:
            self.drop()
            self.failed(self.pool.failure(self, f"answers a probe with more than {MAX_PROBE_BYTES} bytes", "too long"))
        elif complete and not self.answer.done():
            self.answer.set_result((self.status, bytes(self.data)))

    def failed(self, error: UpstreamGone | UpstreamCut) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def _verifying_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def fixed_headers(address: Address, key: str) -> str:
    """Those that every request to an upstream carries."""
    if key and not all("!" <= char <= "~" for char in key):
        raise ConfigError(f"the key of the upstream {address.url} holds characters that no header can")
    authorization = f"authorization: Bearer {key}\r\n" if key else ""
    return f"host: {address.authority}\r\nuser-agent: fairlead/{__version__}\r\naccept-encoding: identity\r\n{authorization}"
