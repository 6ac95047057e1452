"""Answers that need no computing: stored ones, and those that are being computed for somebody else."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

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
from fairlead.runtime.version import Version

if TYPE_CHECKING:
    from fairlead.gateway.reuse.redis import RedisResponses

Embedder = Callable[[str, str], Awaitable[np.ndarray]]
"""(model, text) → vector."""
InTask = Callable[[], Awaitable[None]]
Answer = Stored | Member
"""What answers a request without computing: it is stored, or it is being computed for somebody else."""


class _Loaded(NamedTuple):
    version: "ref[Version]"
    edition: str
    times: int
    """That one of the same edition was there right before."""


class Recalled:
    """What one request found, and what is to be kept of its answer."""

    __slots__ = ("answer", "headers", "key", "member", "question", "recorder", "vector")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.headers: dict[str, str] = {}
        self.key = b""
        """b"" for a request that shares nothing."""
        self.member: Member | None = None
        """Of the flight that it leads or joined."""
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
        self._loaded: dict[str, _Loaded] = {}
        """model@number → the version whose answers are stored: another one with the same number is another artefact."""

    async def look(
        self, found: Recalled, request: Request, policy: CacheSettings, max_wait: float, in_task: InTask, *, fixed: bool
    ) -> None:
        """Fill `found`, which its request gives up with itself. `fixed`: it is known which version answers. `in_task` is awaited
        before what needs a task around it. Raises NotStored, TimeoutExpired."""
        control = cache_control(request.envelope)
        version, edition = self._version(request)
        key = request_key(request, edition, policy, control) if fixed else None
        if key is None:
            if control.only_if_cached:
                raise NotStored("no stored answer may be given to this request (`Cache-Control: only-if-cached`)")
            return
        found.key = key
        now = time.time()
        if policy.mode != "off" and not control.no_cache:
            stored, outcome = await self._stored(request, edition, policy, found, now, control.max_age, in_task)
            if stored is not None:
                self._counts.add("fairlead_gateway_reused_total", request.model, outcome)
                found.answer = stored
                found.headers = stored.headers(outcome, now)
                return
        if policy.mode != "off" and not control.no_cache:
            self._counts.add("fairlead_response_cache_misses_total", request.model)
        if control.only_if_cached:
            raise NotStored("no answer to this request is stored (`Cache-Control: only-if-cached`)")
        if policy.single_flight:
            member = found.member = self.flights.board(key)
            if not member.leads:
                await in_task()
                if await member.begun(max_wait):
                    self._counts.add("fairlead_gateway_reused_total", request.model, "joined")
                    found.answer = member
                    found.headers = {"x-fairlead-cache": "joined"}
                    return
        if policy.mode != "off":
            found.recorder = Recorder(request.model, version, policy.max_entry_bytes)
            found.headers = {"x-fairlead-cache": "miss"}

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

    def _version(self, request: Request) -> tuple[str, str]:
        """That which computes it, "" where another server does; and what keeps its answers apart from those of one of the same
        number that was there before, which may even be under way still."""
        try:
            version = self._repository.find(request.model, request.version)
        except FairleadError:
            return request.version, request.version
        number = version.version
        place = f"{request.model}@{number}"
        loaded = self._loaded.get(place)
        if loaded is None or loaded.version() is not version:
            if loaded is not None:
                self.cache.drop(request.model)
            edition = self._repository.edition(request.model, number)
            again = loaded is not None and loaded.edition == edition
            loaded = self._loaded[place] = _Loaded(ref(version), edition, loaded.times + 1 if loaded is not None and again else 0)
        return number, f"{number}#{loaded.edition}#{loaded.times}"

    async def _stored(
        self,
        request: Request,
        edition: str,
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
        question = question_of(request, edition)
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
