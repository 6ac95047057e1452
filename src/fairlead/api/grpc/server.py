"""The gRPC port: listening, the connections, and their end."""

import asyncio
import socket
import ssl as tls

from fairlead.api.doorkeeper import Doorkeeper
from fairlead.api.grpc.calls import Call, Calls, Head, read_head
from fairlead.api.grpc.headers import Headers
from fairlead.api.grpc.http2 import Connection, Limits
from fairlead.api.grpc.service import methods_of
from fairlead.api.offload import Offload
from fairlead.core.request import Inference
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

BACKLOG = 1024
MAX_CONNECTIONS = 8192


class GrpcServer:
    """Serves a repository's models as `inference.GRPCInferenceService`, and `grpc.health.v1.Health`."""

    def __init__(
        self,
        repository: ModelRepository,
        finished: Finished,
        *,
        gateway: Inference | None = None,
        doorkeeper: Doorkeeper | None = None,
        max_message_bytes: int = 64 << 20,
        max_connections: int = MAX_CONNECTIONS,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits(max_buffered_bytes=max(256 << 20, 2 * max_message_bytes))
        self.max_connections = max_connections
        self.port = 0
        methods = methods_of(repository, gateway or repository, finished)
        self._offload = Offload()
        self._calls = Calls(
            methods=methods,
            finished=finished,
            offload=self._offload,
            max_message_bytes=max_message_bytes,
            limits=self.limits,
            doorkeeper=doorkeeper,
        )
        self._connections: set[Connection] = set()
        self._unwritten: list[Connection] = []
        self._gone = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._loop: asyncio.AbstractEventLoop

    async def listen(
        self, host: str = "127.0.0.1", port: int = 0, *, sock: socket.socket | None = None, ssl: tls.SSLContext | None = None
    ) -> None:
        """Accept on an address (`port` 0 takes a free one, see the attribute) or on a bound socket. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        if ssl is not None:
            ssl.set_alpn_protocols(["h2"])
        if sock is not None:
            server = await self._loop.create_server(lambda: Connection(self), sock=sock, ssl=ssl, backlog=BACKLOG)
        else:
            server = await self._loop.create_server(lambda: Connection(self), host, port, ssl=ssl, backlog=BACKLOG)
        self._servers.append(server)
        self.port = server.sockets[0].getsockname()[1]

    async def drain(self, timeout: float) -> None:
        """Take no new calls, let those under way finish for `timeout` seconds, then close what is left."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.leave()
        deadline = self._loop.time() + timeout
        while self._connections and (left := deadline - self._loop.time()) > 0:
            self._gone.clear()
            try:
                async with asyncio.timeout(left):
                    await self._gone.wait()
            except TimeoutError:
                break
        for connection in list(self._connections):
            connection.abort()
        self._offload.close()

    # For the connections

    def read_head(self, headers: Headers) -> Head:
        return read_head(self._calls.methods, headers)

    def open(self, connection: Connection, number: int, head: Head) -> Call:
        return Call(self._calls, connection, number, head, self._loop)

    def connected(self, connection: Connection) -> None:
        self._connections.add(connection)
        if len(self._connections) > self.max_connections:
            connection.abort()

    def disconnected(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._gone.set()

    def write_soon(self, connection: Connection) -> None:
        self._unwritten.append(connection)
        if len(self._unwritten) == 1:
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        for connection in unwritten:
            connection.flush()
