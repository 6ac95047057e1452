"""A gateway over real parts, and clients of both forms, for the tests of the path."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fairlead.backends import Executable, fake_engine
from fairlead.core.caller import Caller, Envelope
from fairlead.core.errors import Cancelled, FairleadError
from fairlead.core.generation import Chat, Delta, Embed, Generate, Message, Sampling, Usage
from fairlead.core.policy import Amounts, GatewaySettings, Limits, ModelPolicy, TenantPolicy
from fairlead.core.request import Raw, Request, Response, Sink
from fairlead.core.specs import BatchingSpec, Execution, ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors
from fairlead.gateway.abuse import Abuse
from fairlead.gateway.course import Courses, compiled
from fairlead.gateway.gateway import Gateway
from fairlead.gateway.identity.identity import may_use
from fairlead.gateway.limits.ledger import Hold, Limiter
from fairlead.gateway.limits.meter import Subject
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.upstreams import Upstreams
from fairlead.gateway.usage import UsageLog
from fairlead.gateway.visit import come
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics, ModelMetrics
from fairlead.observe.table import TABLE
from fairlead.runtime.local import LocalInstance
from fairlead.runtime.repository import ModelRepository, RepositorySettings, State, _Model
from fairlead.runtime.version import ModelVersion
from fairlead.store.rows import AuditQuery, AuditRow, UsageQuery, UsageRow
from tests.stores import new_store

SECONDS = 60.0
"""After which a test that waits has failed."""
NEVER = 3600.0
WORDS = Usage(prompt_tokens=5, completion_tokens=3)
"""What every answer of a `Played` model took, unless the test says otherwise."""


async def turns(number: int = 12) -> None:
    """Let everybody do what they can."""
    for _ in range(number):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


# Models


class Function(Executable):
    """A Python function as a model."""

    def __init__(self, function: Callable[[Tensors], Tensors]) -> None:
        self.function = function

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self.function(inputs)


def tensor_model(
    name: str,
    function: Callable[[Tensors], Tensors],
    *,
    datatype: str = "FP32",
    answers: str = "",
    shape: tuple[int, ...] = (-1, 2),
    labels: tuple[str, ...] = (),
    version: str = "1",
    max_batch_size: int = 64,
) -> ModelVersion:
    """Of one tensor `x`, answered by one tensor `y`; computed for real by the runtime, in the event loop."""
    inputs = (TensorSpec(name="x", datatype=datatype, shape=shape),)
    outputs = (TensorSpec(name="y", datatype=answers or datatype, shape=(-1, *(-1 for _ in shape[1:])), labels=labels),)
    spec = ModelSpec(name=name, inputs=inputs, outputs=outputs, batching=BatchingSpec(max_batch_size=max_batch_size))
    return ModelVersion(spec, version, "python", [LocalInstance(Function(function), name, Execution.INLINE)])


def double(inputs: Tensors) -> Tensors:
    return {"y": inputs["x"] * 2}


def shout(inputs: Tensors) -> Tensors:
    return {"y": np.array([[text.upper() for text in row] for row in inputs["x"]], object)}


class Asked:
    """A request that has reached a model; the test answers it."""

    def __init__(self, model: "Played", request: Request, sink: Sink) -> None:
        self.model = model
        self.request = request
        self.prompt: Any = request.prompt
        self.sink = sink
        self.done = False
        self.cancelled = False

    def respond(self, **parts: Any) -> None:
        if not self.done:
            self.sink.respond(Response(model=self.model.name, version=self.model.version, id=self.request.id, **parts))

    def say(self, *texts: str) -> None:
        """Each as a token of its own."""
        for text in texts:
            self.respond(delta=Delta(text=text, token_ids=[1]))

    def end(self, *texts: str, usage: Usage = WORDS, **fields: Any) -> None:
        self.say(*texts)
        self.respond(delta=Delta(finish_reason="stop", usage=usage, **fields))
        self.close(None)

    def fail(self, error: FairleadError) -> None:
        self.close(error)

    def close(self, error: FairleadError | None) -> None:
        if not self.done:
            self.done = True
            self.model.running.remove(self)
            self.sink.close(error)

    def cancel(self) -> None:
        self.cancelled = not self.done
        self.close(Cancelled("request was cancelled"))


class Played:
    """A language model that the test plays: what it is asked waits in `asked`, unless `answers` says something at once."""

    platform = "played"
    ready = True

    def __init__(self, name: str, answers: str = "", version: str = "1") -> None:
        self.spec = ModelSpec(name=name)
        self.name = name
        self.version = version
        self.answers = answers
        self.metrics = ModelMetrics(name, version, queue=lambda: (0, 0), restarts=lambda: 0)
        self.asked: list[Asked] = []
        self.running: list[Asked] = []

    def submit(self, request: Request, sink: Sink) -> Asked:
        asked = Asked(self, request, sink)
        self.asked.append(asked)
        self.running.append(asked)
        if isinstance(request.prompt, Embed):
            vector = fake_engine._embed((request.prompt.text or "").split())
            data = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
            asked.respond(delta=Delta(vector=data, finish_reason="stop", usage=Usage(prompt_tokens=1)))
            asked.close(None)
        elif self.answers:
            asked.end(*self.answers.split("|"))
        return asked

    async def infer(self, request: Request) -> Any:
        channel = Channel()
        ticket = self.submit(request, channel)
        try:
            while (response := await channel.next()) is not None:
                yield response
        finally:
            ticket.cancel()

    async def next(self, number: int = 1) -> Asked:
        """The latest, once it has been asked so many times."""
        await until(lambda: len(self.asked) >= number)
        return self.asked[number - 1]

    def statistics(self) -> dict[str, object]:
        return {}

    async def drain(self, timeout: float) -> None:
        pass


class Channel:
    """A sink that an async iterator reads."""

    def __init__(self) -> None:
        self._responses: asyncio.Queue[Response | FairleadError | None] = asyncio.Queue()

    def respond(self, response: Response) -> None:
        self._responses.put_nowait(response)

    def close(self, error: FairleadError | None) -> None:
        self._responses.put_nowait(error)

    async def next(self) -> Response | None:
        response = await self._responses.get()
        if isinstance(response, FairleadError):
            raise response
        return response


class Models(ModelRepository):
    """A repository into which the test puts what is served."""

    def __init__(self) -> None:
        super().__init__(RepositorySettings(sources=()), Metrics())

    def serve(self, *versions: Any) -> None:
        for version in versions:
            model = self._models.setdefault(version.name, _Model())
            model.versions[int(version.version)] = version
            model.states[int(version.version)] = (State.READY, "")
            self._publish(version.name, model)

    def withdraw(self, name: str) -> None:
        model = self._models[name]
        for number in model.versions:
            del self.metrics.models[name, str(number)]
        model.versions.clear()
        self._publish(name, model)


# Requests


def caller(tenant: str = "acme", *, limits: Limits | None = None, **fields: Any) -> Caller:
    """`limits`: its tenant's."""
    policy = fields.pop("policy", None) or TenantPolicy(limits=limits or {})
    return Caller(**{"tenant": tenant, "key": f"key-of-{tenant}", "classes": (), "models": (policy.models,), "policy": policy, **fields})


