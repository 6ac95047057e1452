"""One engine of somebody else's, as a slot of a version: started or attached to, looked after, asked.

| state | means | becomes |
|---|---|---|
| starting | its process runs and does not answer yet | ready, or failed after `start_timeout` |
| ready | it takes requests | starting again where its process ends, or where it tells nothing of its health for a while |
| failed | it could not be started; it is tried again, ever more rarely | starting; left down for good after `restarts` failures in a row |

Of a server that is attached to, nothing is started: it is ready or not, as its health says.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from fairlead.backends.external import ExternalEngine
from fairlead.core.errors import ConfigError, FairleadError, LoadError, ShuttingDown, Unavailable
from fairlead.core.generation import EngineInfo, EngineStats, Prompt, Usage
from fairlead.core.policy import Upstream
from fairlead.core.request import Raw, Request, Response, Sink
from fairlead.core.settings import filled_in
from fairlead.core.specs import EngineSpec, ModelSpec
from fairlead.observe.metrics import Histogram
from fairlead.observe.table import SECONDS
from fairlead.runtime.external.child import HOST, Child, free_port, inherited, resolved
from fairlead.runtime.external.listener import Owner
from fairlead.runtime.external.translation import Consumer, Reader, asked
from fairlead.runtime.lives import HEALTHY_SECONDS, describe_exit, restart_delay
from fairlead.runtime.upstream.errors import UpstreamGone
from fairlead.runtime.upstream.place import UpstreamPlace, UpstreamTicket

log = structlog.get_logger("fairlead.runtime")

LOOK_SECONDS = 0.2
"""Between two looks at one that starts."""
CHECK_SECONDS = 5.0
"""Between two looks at one that serves."""
TELL_SECONDS = 15.0
"""How often it is told what a start waits for."""
MAX_UNHEALTHY = 6
"""Looks in a row that find a started one unwell before it is started again."""
CONNECT_SECONDS = 5.0
ATTACH_SECONDS = 10.0
"""How long loading waits for a server that should be there; it is loaded all the same."""
LONGEST_RETRY = 60.0
PORTS = 5
"""Tried in a row, where others take them first."""


class _Listed(Struct):
    id: str
    max_model_len: int | None = None


class _Listing(Struct):
    data: list[_Listed] = []


_listing = msgspec.json.Decoder(_Listing)


class PortTaken(LoadError):
    """Somebody else listens at the port that the engine was given."""


class ExternalInstance:
    """Called from the event loop only. Stands where an EngineInstance stands."""

    recovering = False

    def __init__(
        self,
        spec: ModelSpec,
        row: ExternalEngine,
        artefact: Path,
        on_change: Callable[[], None],
        *,
        version: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_change`: called when `ready` or `down` changes after `start`. Raises LoadError."""
        self.model = spec.name
        self.spec: EngineSpec = spec.engine
        self.row = row
        self.ready = False
        self.restarts = 0
        """Attempts to start it again: after a death, or on another port where a stranger had taken its own."""
        self.down = ""
        """Why it does not serve; "" while nothing failed."""
        self._unwell = ""
        """What it said when it was last asked."""
        self.info: EngineInfo | None = None
        self.place: UpstreamPlace | None = None
        """Of its present life."""
        self.max_in_flight = spec.engine.max_in_flight
        self._embeds = spec.llm.task == "embed"
        self._artefact = artefact
        self._version = version
        self._on_change = on_change
        self._clock = clock
        self._child: Child | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._started_in = 1.0
        """Seconds that its last start took."""
        self._died_at = 0.0
        self._work = 0
        self._running: dict[int, tuple[UpstreamTicket, Reader]] = {}
        self._stats = EngineStats()
        self._first = Histogram(SECONDS)

    @property
    def pid(self) -> int | None:
        """None while no process runs, and of a server that is attached to."""
        return None if self._child is None else self._child.pid

    @property
    def num_in_flight(self) -> int:
        return 0 if self.place is None else self.place.in_flight

    @property
    def stats(self) -> EngineStats:
        stats = self._stats
        stats.num_running = self.num_in_flight
        stats.time_to_first_token = (list(self._first.counts), self._first.sum)
        return stats

    def used(self, usage: Usage) -> None:
        """A request's, once it is over."""
        self._stats.num_prompt_tokens += usage.prompt_tokens
        self._stats.num_generated_tokens += usage.completion_tokens

    def began(self, seconds: float) -> None:
        """An answer's first piece came so long after its request."""
        self._first.observe(seconds)

    # Requests

    def submit(self, prompt: Prompt, consumer: Consumer, *, priority: int, age: float, timeout: float) -> int:
        """As EngineInstance's: the prompt is told in OpenAI's words. Raises FairleadError."""
        place = self.there()
        row = self.row
        path, body = asked(prompt, model=self.model, name=place.name, backend=row.name, extended=row.extended)
        self._work += 1
        work = self._work
        reader = Reader(self.model, prompt, consumer, self._clock, age)
        request = Request(model=self.model, raw=Raw(path=path, body=body, stream=path != "/v1/embeddings"))
        ticket = place.submit(request, _Running(self, work, reader))
        if not reader.done:
            self._running[work] = ticket, reader
        return work

    def cancel(self, work: int) -> None:
        """Its consumer hears nothing more."""
        running = self._running.pop(work, None)
        if running is not None:
            ticket, reader = running
            reader.done = True
            ticket.cancel()

    def give_up(self, work: int) -> None:
        """Its answer is none: the engine need not compute the rest, which may have no end."""
        running = self._running.get(work)
        if running is not None:
            running[0].cancel()

    def softened(self, error: FairleadError | None) -> None:
        """An engine that was started and is gone will be started again: that says when to come back."""
        if isinstance(error, UpstreamGone) and not self.spec.url:
            error.retry_after = min(max(self._started_in, 1.0), LONGEST_RETRY)

    def pass_on(self, request: Request, sink: Sink) -> UpstreamTicket:
        """Send a body as it came. Raises Unavailable."""
        return self.there().submit(request, sink)

    def there(self) -> UpstreamPlace:
        """Raises Unavailable."""
        if not self.ready or self.place is None:
            raise self._not_ready()
        return self.place

    def _not_ready(self) -> Unavailable:
        if self._closing:
            return ShuttingDown(f"model '{self.model}' is unloading")
        if self.spec.url:
            return Unavailable(f"model '{self.model}' is not available: the server that computes it does not answer")
        if self._keeper is not None and self._keeper.done():
            return Unavailable(f"model '{self.model}' is not available: its engine is left down")
        error = Unavailable(f"model '{self.model}' is being started again")
        error.retry_after = min(max(self._died_at + self._started_in - time.monotonic(), 1.0), LONGEST_RETRY)
        return error

    # Lives

    async def start(self) -> None:
        """Raises LoadError."""
        loop = asyncio.get_running_loop()
        if self.spec.url:
            await self._attach()
            self._keeper = loop.create_task(self._watch(), name=f"health of {self.model}")
        else:
            await self._start_life()
            self._keeper = loop.create_task(self._keep_alive(), name=f"engine of {self.model}")

    async def close(self) -> None:
        """What is under way fails, the process ends."""
        self._closing, self.ready = True, False
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        await self._end_life()

    async def _attach(self) -> None:
        self.place = self._place(self.spec.url, filled_in(self.spec.key, f"model '{self.model}': engine.key"))
        try:
            async with asyncio.timeout(ATTACH_SECONDS):
                while not await self._is_well(self.place):  # noqa: ASYNC110  nobody tells when it is there
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            self.down = self._unwell
            self.info = self._told([])
            log.warning("engine_not_there", model=self.model, version=self._version, reason=self.down, note="it is asked again and again")
            return
        except BaseException:
            await self._end_life()
            raise
        try:
            await self._learn(self.place)
        except BaseException:
            await self._end_life()
            raise
        self.ready = True

    async def _start_life(self) -> None:
        """Raises LoadError."""
        for _ in range(PORTS):
            port = free_port()
            try:
                await self._start_at(port)
            except PortTaken as taken:
                self.restarts += 1
                log.warning("engine_port_taken", model=self.model, version=self._version, port=port, reason=taken.message)
            else:
                return
        raise LoadError(f"model '{self.model}': {PORTS} ports in a row were taken by others before its engine listened there")

    async def _start_at(self, port: int) -> None:
        """Raises LoadError."""
        began = time.monotonic()
        command, environ, key = self._command(port)
        child = self._child = Child(self.model, self._version, command, environ, [key, self.spec.key])
        url = f"http://{HOST}:{port}"
        place = self.place = self._place(url, key)
        log.info("engine_starting", model=self.model, version=self._version, backend=self.row.name, program=command[0], url=url)
        try:
            await child.start(self.spec.stop_timeout)
            await self._until_well(child, place, port)
            await self._learn(place)
        except BaseException:
            await self._end_life()
            raise
        self.down = ""
        self.ready = True
        self._started_in = time.monotonic() - began
        log.info("engine_ready", model=self.model, version=self._version, pid=child.pid, seconds=round(self._started_in, 3))

    async def _end_life(self) -> None:
        self.ready = False
        if self.place is not None:
            await self.place.close()
        if self._child is not None:
            await self._child.stop()
            self._child = None

    def _command(self, port: int) -> tuple[list[str], dict[str, str], str]:
        """(command, its environment, the key that it will ask for). Raises LoadError."""
        spec, row = self.spec, self.row
        template = spec.command or row.command
        if not template:
            raise LoadError(
                f"model '{self.model}': backend `{row.name}` needs `engine.url`, a server that runs, or `engine.command`, one to start"
            )
        words = {"{model}": spec.model or str(self._artefact), "{name}": self.model, "{host}": HOST, "{port}": str(port)}
        command, changes = resolved([_filled(each, words) for each in (*template, *spec.args)], spec.environment, self.model)
        environ = {**inherited(os.environ), **changes}
        if spec.environment:  # those of this server's own interpreter
            environ.pop("PYTHONPATH", None)
            environ.pop("PYTHONHOME", None)
        where = f"model '{self.model}': engine.env"
        environ |= {name: filled_in(value, where) for name, value in spec.env.items()}
        key = filled_in(spec.key, f"model '{self.model}': engine.key")
        if not key and row.key_variable and not spec.command:
            key = environ.get(row.key_variable, "") or secrets.token_urlsafe(24)
        if key and row.key_variable:
            environ[row.key_variable] = key
        return command, environ, key

    def _place(self, url: str, key: str) -> UpstreamPlace:
        spec = self.spec
        name = spec.model if spec.url else ""
        upstream = Upstream(
            url=url, model=name, key=key, max_in_flight=spec.max_in_flight, connect_timeout=CONNECT_SECONDS, timeout=spec.timeout
        )
        try:
            return UpstreamPlace(self.model, upstream, versioned=False)
        except ConfigError as error:
            raise LoadError(f"model '{self.model}': {error.message}") from None

    async def _until_well(self, child: Child, place: UpstreamPlace, port: int) -> None:
        """Raises LoadError where that is never."""
        known = False
        began, told_at = time.monotonic(), time.monotonic()
        timeout = self.spec.start_timeout
        try:
            async with asyncio.timeout(timeout):
                while True:
                    looking = asyncio.ensure_future(self._is_well(place) if known else self._is_it(child, port))
                    try:
                        ends: set[asyncio.Future[Any]] = {looking, child.ended}
                        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                        if child.ended.done():
                            code = describe_exit(child.ended.result())
                            await self._is_it(child, port)
                            raise LoadError(f"model '{self.model}': its engine ended while it started ({code}){child.last_words}")
                        if looking.result():
                            if known:
                                return
                            known = True
                            continue
                    finally:
                        looking.cancel()
                        with suppress(asyncio.CancelledError, FairleadError):
                            await looking
                    now = time.monotonic()
                    if now - told_at >= TELL_SECONDS:
                        told_at = now
                        last = child.lines.last[-1] if child.lines.last else ""
                        log.info(
                            "engine_still_starting", model=self.model, seconds=round(now - began), waits_for=self._unwell, last_line=last
                        )
                    await asyncio.wait({child.ended}, timeout=LOOK_SECONDS)
        except TimeoutError:
            raise LoadError(
                f"model '{self.model}': its engine was not ready within {timeout:g} s: {self._unwell}{child.last_words}"
            ) from None

    async def _is_it(self, child: Child, port: int) -> bool:
        """Whether it listens: nobody else is asked anything, or shown its key. Raises PortTaken."""
        owner = await child.owner_of(port, apart=bool(self.spec.command))
        if owner is Owner.STRANGER:
            raise PortTaken(f"model '{self.model}': another program took port {port} before its engine did")
        self._unwell = "" if owner is not Owner.NOBODY else f"nobody listens at {HOST}:{port}: the connection is refused"
        if owner is Owner.UNKNOWN and not child.ended.done():
            log.warning("engine_listener_unknown", model=self.model, version=self._version, port=port, note="it is taken for the engine")
        return owner is not Owner.NOBODY

    async def _is_well(self, place: UpstreamPlace) -> bool:
        path = self.spec.health or self.row.health or ("" if self.spec.url else "/health")
        if not path:
            well = await place.check()
            self._unwell = place.down
            return well
        try:
            status, _ = await place.get(path)
        except UpstreamGone as error:
            self._unwell = error.detail
            return False
        self._unwell = "" if status == 200 else f"{place.id}{path} answers {status}"
        return status == 200

    async def _learn(self, place: UpstreamPlace) -> None:
        """Which models it has: that is told by nearly every server, and asked of none. Raises LoadError where ours is not among them."""
        try:
            status, body = await place.get("/v1/models")
        except UpstreamGone as error:
            raise LoadError(f"model '{self.model}': its engine is well and does not tell its models: {error.detail}") from None
        if status in (401, 403):
            raise LoadError(f"model '{self.model}': the server at {place.id} does not accept `engine.key`: it answers {status}")
        listed: list[_Listed] = []
        if status == 200:
            try:
                listed = _listing.decode(body).data
            except (msgspec.DecodeError, UnicodeDecodeError):
                if not self.row.name == "openai":
                    raise LoadError(
                        f"model '{self.model}': what answers at {place.id}/v1/models does not speak OpenAI's protocol"
                    ) from None
        names = [each.id for each in listed]
        if names and place.name not in names:
            if self.spec.url and (self.spec.model or len(names) > 1):
                shown = ", ".join(f"`{name}`" for name in names[:10])
                raise LoadError(
                    f"model '{self.model}': the server at {place.id} has no model `{place.name}`; `engine.model` must name one of {shown}"
                )
            if len(names) == 1:  # the only one must be it, whatever it is called there
                place.name = names[0]
        self.info = self._told([each for each in listed if each.id == place.name])

    def _told(self, listed: list[_Listed]) -> EngineInfo:
        max_model_len = next((each.max_model_len or 0 for each in listed), 0)
        place = self.place
        assert place is not None
        what = "attached to" if self.spec.url else "started"
        explain = [f"engine: {self.row.name}, {what} at {place.id}, which calls the model `{place.name}`"]
        if self.row.metrics:
            explain.append(f"metrics of its own: {place.id}{self.row.metrics}")
        return EngineInfo(
            tasks=("embed",) if self._embeds else ("generate",),
            max_model_len=max_model_len,
            architecture=self.row.name,
            has_chat_template=not self._embeds,
            explain=tuple(explain),
        )

    async def _keep_alive(self) -> None:
        delay, num_failures = 0.0, 0
        while (child := self._child) is not None:
            ready_at, pid = time.monotonic(), child.pid
            why = await self._until_unwell(child)
            lived = time.monotonic() - ready_at
            self.ready, self._died_at = False, time.monotonic()
            log.error("engine_died", model=self.model, version=self._version, pid=pid, reason=why)
            await self._end_life()
            self._on_change()
            num_failures = 0 if lived >= HEALTHY_SECONDS else num_failures + 1
            while not self.ready:
                if num_failures > self.spec.restarts:
                    self.down = f"{num_failures} times in a row its engine could not be kept alive, the last time: {self.down or why}"
                    log.error("engine_left_down", model=self.model, version=self._version, reason=self.down)
                    self._on_change()
                    return
                delay = restart_delay(delay, lived)
                await asyncio.sleep(delay)
                self.restarts += 1
                try:
                    await self._start_life()
                except (FairleadError, OSError) as error:  # OSError: no descriptors left, say
                    lived = 0.0
                    num_failures += 1
                    self.down = error.message if isinstance(error, FairleadError) else f"model '{self.model}': {error}"
                    self._on_change()
                    log.error("engine_not_started", model=self.model, version=self._version, reason=self.down, restarts=self.restarts)
            log.info("engine_started_again", model=self.model, version=self._version, pid=self.pid, restarts=self.restarts)
            self._on_change()

    async def _until_unwell(self, child: Child) -> str:
        """Why it must be started again."""
        place = self.place
        assert place is not None
        unhealthy = 0
        while True:
            await asyncio.wait({child.ended}, timeout=CHECK_SECONDS)
            if child.ended.done():
                return describe_exit(child.ended.result())
            unhealthy = 0 if await self._is_well(place) or place.answering else unhealthy + 1
            if unhealthy >= MAX_UNHEALTHY:
                return f"unwell {unhealthy} times in a row: {self._unwell}"

    async def _watch(self) -> None:
        """For ever, of a server that is attached to."""
        place = self.place
        assert place is not None
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            well = await self._is_well(place) or (self.ready and place.answering)
            self.down = "" if well else self._unwell
            if well and not self.ready:
                try:
                    await self._learn(place)
                except LoadError as error:
                    well, self.down = False, error.message
            if well != self.ready:
                self.ready = well
                if well:
                    log.info("engine_ready", model=self.model, version=self._version, url=place.id)
                else:
                    log.warning("engine_not_there", model=self.model, version=self._version, url=place.id, reason=self.down)
                self._on_change()

    def over(self, work: int, reader: Reader) -> None:
        """A prompt was answered, or not."""
        self._running.pop(work, None)


class _Running:
    """The place's sink of one prompt."""

    def __init__(self, instance: ExternalInstance, work: int, reader: Reader) -> None:
        self._instance = instance
        self._work = work
        self._reader = reader
        self._usage: Usage | None = None
        self._begun = instance._clock()

    def respond(self, response: Response) -> None:
        if self._usage is None and response.status < 400:
            self._instance.began(self._instance._clock() - self._begun)
        self._usage = response.usage or self._usage
        self._reader.respond(response)
        if self._reader.failed:
            self._instance.give_up(self._work)

    def close(self, error: FairleadError | None) -> None:
        self._instance.over(self._work, self._reader)
        if self._usage is not None:
            self._instance.used(self._usage)
        self._reader.close(error)


def _filled(word: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(name, value)
    return word
