"""The composition root: the only place that knows every room."""

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from ssl import SSLContext
from typing import Any

import structlog

from fairlead.api.admin import Admin
from fairlead.api.data import DATA_SHAPES, data_app, data_operations
from fairlead.api.doorkeeper import Doorkeeper
from fairlead.api.grpc.server import GrpcServer
from fairlead.api.http_server import HttpServer
from fairlead.api.openai.responses import Responses
from fairlead.api.openai.responses_kept import Kept
from fairlead.api.openapi import Operation
from fairlead.api.ops import OPS_SHAPES, ops_app
from fairlead.api.sleep import SleepOperations
from fairlead.api.tls import server_context
from fairlead.api.ui.playground import Playground, data_url
from fairlead.api.ui.routes import DATA
from fairlead.app_batches import BatchWork
from fairlead.app_control import ControlPlane
from fairlead.app_jobs import Jobs
from fairlead.app_observe import Telemetry
from fairlead.app_ui import Dashboard
from fairlead.core.errors import ConfigError, FairleadError
from fairlead.core.policy import CALENDAR, GatewaySettings, Unit, rules_of
from fairlead.core.settings import LOOPBACK, Settings, asks_for_keys, parse_settings
from fairlead.gateway.abuse import Abuse
from fairlead.gateway.configuration import Configuration
from fairlead.gateway.course import Courses, compiled
from fairlead.gateway.gateway import Gateway
from fairlead.gateway.identity.identity import Identity, may_use
from fairlead.gateway.identity.keyring import Keyring
from fairlead.gateway.limits import limiter_of
from fairlead.gateway.limits.budgets import restore
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.fallbacks import check_fallbacks, unknown_fallbacks
from fairlead.gateway.signing import Nonces, SharedNonces
from fairlead.gateway.upstreams import Upstreams
from fairlead.gateway.usage import UsageLog
from fairlead.gateway.visit import come
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Line, Metrics
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings
from fairlead.store.database import default_url
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

log = structlog.get_logger("fairlead")

RESTART_SECONDS = 1.0
"""Before what should never end is begun again."""
YOUNG_OBJECTS = 20_000
"""Between two looks of the garbage collector: what requests leave is mostly freed without it, and each look costs some of them time."""

NUM_THREADS = 32
"""That call what blocks: stores, mostly, where those that wait together share a transaction. Python's own number goes by the cores."""