ACME = caller()


def envelope(**headers: str) -> Envelope:
    pairs = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return Envelope(method="POST", target="/", scheme="http", authority="localhost", headers=pairs)


_ids = count(1)


def asking(model: str, **fields: Any) -> Request:
    return Request(**{"model": model, "caller": ACME, "id": f"r{next(_ids)}", **fields})


def say(text: str, model: str = "chat", *, stream: bool = True, sampling: Mapping[str, Any] | None = None, **fields: Any) -> Request:
    """A chat of one message; greedy, so that its answer may be shared."""
    chosen = Sampling(**{"temperature": 0.0, "max_tokens": 10, **(sampling or {})})
    prompt = Generate(chat=Chat(messages=[Message(role="user", content=text)]), sampling=chosen, stream=stream)
    return asking(model, prompt=prompt, **fields)


def rows(*values: float, model: str = "double", **fields: Any) -> Request:
    """Rows of two numbers for `double`."""
    array = np.array([[value, value] for value in values or (1.0,)], np.float32)
    return asking(model, inputs={"x": array}, **fields)


def texts(*values: str, model: str = "shout", **fields: Any) -> Request:
    return asking(model, inputs={"x": np.array([[value.encode()] for value in values], object)}, **fields)


def raw(body: bytes, model: str = "far", **fields: Any) -> Request:
    return asking(model, raw=Raw(path="/v1/chat/completions", body=body, **fields))


