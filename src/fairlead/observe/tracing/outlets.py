"""One export to a collector, by HTTP or gRPC: tried again for as long as it may take. Blocking, for a thread of its own."""

import gzip
import http.client
import random
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from threading import Event, Timer
from typing import Any, Protocol
from urllib.parse import urlsplit

from fairlead.core.errors import ConfigError
from fairlead.observe.tracing.target import Target

AGAIN = (429, 502, 503, 504)
GRPC_AGAIN = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
"""As https://opentelemetry.io/docs/specs/otlp/ has them."""
GRPC_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
PAUSE = 0.5
"""Seconds before the second try; doubled each time."""
MAX_ANSWER_BYTES = 64 << 10


class Outlet(Protocol):
    """Where exports go. Called from one thread, but for `close`."""

    def send(self, export: bytes) -> str:
        """What went wrong; "": nothing did."""

    def close(self) -> None:
        """Give up what is being tried."""


class Failed(Exception):
    """One try."""

    def __init__(self, why: str, *, again: bool, pause: float = 0.0) -> None:
        """`pause`: seconds that the collector asks for."""
        super().__init__(why)
        self.again = again
        self.pause = pause


class _Trying:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.name = f"the collector at {urlsplit(target.url).netloc}"
        self._closing = Event()

    def send(self, export: bytes) -> str:
        deadline, pause = time.monotonic() + self.target.timeout, PAUSE
        while True:
            try:
                self._try(export, max(deadline - time.monotonic(), 0.01))
                return ""
            except Failed as failure:
                wait = max(pause * random.uniform(0.5, 1.0), failure.pause)
                if not failure.again or time.monotonic() + wait >= deadline or self._closing.wait(wait):
                    return str(failure)
                pause *= 2

    def _try(self, export: bytes, seconds: float) -> None:
        """Raises Failed."""
        raise NotImplementedError

    def close(self) -> None:
        self._closing.set()


class HttpOutlet(_Trying):
    def __init__(self, target: Target) -> None:
        """Raises ConfigError."""
        super().__init__(target)
        parts = urlsplit(target.url)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._headers = {"content-type": "application/x-protobuf", **target.headers}
        if target.gzip:
            self._headers["content-encoding"] = "gzip"
        self._context: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=target.ca or None)
                if target.certificate:
                    self._context.load_cert_chain(target.certificate, target.private_key or None)
            except (OSError, ValueError) as error:
                raise ConfigError(f"`traces`: the certificates for {target.url} cannot be used: {error}") from None
        self._connection: http.client.HTTPConnection | None = None

    def _try(self, export: bytes, seconds: float) -> None:
        body = gzip.compress(export, 1) if self.target.gzip else export
        fresh = self._connection is None
        try:
            status, retry_after = self._post(body, seconds)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            if fresh or isinstance(error, TimeoutError):
                raise Failed(f"no answer from {self.name}: {error or type(error).__name__}", again=True) from None
            self._try(export, seconds)  # it had been closed since the last export
            return
        if status >= 300:
            raise Failed(f"{self.name} answers {status}", again=status in AGAIN, pause=retry_after)

    def _post(self, body: bytes, seconds: float) -> tuple[int, float]:
        connection = self._connection
        if connection is None:
            if self._context is not None:
                connection = http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=self._context)
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
            self._connection = connection
        elif connection.sock is not None:
            connection.sock.settimeout(seconds)
        with _within(seconds) as sockets:
            connection.request("POST", self._path, body, self._headers)
            sockets.append(connection.sock)
            answer = connection.getresponse()
            if len(answer.read(MAX_ANSWER_BYTES)) == MAX_ANSWER_BYTES:
                self._drop()
        asked = answer.getheader("retry-after", "")
        return answer.status, float(asked) if asked.isascii() and asked.isdecimal() else 0.0

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@contextmanager
def _within(seconds: float) -> Iterator[list[socket.socket]]:
    """Sockets that are cut off after so long: a socket's own timeout is for each piece of an answer: who sends a byte now and then would never be done. Raises TimeoutError."""
    late, sockets = Event(), list[socket.socket]()

    def cut() -> None:
        late.set()
        for each in sockets:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    timer = Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield sockets
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError("timed out")


class GrpcOutlet(_Trying):
    def __init__(self, target: Target) -> None:
        """Raises ConfigError."""
        super().__init__(target)
        try:
            self._grpc: Any = import_module("grpc")
        except ImportError:
            raise ConfigError("`traces.protocol: grpc` needs grpcio: pip install 'fairlead[traces-grpc]'") from None
        grpc, parts = self._grpc, urlsplit(target.url)
        if parts.scheme == "https":
            files = (target.ca, target.private_key, target.certificate)
            credentials = grpc.ssl_channel_credentials(*(_bytes(path) for path in files))
            self._channel = grpc.secure_channel(parts.netloc, credentials)
        else:
            self._channel = grpc.insecure_channel(parts.netloc)
        self._call = self._channel.unary_unary(GRPC_METHOD)
        self._metadata = [(name.lower(), value) for name, value in target.headers.items()]
        self._compression = grpc.Compression.Gzip if target.gzip else None

    def _try(self, export: bytes, seconds: float) -> None:
        try:
            self._call(export, timeout=seconds, metadata=self._metadata, compression=self._compression)
        except self._grpc.RpcError as error:
            code = error.code().name
            raise Failed(f"{self.name} answers {code}: {error.details()}", again=code in GRPC_AGAIN) from None
        except ValueError as error:  # the channel is closed
            raise Failed(str(error), again=False) from None

    def close(self) -> None:
        super().close()
        self._channel.close()


def outlet_of(target: Target) -> Outlet:
    """Raises ConfigError."""
    return GrpcOutlet(target) if target.grpc else HttpOutlet(target)


def _bytes(path: str) -> bytes | None:
    if not path:
        return None
    with open(path, "rb") as file:
        return file.read()
