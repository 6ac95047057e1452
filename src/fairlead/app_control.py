"""The part of the composition root that control is: registry, validation, rollouts, and what the gateway does for them."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from threading import Event
from typing import Any

import msgspec
import structlog
from msgspec import Struct, field

from fairlead.api.openapi import Operation
from fairlead.api.registry import RegistryRoutes
from fairlead.api.rollouts import Recording as WantedRecording
from fairlead.api.rollouts import RecordingState, RolloutOperations
from fairlead.control.checks import Checks, Question
from fairlead.control.deployments import Deployments, Follower, ServerState
from fairlead.control.gates.asking import request_of
from fairlead.control.leader import Leader, read_deployments
from fairlead.control.recording import Recording, RecordingRules
from fairlead.control.registry import Registry
from fairlead.control.rollouts import Rollouts
from fairlead.control.shadow import Comparer, ShadowReport
from fairlead.control.validations import Validations
from fairlead.core.errors import FairleadError, Unavailable, Unsupported
from fairlead.core.request import Response
from fairlead.core.rollout import ControlSettings, ShadowRules
from fairlead.core.routes import Routes
from fairlead.core.watch import ShadowRule, Watch
from fairlead.core.window import Window
from fairlead.gateway.filters.redaction import redaction
from fairlead.gateway.gateway import Gateway
from fairlead.gateway.shadow import Recording as Offered
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import Hosted, ModelRepository
from fairlead.store.registry_rows import ExposureRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict

log = structlog.get_logger("fairlead.control")

ANSWER_SECONDS = 60.0
"""For one answer to a recorded question that has none yet."""

Begin = Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
"""(name, work): something that goes on for ever, begun again where it fails."""


class ControlPlane:
    """All of it, of one server."""

    def __init__(self, settings: ControlSettings, *, store: Store, gateway: Gateway, repository: ModelRepository, counts: Counts) -> None:
        """Raises ConfigError."""
        self.settings = settings
        self.store = store
        self.gateway = gateway
        self.repository = repository
        self.counts = counts
        self.id = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.registry = Registry(store, settings.registry)
        self.redact = redaction()
        """None where the extra that finds personal data is missing."""
        self.comparer = Comparer(self._rules, self.redact)
        gateway.shadows.on_pair = self.comparer.add
        self.follower = Follower(
            read=lambda: read_deployments(store.control),
            hosted=self._hosted,
            repository=repository,
            publish=self._publish,
            poll_seconds=settings.tick_seconds,
        )
        self.validations = Validations(store, self.registry)
        self.leader = Leader(
            server=self.id,
            store=store.control,
            follower=self.follower,
            eyes=self,
            validate=self.validations.of_rollout,
            settings=settings,
            counts=counts,
        )
        self.rollouts = Rollouts(store, self.registry, settings, self.follower, counts=counts)
        self._recordings: dict[str, _Recording] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop_listening = Event()
        self.registry_routes = RegistryRoutes(self.registry, repository.index)
        self._operations = (
            *self.registry_routes.operations,
            *RolloutOperations(self.rollouts, self).operations,
        )

    @property
    def operations(self) -> Iterator[Operation]:
        yield from self._operations

    # Life

    async def load(self) -> None:
        """What is deployed, before the server is ready."""
        await self.follower.begin()

    def start(self, begin: Begin) -> None:
        begin("deployments", self.follower.run)
        begin("control", self.leader.run)
        if self.store.control.notifies:
            begin("control-news", self._listen)

    async def stop(self) -> None:
        """Before the models stop."""
        self._stop_listening.set()
        self.registry_routes.close()
        for recording in self._recordings.values():
            recording.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.validations.stop()
        await self.leader.stop()
        await self.follower.stop()
        await self.gateway.shadows.stop()
        try:
            await asyncio.to_thread(self.store.control.leave, self.id)
        except Unavailable:
            log.warning("server_not_left", note="others forget it when it has been silent for a while")

    async def _listen(self) -> None:
        """News of what other servers decide."""
        loop = asyncio.get_running_loop()

        def heard(_: str) -> None:
            loop.call_soon_threadsafe(self.follower.wake)

        try:
            await asyncio.to_thread(self.store.control.listen, heard, self._stop_listening)
        except Unavailable as error:
            log.warning("control_news_lost", error=error.message)

    # What the follower asks

    def _hosted(self, model: str, number: int) -> Hosted:
        return self.registry.hosted(self.store.registry.version(model, number))

    def _publish(self, routes: Routes, deployments: Deployments) -> None:
        gateway = self.gateway
        gateway.dispatch.routes = routes
        gateway.watches.set(
            {model: Watch(rollout=each.rollout, feedback=each.feedback) for model, each in deployments.items() if each.rollout}
        )
        gateway.shadows.set(
            {
                model: ShadowRule(
                    version=str(each.candidate),
                    share=each.shadow,
                    max_in_flight=each.rules.max_in_flight,
                    timeout=each.rules.timeout,
                    score=each.rules.score,
                )
                for model, each in deployments.items()
                if each.shadow and each.candidate
            }
        )

    def _champion(self, model: str) -> str:
        """The version; "" where the registry deploys none."""
        deployment = self.follower.wanted.get(model)
        return "" if deployment is None or not deployment.champion else str(deployment.champion)

    def _rules(self, model: str) -> ShadowRules:
        deployment = self.follower.wanted.get(model)
        return ShadowRules() if deployment is None else deployment.rules

    # What the leader asks: control.leader.Eyes

    def windows(self, now: float) -> Sequence[Window]:
        return self.gateway.watches.take(now)

    def exposures(self) -> Sequence[ExposureRow]:
        return self.gateway.watches.take_exposures()

    def shadows(self) -> Mapping[str, ShadowReport]:
        return self.comparer.take()

    # What the administration asks: api.rollouts.Acting

    @property
    def store_error(self) -> str:
        return self.follower.store_error

    def standing(self) -> tuple[Deployments, str, ServerState]:
        return self.follower.wanted, self.id, self.follower.state()

    def write_exposures(self) -> None:
        self.leader.write_exposures()

    def label(self, request_id: str, truth: float) -> bool:
        return self.comparer.label(request_id, truth)

    def validate(self, model: str, version: int, actor: str) -> str:
        return self.validations.begin(model, version, actor)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def record(self, model: str, wanted: WantedRecording, actor: str) -> RecordingState:
        await asyncio.to_thread(self.store.registry.model, model)
        known = self._recordings.get(model)
        if known is not None and known.running:
            raise Conflict(f"requests of `{model}` are being recorded already")
        redact = self.redact if wanted.redact else _as_it_is
        if redact is None:
            raise Unsupported(
                "personal data is found with pip install 'fairlead[filters]' only: install it, or record with `redact: false`"
            )
        recording = Recording(RecordingRules(every=wanted.every, max_examples=wanted.requests), redact)
        loop = asyncio.get_running_loop()

        def finish() -> None:
            self._begin(self._finish(model, actor), f"record-{model}")

        def offer(*asked: Any) -> None:
            recording.offer(*asked)
            if recording.full:
                loop.call_soon_threadsafe(finish)

        self._recordings[model] = _Recording(recording, wanted.requests, loop.call_later(wanted.seconds, finish))
        self.gateway.shadows.record(model, Offered(offer, champion=lambda: self._champion(model)))
        return self.recording(model)

    def recording(self, model: str) -> RecordingState:
        known = self._recordings.get(model)
        if known is None:
            return {"model": model, "running": False, "examples": 0, "wanted": 0}
        num = len(known.recording.examples) + len(known.recording.unanswered)
        return {"model": model, "running": known.running, "examples": num, "wanted": known.wanted}

    async def stop_recording(self, model: str, actor: str) -> RecordingState:
        await self._finish(model, actor)
        return self.recording(model)

    async def _finish(self, model: str, actor: str) -> None:
        """What was recorded becomes the model's golden requests. Questions whose answer is not known are asked of the champion."""
        known = self._recordings.get(model)
        if known is None:
            return
        async with known.ending:
            if not known.running:
                return
            known.timer.cancel()
            self.gateway.shadows.record(model, None)
            for question in list(known.recording.unanswered):
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        known.recording.answer(question, await self._ask(model, question))
                except (FairleadError, TimeoutError) as error:
                    log.warning("not_recorded", model=model, error=str(error))
            try:
                await asyncio.to_thread(self._keep, model, known.recording, actor)
            finally:
                known.running = False

    async def _ask(self, model: str, question: Question) -> list[Response]:
        request = request_of(question, model)
        request.version = self._champion(model)
        async with aclosing(self.gateway.dispatch.infer(request)) as responses:
            return [response async for response in responses]

    def _keep(self, model: str, recording: Recording, actor: str) -> None:
        num, skipped = len(recording.examples), msgspec.to_builtins(recording.skipped)
        audit = AuditRow(time=time.time(), actor=actor, action="model.record", subject=model, details={"examples": num, "skipped": skipped})
        checks = msgspec.convert(self.store.registry.model(model).checks, Checks)
        checks = msgspec.structs.replace(checks, golden=tuple(recording.examples))
        self.store.registry.change_model(model, audit, checks=msgspec.to_builtins(checks))
        log.info("recorded", model=model, examples=num, skipped=skipped)


def _as_it_is(text: str) -> str:
    return text


class _Recording(Struct):
    recording: Recording
    wanted: int
    timer: asyncio.TimerHandle
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)
    running: bool = True