# Clients


class Client:
    """Who asks, in one of the two forms."""

    def __init__(self, gateway: Gateway, request: Request, form: str) -> None:
        self.request = request
        self.responses: list[Response] = []
        self.error: FairleadError | None = None
        self.ended = asyncio.Event()
        self.ticket: Any = None
        self.task: asyncio.Task[None] | None = None
        if form == "submit":
            self.ticket = gateway.submit(request, self)
        else:
            self.task = asyncio.get_running_loop().create_task(self._read(gateway))

    async def _read(self, gateway: Gateway) -> None:
        try:
            async with aclosing(gateway.infer(self.request)) as responses:
                async for response in responses:
                    self.respond(response)
        except FairleadError as error:
            self.close(error)
        except asyncio.CancelledError:
            self.close(Cancelled("the client left"))
            raise
        else:
            self.close(None)

    def respond(self, response: Response) -> None:
        assert not self.ended.is_set(), "a response after the end"
        self.responses.append(response)

    def close(self, error: FairleadError | None) -> None:
        assert not self.ended.is_set(), "it ended twice"
        self.error = error
        self.ended.set()

    async def end(self) -> "Client":
        async with asyncio.timeout(SECONDS):
            await self.ended.wait()
        return self

    async def answer(self) -> list[Response]:
        """Raises what it was told instead."""
        await self.end()
        if self.error is not None:
            raise self.error
        return self.responses

    async def leave(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(response.delta.text for response in self.responses if response.delta is not None)

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the answer's head: those of the first response, or of the error."""
        if self.responses:
            assert all(not response.headers for response in self.responses[1:])
            return self.responses[0].headers
        assert self.error is not None
        return self.error.headers


class SlowLimiter(Limiter):
    """One that must ask elsewhere, as that in Redis does; the answer comes when `open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()

    def hold(self, subjects: Any, amounts: Amounts, now: float) -> Hold | None:  # type: ignore[override]
        return None

    async def ask(self, subjects: tuple[Subject, ...], amounts: Amounts, now: float) -> Hold:  # type: ignore[override]
        async with asyncio.timeout(SECONDS):
            await self.open.wait()
        return super().hold(subjects, amounts, now)


class House:
    """A gateway with `chat` (played), `double` and `shout` behind it."""

    def __init__(
        self, folder: Path, form: str, settings: GatewaySettings, limits: Limiter | None, max_in_flight: int, *, books: bool
    ) -> None:
        self.form = form
        self.settings = settings
        self.counts = Counts()
        self.repository = Models()
        self.chat = Played("chat")
        self.double = tensor_model("double", double)
        self.repository.serve(self.chat, self.double, tensor_model("shout", shout, datatype="BYTES", shape=(-1, 1)))
        self.upstreams = Upstreams(settings)
        self.dispatch = Dispatch(self.repository, lambda: self.settings, self.upstreams, self.counts, allowed=may_use)
        self.courses = Courses(
            settings,
            lambda model: max_in_flight if model == "chat" else 0,
            lambda: self.repository.readiness_changed,
            come,
            lambda model: self.dispatch.knows(model) or model in self.settings.models,
        )
        self.courses.configure(settings, compiled(settings))
        self.limits = Limiter() if limits is None else limits
        self.store = new_store(folder) if books else None
        self.usage = UsageLog(self.store, NEVER, self.counts) if books else None
        self.abuse = Abuse(settings.abuse, self.counts) if books and settings.abuse.action != "off" else None
        self.gateway = Gateway(
            settings=settings,
            repository=self.repository,
            upstreams=self.upstreams,
            dispatch=self.dispatch,
            limits=self.limits,
            courses=self.courses,
            usage=self.usage,
            abuse=self.abuse,
            counts=self.counts,
            audit=self.usage.audit if self.usage is not None else lambda row: None,
        )
        self.clients: list[Client] = []
        self._tasks = asyncio.all_tasks()

    def configure(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.upstreams.configure(settings, self.upstreams.prepare(settings))
        self.gateway.configure(settings, compiled(settings))

    # Asking

    def ask(self, request: Request, form: str = "") -> Client:
        client = Client(self.gateway, request, form or self.form)
        self.clients.append(client)
        return client

    async def answer(self, request: Request) -> Client:
        """Raises what it was told instead."""
        client = self.ask(request)
        await client.answer()
        return client

    async def refusal(self, request: Request) -> FairleadError:
        client = await self.ask(request).end()
        assert client.error is not None and not client.responses
        return client.error

    async def said(self, text: str = "hello", *words: str, usage: Usage = WORDS, **fields: Any) -> Client:
        """Ask `chat`, which answers with these words."""
        number = len(self.chat.asked)
        client = self.ask(say(text, **fields))
        (await self.chat.next(number + 1)).end(*words, usage=usage)
        return await client.end()

    # What it knows

    def queue(self, model: str = "chat") -> Any:
        return self.courses.queues[model]

    def count(self, name: str, *labels: str) -> int:
        name = f"fairlead_gateway_{name}_total"
        assert len(TABLE[name].labels) == len(labels)
        return self.counts.get(name, *labels)

    def held(self) -> dict[tuple[str, str], float]:
        """(subject, rule) → reserved by requests under way."""
        return {(meter.subject, meter.rule.name): meter.held for meter in self._meters() if meter.held}

    def spent(self, subject: str = "tenant:acme") -> dict[str, float]:
        """Rule → used by requests that have ended, of budgets, which flow off never."""
        return {meter.rule.name: meter.spent for meter in self._meters() if meter.subject == subject and not meter.rate}

    def _meters(self) -> Iterator[Any]:
        for account in self.limits._accounts.values():
            yield from account.meters

    async def records(self) -> list[UsageRow]:
        """All of the store, the oldest first. Nothing is written after this."""
        assert self.usage is not None and self.store is not None
        self.usage.start()
        await self.usage.stop()
        return list(reversed(self.store.records(UsageQuery(), 1000)))

    async def record(self) -> UsageRow:
        """The only one."""
        (row,) = await self.records()
        return row

    def audits(self) -> list[AuditRow]:
        assert self.store is not None
        return list(self.store.audit(AuditQuery(), 100))

    def num_noted(self, tenant: str = "acme") -> int:
        """Requests of a tenant that the watch has seen."""
        assert self.abuse is not None
        known = self.abuse._tenants.get(tenant)
        return 0 if known is None else known.num_requests

    # The end

    async def check(self) -> None:
        """Whatever happened, nothing is left of it but one record of each request."""
        await turns()
        assert all(client.ended.is_set() for client in self.clients)
        assert {model: (queue.num_waiting, queue.num_in_flight) for model, queue in self.courses.queues.items()} == dict.fromkeys(
            self.courses.queues, (0, 0)
        )
        assert len(self.gateway.recalls.flights) == 0
        assert self.held() == {} and not self.limits.dropped
        assert all(account.num_holds == 0 for account in self.limits._accounts.values())
        assert self.chat.running == []
        if self.usage is not None and self.store is not None:
            noted = len(self.usage._rows) or len(self.store.records(UsageQuery(), 10_000))
            assert noted == len(self.clients)

    async def close(self) -> None:
        await self.upstreams.close()
        await self.gateway.recalls.close()
        await self.gateway.shadows.stop()
        if self.usage is not None:
            self.usage._rows.clear()
            self.usage._audit.clear()
            await self.usage.stop()
        if self.store is not None:
            self.store.close()
        left = {task for task in asyncio.all_tasks() - self._tasks if task is not asyncio.current_task()}
        assert not left, left


def policies(*, classes: dict[str, int] | None = None, tenants: Any = None, abuse: Any = None, **models: ModelPolicy) -> GatewaySettings:
    more = {name: value for name, value in {"classes": classes, "tenants": tenants, "abuse": abuse}.items() if value is not None}
    return GatewaySettings(models=models, **more)