class Server:
    """One gateway process: the three ports, the gateway, and the models behind it."""

    def __init__(self, settings: Settings, path: Path | None = None, text: str = "") -> None:
        """`text`: that of the file at `path`, where settings came from one. Raises ConfigError."""
        self.settings = settings
        self.keys_required = asks_for_keys(settings)
        self.metrics = Metrics(triton_names=settings.metrics.triton_names, vllm_names=settings.metrics.vllm_names)
        self.telemetry = Telemetry(settings, self.metrics, sys.stderr)
        models = settings.models
        self.repository = ModelRepository(
            RepositorySettings(
                sources=models.repositories,
                control=Control(models.control),
                poll_seconds=models.poll_seconds,
                load=models.load,
                strict_readiness=models.strict_readiness,
                load_concurrency=models.load_concurrency,
                kv_cache_bytes=models.kv_cache_bytes,
                drain_timeout=settings.limits.drain_timeout,
            ),
            self.metrics,
            ForkServer(settings.logs.level, settings.logs.format, log_texts=settings.logs.texts, levels=settings.logs.levels),
        )
        self._build_gateway(settings.gateway, path)
        self.configuration = Configuration(parse_settings(text, str(path or "flags")), path, text, self.store, self._prepare)
        self._build_doors()
        self._open: list[HttpServer | GrpcServer] = []
        self._tasks: list[asyncio.Task[None]] = []

    def _build_gateway(self, policies: GatewaySettings, path: Path | None) -> None:
        """Raises ConfigError."""
        settings, counts, repository = self.settings, self.metrics.counts, self.repository
        check_fallbacks(policies)
        self.store = Store.open(settings.store.url or default_url()) if settings.store.url or self.keys_required else None
        self.keyring = Keyring(self.store, policies, counts)
        self.keyring.refresh()
        self.identity = Identity(settings.auth, policies, self.keyring, counts, required=self.keys_required)
        if settings.auth.mtls and not settings.tls.client_ca:
            raise ConfigError("`auth.mtls` needs `tls.client_ca`: the authority whose certificates say who calls")
        if self.keys_required and not (self.keyring.snapshot.by_id or settings.auth.oidc or settings.auth.mtls):
            where = f" --config {path}" if path else ""
            raise ConfigError(
                f"callers must show a key, and there is none: make one with `fairlead keys create{where} --scope infer --scope admin`"
                " (or, if anyone may use this server, pass --open)"
            )
        self.policies = policies
        self.upstreams = Upstreams(policies)
        self.dispatch = Dispatch(repository, lambda: self.policies, self.upstreams, counts, allowed=may_use)
        self.courses = Courses(policies, self._max_in_flight, lambda: repository.readiness_changed, come, self._known)
        self.courses.configure(policies, compiled(policies))
        self.limits = limiter_of(policies, counts)
        self.usage = None if self.store is None else UsageLog(self.store, settings.store.flush_seconds, counts)
        self.abuse = Abuse(policies.abuse, counts)
        self.gateway = Gateway(
            settings=policies,
            repository=repository,
            upstreams=self.upstreams,
            dispatch=self.dispatch,
            limits=self.limits,
            courses=self.courses,
            usage=self.usage if settings.store.usage else None,
            audit=self._audit,
            abuse=self.abuse,
            counts=counts,
        )
        if self.telemetry.tracing is not None:
            self.gateway.trace = self.telemetry.tracing.begin
        self.metrics.lines = self._lines

    def _shared_store(self) -> Store | None:
        """Of jobs, rollouts, responses and batches, which need one: a server that keeps nothing else uses the default one. None where that cannot be had."""
        settings = self.settings
        self.own_store: Store | None = None
        """Where there is no other."""
        wanted = settings.jobs.enabled or settings.control.enabled or settings.responses.store or settings.batches.enabled
        if self.store is not None or not wanted:
            return self.store
        try:
            self.own_store = Store.open(default_url())
        except ConfigError as error:
            log.warning(
                "no_store",
                error=error.message,
                note="this server takes no jobs and no batches, makes no pictures, keeps no responses and has no registry; `store.url` says where to keep them",
            )
        return self.own_store

    def _build_control(self, store: Store | None) -> ControlPlane | None:
        """Raises ConfigError."""
        settings = self.settings.control
        if store is None or not settings.enabled:
            return None
        return ControlPlane(settings, store=store, gateway=self.gateway, repository=self.repository, counts=self.metrics.counts)

    def _build_jobs(self, store: Store | None) -> Jobs | None:
        """None where they are turned off, or there is nowhere to keep them. Raises ConfigError."""
        settings = self.settings
        if store is None or not settings.jobs.enabled:
            return None
        return Jobs(
            settings,
            store=store,
            gateway=self.gateway,
            identity=self.identity,
            usage=self.usage if settings.store.usage else None,
            repository=self.repository,
            finished=self.telemetry.finished,
            tracing=self.telemetry.tracing,
            counts=self.metrics.counts,
        )

    def _build_batches(self, store: Store | None) -> BatchWork | None:
        """None where they are turned off, or there is nowhere to keep them."""
        settings, finished, repository, gateway = self.settings, self.telemetry.finished, self.repository, self.gateway
        if store is None or not settings.batches.enabled:
            return None
        limit = settings.limits.max_request_bytes
        responses = Responses(repository, gateway, finished, limit, gateway, self.kept, settings.responses)
        return BatchWork(
            settings.batches,
            store=store.batches,
            identity=self.identity,
            classes=lambda: self.policies.classes,
            signed_only=lambda model: gateway.courses[responses.named(model)[0]].policy.require_signature,
            count=gateway.counted,
            counts=self.metrics.counts,
            finished=finished,
            doors=(*data_operations(repository, gateway, finished, gateway, limit), *responses.operations),
            max_body_bytes=limit,
        )

    def _build_doors(self) -> None:
        settings, finished, repository, gateway = self.settings, self.telemetry.finished, self.repository, self.gateway
        limit = settings.limits.max_request_bytes
        self.nonces = self._nonces()
        recorded = self.store is not None and settings.store.usage
        self.doorkeeper = Doorkeeper(
            self.identity,
            settings.auth,
            self.nonces,
            self.metrics.counts,
            recorded=recorded,
            local_only=settings.auth.required is None and not settings.listen.open,
            max_body_bytes=limit,
        )
        store = self._shared_store()
        self.jobs = self._build_jobs(store)
        self.control = self._build_control(store)
        self.kept = Kept(store.responses, settings.responses) if store is not None and settings.responses.store else None
        self.batches = self._build_batches(store)
        stored = (*(() if self.batches is None else self.batches.operations), *(() if self.jobs is None else self.jobs.operations))
        self.telemetry.connect(repository, gateway, self.control, self.jobs, self._known)
        self.telemetry.promise(repository, store, self.configuration.text, self._audit)
        self.http = HttpServer(
            gateway,
            data_app(
                repository,
                gateway=gateway,
                doorkeeper=self.doorkeeper,
                elsewhere=gateway,
                more=stored,
                finished=finished,
                max_body_bytes=limit,
                kept=self.kept,
                responses=settings.responses,
            ),
            finished,
            doorkeeper=self.doorkeeper,
            elsewhere=gateway,
            shapes=DATA_SHAPES,
            max_body_bytes=limit,
        )
        self.grpc = GrpcServer(repository, finished, gateway=gateway, doorkeeper=self.doorkeeper, max_message_bytes=limit)
        admin = None if self.store is None else Admin(self.store, self.configuration, lambda: self.policies.classes, abuse=self.abuse)
        operations = (
            *(() if admin is None else admin.operations),
            *(() if self.control is None else self.control.operations),
            *(() if self.jobs is None else self.jobs.administration.operations),
            *SleepOperations(repository, self._audit).operations,
            *self.telemetry.operations,
        )
        larger = None if self.control is None else self.control.registry_routes.body_bound
        self.dashboard: Dashboard | None = None
        if not settings.ui.enabled:
            app = ops_app(repository, self.telemetry.scrape, operations, self.doorkeeper)
            self.ops = HttpServer(None, app, Finished(), shapes=OPS_SHAPES, max_body_bytes=1 << 20, larger=larger)
            return
        self.dashboard = self._build_dashboard(operations)
        sessions = self.dashboard.doorkeeper
        self.ops = HttpServer(
            gateway,
            self.dashboard.app(
                ops_app(repository, self.telemetry.scrape, (*operations, *self.playground().operations), sessions, self.dashboard.routes),
                data_app(
                    repository,
                    gateway=gateway,
                    doorkeeper=sessions,
                    elsewhere=gateway,
                    more=stored,
                    finished=finished,
                    max_body_bytes=limit,
                    kept=self.kept,
                    responses=settings.responses,
                ),
            ),
            finished,
            doorkeeper=sessions,
            shapes=OPS_SHAPES,
            prefix=DATA.encode(),
            max_body_bytes=limit,
            larger=larger,
        )

    def _build_dashboard(self, operations: Sequence[Operation]) -> Dashboard:
        assert self.telemetry.instruments is not None
        dashboard = Dashboard(
            self.settings.ui,
            doorkeeper=self.doorkeeper,
            metrics=self.metrics,
            processes=self.telemetry.instruments.processes,
            repository=self.repository,
            gateway=self.gateway,
            registry=None if self.control is None else self.control.store.registry,
            operations=operations,
            known=self._known,
            alerts=self.telemetry.alerts,
        )
        self.telemetry.finished.listeners.append(dashboard.history)
        return dashboard

    def playground(self) -> Playground:
        return Playground(
            self.repository,
            self.gateway,
            lambda http: data_url(self.settings, self.http.port, http.headers.get("host", "")),
            keys=self.keys_required,
        )

    def _nonces(self) -> Nonces | SharedNonces:
        return SharedNonces.at(self.policies.redis_url) if self.policies.limits.redis else Nonces()

    async def start(self) -> None:
        """Listen, then load: health answers from the first moment. Raises ConfigError for a port that is taken."""
        await self.limits.start()
        await self._restore_budgets()
        if self.jobs is not None:
            await self.jobs.start(self._begin)
        listen = self.settings.listen
        for door, flag, host, port in (
            (self.http, "--port", listen.host, listen.port),
            (self.grpc, "--grpc-port", listen.host, listen.grpc_port),
            (self.ops, "--ops-port", listen.ops_host, listen.ops_port),
        ):
            await self.open(door, flag, host, port, ssl=None if door is self.ops else server_context(self.settings.tls))
        if self.usage is not None:
            self.usage.start()
        self.telemetry.start(self._begin)
        if self.dashboard is not None:
            self.dashboard.start(self._begin)
        if self.kept is not None:
            self._begin("responses", self.kept.run)
        if self.batches is not None:
            self.batches.start(self._begin)
        self._begin("identity", self.identity.follow)
        self._begin("upstreams", self.upstreams.check)
        await self.repository.start(None if self.control is None else self.control.load)
        if self.control is not None:
            self.control.start(self._begin)
        self._warn_of_fallbacks()
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)
        log.info(
            "serving",
            http=f"{'https' if self.settings.tls.certificate else 'http'}://{listen.host}:{self.http.port}",
            grpc=f"{listen.host}:{self.grpc.port}",
            ops=f"http://{listen.ops_host}:{self.ops.port}",
            models=len(self.repository.index(ready=True)),
            failed=len(self.repository.failures()),
            callers=self._callers(),
        )

    async def open(self, door: HttpServer | GrpcServer, flag: str, host: str, port: int, *, ssl: SSLContext | None = None) -> None:
        """Until this server stops. `flag`: which option chooses the port. Raises ConfigError."""
        try:
            await door.listen(host, port, ssl=ssl)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(f"cannot listen on {host}:{port}: {why}. Choose another port with {flag}") from None
        self._open.append(door)

    def _callers(self) -> str:
        """Who may ask, for the log."""
        if self.keys_required:
            return "must show who they are"
        if self.settings.listen.host in LOOPBACK:
            return "loopback only, no keys asked"
        return "anyone who reaches these ports may use every model"

    def _begin(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Something that goes on for ever: it is begun again where it fails."""

        async def again_and_again() -> None:
            while not self.repository.stopping:  # even if `work` has forgotten that it was cancelled
                try:
                    await work()
                except Exception:
                    log.exception("task_failed", task=name)
                await asyncio.sleep(RESTART_SECONDS)

        self._tasks.append(asyncio.create_task(again_and_again(), name=name))

    async def stop(self) -> None:
        """Ready goes false at once; requests in flight finish within the drain timeout; then everything closes."""
        timeout = self.settings.limits.drain_timeout
        deadline = time.monotonic() + timeout
        log.info("draining", timeout=timeout)
        self.repository.stopping = self.gateway.stopping = True
        self.gateway.drop_waiting()
        later = (each for each in (self.jobs, self.kept, self.batches) if each is not None)
        await asyncio.gather(self._drain_doors(timeout), *(each.stop(timeout / 2) for each in later))
        if self.control is not None:
            await self.control.stop()
        await self.repository.stop(max(deadline - time.monotonic(), 0.0))
        if self.dashboard is not None:
            self.dashboard.stop()
        if self.ops in self._open:
            await self.ops.drain(1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.upstreams.close()
        await self.gateway.recalls.close()
        await self.limits.stop()
        await self.identity.close()
        await self.nonces.close()
        if self.usage is not None:
            await self.usage.stop()
        if self.jobs is not None:
            await self.jobs.close()
        await self.telemetry.stop()
        for store in (self.store, self.own_store):
            if store is not None:
                store.close()
        log.info("stopped")

    async def _drain_doors(self, timeout: float) -> None:
        await asyncio.gather(*(door.drain(timeout) for door in self._open if door is not self.ops))

    async def reload(self) -> None:
        """SIGHUP: read the file again; what is wrong with it changes nothing."""
        try:
            await self.configuration.reload("SIGHUP")
        except FairleadError as error:
            log.error("not_configured", error=error.message)

    # What the gateway asks of the server

    async def _prepare(self, policies: GatewaySettings) -> Callable[[], None]:
        """What replaces the policies, all at once. Raises ConfigError."""
        check_fallbacks(policies)
        filters = await asyncio.to_thread(compiled, policies)
        places = self.upstreams.prepare(policies)

        def replace() -> None:
            self.upstreams.configure(policies, places)
            self.policies = policies
            self.keyring.configure(policies)
            self.identity.configure(policies)
            self.gateway.configure(policies, filters)
            self.abuse.configure(policies.abuse)
            self._warn_of_fallbacks()

        return replace

    def _warn_of_fallbacks(self) -> None:
        for option, name in unknown_fallbacks(self.policies, self.repository.known):
            log.warning("unknown_fallback", option=option, model=name, note="no repository and no upstream has it: it is passed over")

    def _audit(self, row: AuditRow) -> None:
        """What the gateway did by itself."""
        if self.usage is not None:
            self.usage.audit(row)

    def _known(self, model: str) -> bool:
        """Served here or elsewhere, or named in the policies: then others may stand in for it."""
        return self.dispatch.knows(model) or model in self.policies.models

    def _max_in_flight(self, model: str) -> int:
        """What a model's engines compute at once; 0 for other models, which have a batcher's line of their own, or another server's."""
        info = self.repository.engine_info(model) if self.repository.versions(model) else None
        if info is None or self.repository.external(model):
            return 0
        spec = self.repository.find(model).spec
        return (spec.llm if info.image is None else spec.diffusion).max_num_seqs * spec.instances.count

    def _lines(self) -> Iterator[Line]:
        for model, queue in self.courses.queues.items():
            yield Line(model, queue.waiting_by_priority(), queue.num_in_flight)

    async def _restore_budgets(self) -> None:
        if self.store is not None:
            await restore(self.limits, self.store, self._budgets(), time.time())

    def _budgets(self) -> set[tuple[Unit, str]]:
        """(unit, window) of every budget that anybody has."""
        snapshot, settings = self.keyring.snapshot, self.policies
        limits = [policy.limits for policy in (*settings.tenants.values(), *snapshot.policies.values())]
        limits += [policy.limits for policy in settings.models.values()]
        limits += [*snapshot.project_limits.values(), *(key.limits for key in snapshot.by_id.values())]
        rules = (rule for each in limits for rule in rules_of(each))
        return {(rule.unit, rule.window) for rule in rules if rule.unit is not None and rule.window in CALENDAR}


async def serve(
    settings: Settings, path: Path | None = None, text: str = "", *, then: Callable[[Server], Awaitable[None]] | None = None
) -> None:
    """Run until SIGTERM or SIGINT, then drain; SIGHUP reads the policies again. A second signal ends at once. `then`: once it has started."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="fairlead"))
    asked = asyncio.Event()
    server = Server(settings, path, text)
    reloads: set[asyncio.Task[None]] = set()

    def ask() -> None:
        if asked.is_set():
            raise SystemExit(130)
        asked.set()

    def reload() -> None:
        task = loop.create_task(server.reload(), name="reload")
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    loop.add_signal_handler(signal.SIGHUP, reload)
    starting = asyncio.create_task(server.start(), name="start")
    waiting = asyncio.create_task(asked.wait(), name="signal")
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            if then is not None:
                await then(server)
            await waiting
        else:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
    finally:
        waiting.cancel()
        await server.stop()
