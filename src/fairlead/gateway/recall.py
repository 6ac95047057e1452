"""Answers that need no computing: stored ones, and those that are being computed for somebody else."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING

import numpy as np

from fairlead.core.errors import FairleadError
from fairlead.core.policy import CacheSettings, GatewaySettings
from fairlead.core.request import Request, Response
from fairlead.gateway.reuse.keys import Question, cache_control, question_of, request_key
from fairlead.gateway.reuse.response_cache import NotStored, Recorder, ResponseCache, Stored
from fairlead.gateway.reuse.semantic import Semantic, embedded
from fairlead.gateway.reuse.single_flight import Flights, Member
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import ModelRepository

if TYPE_CHECKING:
    from fairlead.gateway.reuse.redis import RedisResponses

Embedder = Callable[[str, str], Awaitable[np.ndarray]]
"""(model, text) → vector."""
InTask = Callable[[], Awaitable[None]]


class Recalled:
    """What one request found, and what is to be kept of its answer."""

    __slots__ = ("answer", "headers", "key", "member", "question", "recorder", "vector")

    def __init__(self) -> None:
        self.answer: AsyncGenerator[Response, None] | None = None
        self.headers: dict[str, str] = {}
        self.key = b""
        self.member: Member | None = None
        """It leads a flight."""
        self.recorder: Recorder | None = None
        self.question: Question | None = None
        self.vector: np.ndarray | None = None


class Recall:
    """The response cache, the flights and the semantic cache of one gateway."""

    def __init__(self, settings: GatewaySettings, repository: ModelRepository, embed: Embedder, counts: Counts) -> None:
        """Raises ConfigError."""
        self.cache = ResponseCache(settings.reuse)
        self.flights = Flights()
        self.semantic = Semantic()
        self.redis: RedisResponses | None = None
        if settings.reuse.redis:
            from fairlead.gateway.reuse import redis

            self.redis = redis.RedisResponses(settings.redis_url, counts)
        self._repository = repository
        self._embed = embed
        self._counts = counts
        self._computed_by: dict[str, object] = {}
        """Model → the version object whose answers are stored: another one with the same number is another artefact."""

    async def look(self, request: Request, policy: CacheSettings, max_wait: float, in_task: InTask) -> Recalled | None:
        """`in_task` is awaited before what needs a task around it. None: this request shares nothing. Raises NotStored, TimeoutExpired."""
        control = cache_control(request.envelope)
        version = self._version(request)
        key = request_key(request, version, policy, control)
        if key is None:
            if control.only_if_cached:
                raise NotStored("no stored answer may be given to this request (`Cache-Control: only-if-cached`)")
            return None
        found = Recalled()
        found.key = key
        now = time.time()
        if policy.mode != "off" and not control.no_cache:
            stored, outcome = await self._stored(request, version, policy, found, now, control.max_age, in_task)
            if stored is not None:
                self._counts.add("fairlead_gateway_reused_total", request.model, outcome)
                found.answer = replay(stored)
                found.headers = stored.headers(outcome, now)
                return found
        if control.only_if_cached:
            raise NotStored("no answer to this request is stored (`Cache-Control: only-if-cached`)")
        if policy.single_flight:
            member = self.flights.board(key)
            if not member.leads:
                await in_task()
                if await member.begun(max_wait):
                    self._counts.add("fairlead_gateway_reused_total", request.model, "joined")
                    found.answer = member.follow()
                    found.headers = {"x-fairlead-cache": "joined"}
                    return found
            found.member = member
        if policy.mode != "off":
            found.recorder = Recorder(request.model, version, policy.max_entry_bytes)
            found.headers = {"x-fairlead-cache": "miss"}
        return found

    def stale(self, found: Recalled | None) -> Stored | None:
        """A stored answer although it has expired."""
        return None if found is None else self.cache.get(found.key, time.time(), stale_ok=True)

    def keep(self, found: Recalled, policy: CacheSettings) -> None:
        """The whole answer went by."""
        now = time.time()
        stored = None if found.recorder is None else found.recorder.finish(now, policy)
        if stored is None:
            return
        self.cache.put(found.key, stored)
        if self.redis is not None:
            self.redis.put(found.key, stored, now)
        if found.question is not None and found.vector is not None:
            self.semantic.add(found.question, found.vector, found.key)

    async def close(self) -> None:
        if self.redis is not None:
            await self.redis.close()

    def _version(self, request: Request) -> str:
        """That which computes it; "" where another server does."""
        try:
            version = self._repository.find(request.model, request.version)
        except FairleadError:
            return request.version
        place = f"{request.model}@{version.version}"
        if self._computed_by.get(place) is not version:
            if place in self._computed_by:
                self.cache.drop(request.model)
            self._computed_by[place] = version
        return version.version

    async def _stored(
        self,
        request: Request,
        version: str,
        policy: CacheSettings,
        found: Recalled,
        now: float,
        max_age: float | None,
        in_task: InTask,
    ) -> tuple[Stored | None, str]:
        stored = self.cache.get(found.key, now, max_age=max_age)
        if stored is None and self.redis is not None:
            await in_task()
            stored = await self.redis.get(found.key)
            if stored is not None:
                self.cache.put(found.key, stored)
                stored = self.cache.get(found.key, now, max_age=max_age)
        if stored is not None or not policy.semantic_model:
            return stored, "hit"
        question = question_of(request, version)
        if question is None:
            return None, ""
        await in_task()
        vector = await embedded(lambda text: self._embed(policy.semantic_model, text), question.text)
        if vector is None:
            return None, ""
        found.question, found.vector = question, vector
        near = self.semantic.find(question, vector, policy.semantic_threshold)
        if near is None:
            return None, ""
        stored = self.cache.get(near, now, max_age=max_age)
        if stored is None:
            self.semantic.forget(question, near)
        return stored, "semantic"


async def replay(stored: Stored) -> AsyncGenerator[Response, None]:
    for response in stored.replay():
        yield response
