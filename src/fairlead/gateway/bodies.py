"""Texts of a sample of requests and of their answers, in the log: where the operator wants that. Never tensors, pictures or files."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from msgspec import Struct

from fairlead.core.errors import FairleadError
from fairlead.core.logs import Bodies as BodySettings
from fairlead.core.request import Request, Response
from fairlead.gateway.filters.redaction import redaction
from fairlead.gateway.filters.texts import Texts
from fairlead.observe.redaction import without_secrets

log = structlog.get_logger("fairlead.gateway.bodies")

FLUSH_SECONDS = 0.2
MAX_WAITING = 256
"""Finished requests whose texts still have to be looked through; more are not written."""
MARGIN = 512
"""Bytes beyond `max_bytes` that are looked through, too: cut in two, a secret would not be known as one."""


class Seen(Protocol):
    """A visit."""

    request: Request
    model: str
    version: str
    error: FairleadError | None


class Sample(Struct, eq=False):
    """Of one request."""

    max_bytes: int
    texts: list[str]
    num_bytes: int = 0
    """Of its answer so far: beyond `max_bytes` nothing more is kept."""

    def add(self, responses: Sequence[Response]) -> None:
        """What goes out to its caller."""
        if self.num_bytes >= self.max_bytes:
            return
        for response in responses:
            text = ""
            if response.delta is not None:
                delta = response.delta
                text = "".join((delta.reasoning, delta.text, *(call.name + call.arguments for call in delta.tool_calls)))
            elif response.raw is not None:
                text = bytes(response.raw[: self.max_bytes]).decode("utf-8", "replace")
            if text:
                self.texts.append(text)
                self.num_bytes += len(text.encode("utf-8", "replace"))


class Finished(Struct, eq=False):
    request: Request
    model: str
    version: str
    error: str
    sample: Sample


class Bodies:
    """Costs a request that is not sampled a comparison. Called from the event loop only."""

    def __init__(self, settings: BodySettings, chance: Callable[[], float] = random.random) -> None:
        """`settings`: with a share above 0."""
        self.settings = settings
        self.chance = chance
        self.dropped = 0
        self._models = frozenset(settings.models)
        self._waiting: deque[Finished] = deque()
        self._redact = redaction()

    def begin(self, model: str) -> Sample | None:
        if self._models and model not in self._models:
            return None
        return Sample(self.settings.max_bytes + MARGIN, []) if self.chance() < self.settings.share else None

    def finished(self, visit: Seen, sample: Sample) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        error = "" if visit.error is None else visit.error.message
        self._waiting.append(Finished(visit.request, visit.model, visit.version, error, sample))

    async def follow(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            if self._waiting:
                await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """In a thread: to look through texts takes its time."""
        for _ in range(len(self._waiting)):
            self._write(self._waiting.popleft())
        if self.dropped:
            dropped, self.dropped = self.dropped, 0
            log.warning("bodies_dropped", num=dropped, note="more were sampled than can be looked through: lower `logs.bodies.share`")

    def _write(self, each: Finished) -> None:
        texts = texts_of(each.request)
        if not texts and not each.sample.texts:  # tensors
            return
        log.info(
            "body",
            request_id=each.request.log_id,
            model=each.model,
            version=each.version,
            tenant=each.request.caller.tenant,
            asked=[self._plain(text) for text in texts],
            answered=self._plain("".join(each.sample.texts)),
            **({"error": each.error} if each.error else {}),
        )

    def _plain(self, text: str) -> str:
        most = self.settings.max_bytes
        data = text.encode("utf-8", "replace")
        if len(data) < most + MARGIN:
            return cut(self._without_private(text), most)
        shown = self._without_private(data[: most + MARGIN].decode("utf-8", "ignore")).encode("utf-8", "replace")
        return shown[: max(min(most, len(shown) - MARGIN), 0)].decode("utf-8", "ignore") + " ..."

    def _without_private(self, text: str) -> str:
        return without_secrets(text if self._redact is None else self._redact(text))


def texts_of(request: Request) -> list[str]:
    """In the order in which they stand in it."""
    texts: list[str] = []

    def note(text: str, _: str) -> str:
        if text:
            texts.append(text)
        return text

    try:
        Texts(change=note, all=False).of(request if request.prompt is not None or request.raw is not None else Request(model=request.model))
    except FairleadError:  # a body that is no JSON
        return []
    return texts


def cut(text: str, max_bytes: int) -> str:
    """At most so many bytes of UTF-8."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= max_bytes else data[:max_bytes].decode("utf-8", "ignore") + " ..."
