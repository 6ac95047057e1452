"""The composition root: the only place that knows every room."""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress

import structlog

from fairlead.api.data import data_app
from fairlead.api.grpc.server import GrpcServer
from fairlead.api.http_server import HttpServer
from fairlead.api.ops import ops_app
from fairlead.core.errors import ConfigError
from fairlead.core.settings import Settings, check_exposure
from fairlead.observe.access import FLUSH_SECONDS, AccessLog
from fairlead.observe.metrics import Metrics
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings

log = structlog.get_logger("fairlead")


class Server:
    """One gateway process: the three ports and the models behind them."""

    def __init__(self, settings: Settings) -> None:
        check_exposure(settings.listen)
        self.settings = settings
        self.metrics = Metrics(triton_names=settings.metrics.triton_names, vllm_names=settings.metrics.vllm_names)
        self.access_log = AccessLog(sys.stderr if settings.logs.requests else None, self.metrics.responses)
        models = settings.models
        self.repository = ModelRepository(
            RepositorySettings(
                sources=models.repositories,
                control=Control(models.control),
                poll_seconds=models.poll_seconds,
                load=models.load,
                strict_readiness=models.strict_readiness,
                load_concurrency=models.load_concurrency,
                drain_timeout=settings.limits.drain_timeout,
            ),
            self.metrics,
            ForkServer(settings.logs.level, settings.logs.format),
        )
        limit = settings.limits.max_request_bytes
        self.http = HttpServer(
            self.repository,
            data_app(self.repository, access_log=self.access_log, max_body_bytes=limit),
            self.access_log,
            max_body_bytes=limit,
        )
        self.grpc = GrpcServer(self.repository, self.access_log, max_message_bytes=limit)
        self.ops = HttpServer(None, ops_app(self.repository, self.metrics.text), AccessLog(None), max_body_bytes=1 << 20)
        self._open: list[HttpServer | GrpcServer] = []
        self._flusher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, then load: health answers from the first moment. Raises ConfigError for a port that is taken."""
        listen = self.settings.listen
        for door, flag, host, port in (
            (self.http, "--port", listen.host, listen.port),
            (self.grpc, "--grpc-port", listen.host, listen.grpc_port),
            (self.ops, "--ops-port", listen.ops_host, listen.ops_port),
        ):
            try:
                await door.listen(host, port)
            except OSError as error:
                why = os.strerror(error.errno) if error.errno else str(error)
                raise ConfigError(f"cannot listen on {host}:{port}: {why}. Choose another port with {flag}") from None
            self._open.append(door)
        self._flusher = asyncio.create_task(self._flush_access_log(), name="access-log")
        await self.repository.start()
        log.info(
            "serving",
            http=f"http://{listen.host}:{self.http.port}",
            grpc=f"{listen.host}:{self.grpc.port}",
            ops=f"http://{listen.ops_host}:{self.ops.port}",
            models=len(self.repository.index(ready=True)),
            failed=len(self.repository.failures()),
            open="anyone who reaches these ports may use every model" if listen.open else "loopback only, no keys asked",
        )

    async def stop(self) -> None:
        """Ready goes false at once; requests in flight finish within the drain timeout; then everything closes."""
        timeout = self.settings.limits.drain_timeout
        deadline = time.monotonic() + timeout
        log.info("draining", timeout=timeout)
        self.repository.stopping = True
        await asyncio.gather(*(door.drain(timeout) for door in self._open if door is not self.ops))
        await self.repository.stop(max(deadline - time.monotonic(), 0.0))
        if self.ops in self._open:
            await self.ops.drain(1.0)
        if self._flusher is not None:
            self._flusher.cancel()
            with suppress(asyncio.CancelledError):
                await self._flusher
        self.access_log.flush()
        log.info("stopped")

    async def _flush_access_log(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.access_log.flush()


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends at once."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    server = Server(settings)

    def ask() -> None:
        if asked.is_set():
            raise SystemExit(130)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    starting = asyncio.create_task(server.start(), name="start")
    waiting = asyncio.create_task(asked.wait(), name="signal")
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await waiting
        else:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
    finally:
        waiting.cancel()
        await server.stop()
