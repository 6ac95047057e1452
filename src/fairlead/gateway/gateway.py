"""The path that every request walks, whatever it asks for: read it from the top to the bottom.

    allow    this caller may use this model, in this class of service
    watch    its tenant is not blocked or throttled
    check    its texts pass the filters
    recall   an answer that is stored, or one that is being computed, will do
    hold     what it may take is reserved from every limit that applies
    turn     it waits for its turn before the model
    (dispatch: a version, a replica, another try)
    seen     every response on its way back: usage, filters
    finish   the hold is settled, the next one's turn, the books

Who calls was found out at the door, before the body was read. A request that needs none of this is handed on at once.
`admit` is one coroutine for both forms of asking. It is driven here and now, without a task: what usually never waits costs
no hand-off. Only one that does wait becomes a task.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import numpy as np
import structlog
from msgspec import structs

from fairlead.core.caller import ANYONE, Caller
from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Filtered,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    ModelError,
    NotFound,
    ReplicaDied,
    Shed,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from fairlead.core.generation import Embed, Generate, Usage
from fairlead.core.policy import Amounts, FilterPolicy, GatewaySettings, Unit, rules_of
from fairlead.core.request import Pausable, Request, Response, Sink, Ticket
from fairlead.gateway.abuse import Abuse, Seen
from fairlead.gateway.course import Course, Courses
from fairlead.gateway.estimate import Work, estimate, num_chars
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.moderation import by_label, check_classifier, text_rows
from fairlead.gateway.filters.output import OutputFilter
from fairlead.gateway.identity.identity import may_use, qos_class_of
from fairlead.gateway.limits.ledger import AnyLimiter, Hold
from fairlead.gateway.limits.meter import Subject
from fairlead.gateway.limits.price import FREE, MONEY, amounts_of
from fairlead.gateway.queue import FairQueue, Waiting, degradation, served_work, token_work
from fairlead.gateway.recall import Answer, Recall, Recalled, replay
from fairlead.gateway.reuse.keys import CHOOSES
from fairlead.gateway.reuse.response_cache import NotStored, Stored
from fairlead.gateway.reuse.single_flight import Member
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.upstream.registry import Upstreams
from fairlead.gateway.usage import UsageLog
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import ModelRepository
from fairlead.runtime.version import Version
from fairlead.store.rows import AuditRow, UsageRow

log = structlog.get_logger("fairlead.gateway")

MAX_SUBJECTS = 10_000
"""Callers whose limits are kept ready."""
CLASSIFY_SECONDS = 10.0
MANY_CHARS = 1 << 15
"""Of a request's texts: from here on a thread searches them."""
NOTHING = Usage()
NO_WORK = Work(None, 0)
MAX_NAME_CHARS = 256
"""Of what a caller calls its request."""


class Gateway:
    """An `Inference` like the repository that it stands before. Called from the event loop only."""

    def __init__(
        self,
        *,
        settings: GatewaySettings,
        repository: ModelRepository,
        upstreams: Upstreams,
        dispatch: Dispatch,
        limits: AnyLimiter,
        courses: Courses,
        usage: UsageLog | None,
        audit: Callable[[AuditRow], None] = lambda _: None,
        abuse: Abuse | None,
        counts: Counts,
    ) -> None:
        """`usage`, `abuse`: None for a server that keeps no books. Raises ConfigError."""
        self.settings = settings
        self.repository = repository
        self.upstreams = upstreams
        self.dispatch = dispatch
        self.limits = limits
        self.courses = courses
        self.usage = usage
        self.audit = audit
        self.abuse = abuse
        self.counts = counts
        self.recalls = Recall(settings, repository, self.embed, counts)
        self._subjects: dict[tuple[str, str, str], tuple[Caller, tuple[Subject, ...]]] = {}
        self._timers: dict[FairQueue, asyncio.TimerHandle] = {}
        self.stopping = False

    def configure(self, settings: GatewaySettings, filters: dict[FilterPolicy, Filters]) -> None:
        """Other policies, from the next request on."""
        self.settings = settings
        self.courses.configure(settings, filters)
        self._subjects = {}

    # What the doors call

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """For a request with one response. Errors go to the sink, possibly before this returns."""
        course = self.courses[request.model]
        if self._free(request, course):
            return self.dispatch.submit(request, sink)
        visit = Visit(self, course, request)
        visit.begin(sink)
        return visit

    async def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """The responses. Raises FairleadError; closing it cancels."""
        course = self.courses[request.model]
        if self._free(request, course):
            async with aclosing(self.dispatch.infer(request)) as responses:
                async for response in responses:
                    yield response
            return
        visit = Visit(self, course, request)
        error: FairleadError | None = Cancelled("the client left")
        try:
            answer = await self.admit(visit)
            async with aclosing(visit.answers(answer)) as responses:
                async for response in responses:
                    for each in visit.seen(response):
                        yield each
            for each in visit.last():
                yield each
            error = None
        except FairleadError as failure:
            error = visit.told(failure)
            raise error from None
        except asyncio.CancelledError:
            raise
        except Exception:
            error = ModelError("internal error")
            raise
        finally:
            visit.finish(error)

    def _free(self, request: Request, course: Course) -> bool:
        """Nothing that could refuse, delay, change or count this request."""
        return request.caller is ANYONE and self.usage is None and course.plain and not request.qos_class and not self.stopping

    def find(self, name: str, version: str = "") -> Version:
        """Raises NotFound."""
        return self.repository.find(name, version)

    def remote(self, model: str) -> bool:
        """No version of it is here, but other servers compute it: its bodies go on as they come."""
        return bool(self.upstreams(model)) and not self.repository.versions(model)

    def falls_back(self, model: str) -> bool:
        """A model that is here may answer in its place."""
        fallback = self.settings.model(model).routing.fallback
        return bool(fallback) and any(self.repository.versions(name) for name in fallback)

    @property
    def any_remote(self) -> bool:
        return bool(self.upstreams)

    def remote_models(self) -> list[str]:
        """Those of the OpenAI protocol."""
        return [name for name in self.upstreams.models() if self.remote(name) and self.upstreams(name)[0].openai]

    # Down

    async def admit(self, visit: "Visit") -> Answer | None:
        """Everything that may refuse a request or let it wait, in order. Returns what answers it, where nothing needs computing.

        Raises FairleadError.
        """
        self.allow(visit)
        self.watch(visit)
        policy = visit.caller.policy.filters or visit.course.policy.filters
        if policy is not None:
            await self.check(visit, policy)
        if visit.course.reuses:
            answer = await self.recall(visit)
            if answer is not None:
                return answer
        await self.hold(visit)
        if visit.course.queue is not None:
            answer = await self.turn(visit)
            if answer is not None:
                return answer
        visit.started = time.perf_counter()
        return None

    def allow(self, visit: "Visit") -> None:
        request, caller = visit.request, visit.caller
        if self.stopping:
            raise ShuttingDown("Server is stopping, scheduler for model has stopped accepting new inference requests")
        if caller.models and not may_use(caller, request.model):
            raise NotFound(f"Request for unknown model: '{request.model}' is not found")
        if visit.course.policy.require_signature and not request.signed_by:
            raise Unauthenticated(f"requests for model '{request.model}' must be signed (RFC 9421): see docs/signing.md")
        if not visit.course.known:
            raise self.dispatch.missing(request)
        classes = self.settings.classes
        if request.qos_class and request.qos_class not in classes:
            raise InvalidRequest(f"there is no class of service like that: x-fairlead-class may be {', '.join(classes)}")
        visit.qos_class = qos_class_of(caller, request.qos_class)
        visit.priority = classes.get(visit.qos_class, 0)
        if request.priority and "*" not in caller.classes and not classes.keys() <= {caller.qos_class, *caller.classes}:
            raise Forbidden("`priority` may be set by callers of every class only: ask for a class with x-fairlead-class")
        prompt = request.prompt
        if caller is not ANYONE and isinstance(prompt, Generate):
            request.prompt = structs.replace(prompt, salt=caller.tenant)

    def watch(self, visit: "Visit") -> None:
        """A refused one is not noted: that would keep it refused."""
        if self.abuse is not None and (error := self.abuse.decide(visit.caller.tenant, time.monotonic())) is not None:
            visit.watched = False
            raise error

    async def check(self, visit: "Visit", policy: FilterPolicy) -> None:
        filters = self.courses.filters(policy)
        if filters is None:
            await visit.in_task()
            filters = await self.courses.compile(policy)
        request = visit.request
        if num_chars(request) > MANY_CHARS:
            await visit.in_task()  # nobody else would be served meanwhile
            found = await asyncio.to_thread(filters.check, request)
        else:
            found = filters.check(request)
        checked = found.request
        # in place: its door reads there how many rows it had
        request.inputs, request.prompt, request.raw, request.parameters = checked.inputs, checked.prompt, checked.raw, checked.parameters
        for rule in found.flagged:
            self.counts.add("fairlead_gateway_flagged_total", visit.course.label, rule)
        if filters.moderates:
            await visit.in_task()
            for rule in await filters.moderate(request, self.moderate):
                self.counts.add("fairlead_gateway_flagged_total", visit.course.label, rule)
        visit.output = filters.output(stream=visit.sink is None)

    async def moderate(self, model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        """For each text the labels' probabilities. Raises Unavailable: whatever is wrong with the classifier, its caller did right."""
        try:
            async with asyncio.timeout(CLASSIFY_SECONDS):
                return await self.classify(model, texts)
        except TimeoutError:
            error = f"no answer within {CLASSIFY_SECONDS:g} s"
        except (FairleadError, ValueError) as failure:
            error = str(failure)
        log.warning("not_moderated", model=model, error=error)
        raise Unavailable("the texts of this request could not be moderated: try again later")

    async def classify(self, model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        """By a served model that takes a text in each row. Raises FairleadError."""
        spec = self.repository.find(model).spec
        labels, output = check_classifier(spec), spec.outputs[0].name
        found: list[Mapping[str, float]] = []
        for some in batched(texts, spec.batching.max_batch_size or len(texts)):
            request = Request(model=model, inputs=text_rows(spec, some), arrived=time.perf_counter())
            async with aclosing(self.dispatch.infer(request)) as responses:
                async for response in responses:
                    found += by_label(labels, response.outputs[output])
        if len(found) != len(texts):
            raise ModelError(f"model '{model}' judged {len(found)} of {len(texts)} texts")
        return found

    async def embed(self, model: str, text: str) -> np.ndarray:
        """By a served embedder. Raises FairleadError."""
        request = Request(model=model, prompt=Embed(text=text), arrived=time.perf_counter())
        async with aclosing(self.dispatch.infer(request)) as responses:
            async for response in responses:
                if response.delta is not None and response.delta.vector:
                    return np.frombuffer(response.delta.vector, "<f4")
        raise ModelError(f"model '{model}' gave no vector")

    async def recall(self, visit: "Visit") -> Answer | None:
        policy, request = visit.course.policy, visit.request
        fixed = bool(request.version) or not (policy.traffic or self.dispatch.routes.shares.get(request.model))
        found = visit.recalled = Recalled()
        await self.recalls.look(found, request, policy.cache, policy.queue.max_wait, visit.in_task, fixed=fixed)
        visit.headers.update(found.headers)
        if found.answer is not None:
            visit.reused = True
            await self.hold(visit)
        return found.answer

    async def hold(self, visit: "Visit") -> None:
        subjects = self.subjects(visit.caller, visit.course)
        if not subjects and visit.course.queue is None:
            return
        work = visit.work = NO_WORK if visit.reused else self.estimate(visit.request)
        if subjects:
            amounts = visit.amounts(work.usage, work.rows, 0.0)
            now = time.time()
            visit.hold = self.limits.hold(subjects, amounts, now)
            if visit.hold is None:
                await visit.in_task()
                visit.hold = await self.limits.ask(subjects, amounts, now)
            visit.headers.update(visit.hold.headers)

    def estimate(self, request: Request) -> Work:
        batches = True
        if request.inputs:
            with suppress(FairleadError):
                batches = self.find(request.model, request.version).spec.batches
        return estimate(request, self.settings.limits.output_tokens, batches=batches)

    def subjects(self, caller: Caller, course: Course) -> tuple[Subject, ...]:
        """Everything whose limits a request of this caller counts against."""
        key = (caller.tenant, caller.project, caller.key)
        found = self._subjects.get(key)
        if (
            found is None
            or found[0].policy is not caller.policy
            or found[0].key_limits is not caller.key_limits
            or found[0].project_limits != caller.project_limits
        ):
            if len(self._subjects) >= MAX_SUBJECTS:
                self._subjects.clear()
            named = (
                (f"tenant:{caller.tenant}", caller.policy.limits),
                (f"project:{caller.tenant}/{caller.project}", caller.project_limits),
                (f"key:{caller.key}", caller.key_limits),
            )
            subjects = tuple(Subject(name, rules_of(limits)) for name, limits in named if limits)
            found = self._subjects[key] = (caller, subjects)
        return found[1] if course.subject is None else (*found[1], course.subject)

    async def turn(self, visit: "Visit") -> Answer | None:
        """Returns an answer that will do although it is old, where the policy allows that for such a wait."""
        queue = visit.course.queue
        assert queue is not None and visit.work is not None
        now = time.perf_counter()
        steps = visit.course.policy.queue.degrade
        if steps and queue.num_waiting:
            stored = self.degrade(visit, queue, now)
            if stored is not None:
                return stored
            queue = visit.course.queue
            if queue is None:
                return None
        work, request = visit.work, visit.request
        units = float(work.rows) if work.usage is None else token_work(work.usage.prompt_tokens, work.usage.completion_tokens)
        item = Turn(visit, units, now, request.timeout)
        offered = queue.offer(item, now)
        visit.item, visit.line = item, queue
        if offered.evicted is not None:
            assert isinstance(offered.evicted, Turn)
            retry_after = queue.retry_after(offered.evicted, now)
            offered.evicted.refuse(Shed("another request took its place in the line", reason="evicted", retry_after=retry_after))
        if not offered.turn:
            self._arm(queue)
            await item.comes()
        return None

    def degrade(self, visit: "Visit", queue: FairQueue, now: float) -> Stored | None:
        """Ask for less, where the policy says so for such a wait. Returns an old answer, if that is what there is to be."""
        wait = queue.predicted_wait(visit.priority, visit.caller.tenant, visit.caller.policy.weight, now)
        step = degradation(visit.course.policy.queue.degrade, visit.qos_class, wait)
        if step is None:
            return None
        stored = self.recalls.stale(visit.recalled) if step.cached else None
        if stored is not None:
            visit.reused = True
            visit.headers |= {**stored.headers("stale", time.time()), "x-fairlead-degraded": "cached"}
            self.counts.add("fairlead_gateway_reused_total", visit.course.name, "stale")
            return stored
        request, done = visit.request, []
        if step.model is not None and may_use(visit.caller, step.model) and self.dispatch.knows(step.model):
            request.model, request.version = step.model, ""
            visit.course = self.courses[step.model]
            done.append(f"model={step.model}")
        prompt = request.prompt
        if step.max_tokens is not None and isinstance(prompt, Generate):
            wanted = prompt.sampling.max_tokens
            if wanted is None or wanted > step.max_tokens:
                least = min(prompt.sampling.min_tokens, step.max_tokens)
                sampling = structs.replace(prompt.sampling, max_tokens=step.max_tokens, min_tokens=least)
                request.prompt = structs.replace(prompt, sampling=sampling)
                done.append(f"max_tokens={step.max_tokens}")
        raw = request.raw
        if step.max_tokens is not None and raw is not None and raw.path in CHOOSES:
            least = step.max_tokens if raw.max_tokens is None else min(raw.max_tokens, step.max_tokens)
            if least != raw.max_tokens:
                raw.max_tokens = least
                done.append(f"max_tokens={step.max_tokens}")
        if done:
            visit.forget()  # what is computed now is no answer to what was asked
            visit.work = self.estimate(request)
            visit.headers["x-fairlead-degraded"] = ", ".join(done)
            self.counts.add("fairlead_gateway_degraded_total", visit.course.name, visit.qos_class)
        return None

    # The books

    def note(self, visit: "Visit") -> None:
        """What became of a request, for the metrics, the watch and the usage records."""
        request, caller, error = visit.request, visit.caller, visit.error
        outcome, reason = ended(error)
        if error is not None:
            visit.status = status_of(error)
        elif visit.status >= 400:
            outcome, reason = "failure", "upstream-error"
        if outcome == "refused":
            self.counts.add("fairlead_gateway_refused_total", visit.course.label, reason)
        if visit.output is not None:
            for rule in visit.output.rules:
                self.counts.add("fairlead_gateway_filtered_total", visit.course.label, rule, "answer")
        if isinstance(error, Filtered) and not visit.answered:
            self.counts.add("fairlead_gateway_filtered_total", visit.course.label, error.rule, "request")
        took = visit.took.usage or NOTHING
        if self.abuse is not None and self.abuse.settings.action != "off" and visit.watched:
            self._note_abuse(visit, took, reason)
        if self.usage is None:
            return
        self.usage.add(
            UsageRow(
                time=time.time(),
                request_id=request.log_id or plain(request.id),
                tenant=caller.tenant,
                project=caller.project,
                key=caller.key,
                model=request.model if visit.course.known else "",
                version=plain(visit.version),
                qos_class=visit.qos_class,
                kind=kind_of(request),
                outcome=outcome,
                status=visit.status,
                reason=reason,
                input_tokens=took.prompt_tokens,
                cached_tokens=took.cached_tokens,
                output_tokens=took.completion_tokens,
                rows=visit.took.rows,
                compute_seconds=visit.compute_seconds,
                seconds=time.perf_counter() - visit.arrived,
                cost=visit.cost,
                cached=visit.reused,
                address=caller.address,
            )
        )

    def _note_abuse(self, visit: "Visit", took: Usage, reason: str) -> None:
        assert self.abuse is not None
        caller, now = visit.caller, time.monotonic()
        seen = Seen(
            tenant=caller.tenant,
            key=caller.key,
            address=caller.address,
            status=visit.status,
            filtered=reason == "filtered",
            tokens=took.prompt_tokens + took.completion_tokens,
            text=last_text(visit.request) if self.abuse.wants_text(caller.tenant, now) else "",
        )
        action = self.abuse.note(seen, now)
        if action is not None:
            log.warning("abuse", tenant=action.tenant, action=action.action, score=round(action.score, 2), reasons=action.reasons)
            details = {"score": action.score, "reasons": action.reasons, "seconds": action.until - action.since}
            self.audit(AuditRow(time=time.time(), actor="gateway", action=f"abuse.{action.action}", subject=action.tenant, details=details))

    # The waiting lines

    def leave(self, queue: FairQueue, item: Waiting, served: float | None) -> None:
        """It is over with this one: whose turn is it?"""
        now = time.perf_counter()
        for next_one in queue.done(item, served, now) if item.running else queue.leave(item, now):
            come(next_one)

    def _arm(self, queue: FairQueue) -> None:
        at = queue.next_expiry()
        timer = self._timers.pop(queue, None)
        if timer is not None:
            timer.cancel()
        if at is not None:
            delay = max(at - time.perf_counter(), 0.0)
            self._timers[queue] = asyncio.get_running_loop().call_later(delay, self._expire, queue)

    def _expire(self, queue: FairQueue) -> None:
        for item in queue.expire(time.perf_counter()):
            assert isinstance(item, Turn)
            retry_after = queue.retry_after(item, time.perf_counter())
            item.refuse(Shed("the request waited too long for its turn", reason="queue-timeout", retry_after=retry_after))
        self._arm(queue)

    def drop_waiting(self) -> None:
        """The server stops."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for queue in self.courses.queues.values():
            for item in queue.drop_all():
                assert isinstance(item, Turn)
                item.refuse(ShuttingDown("Server is stopping"))


class Turn(Waiting):
    """A visit in a waiting line."""

    __slots__ = ("_coming",)

    def __init__(self, visit: "Visit", work: float, now: float, timeout: float) -> None:
        super().__init__(
            tenant=visit.caller.tenant,
            priority=visit.priority,
            weight=visit.caller.policy.weight,
            work=work,
            deadline=now + timeout if timeout else 0.0,
            arrived=now,
        )
        self._coming: asyncio.Future[None] | None = None

    async def comes(self) -> None:
        """Raises Shed."""
        self._coming = asyncio.get_running_loop().create_future()
        await self._coming

    def come(self) -> None:
        if self._coming is not None and not self._coming.done():
            self._coming.set_result(None)

    def refuse(self, error: FairleadError) -> None:
        if self._coming is not None and not self._coming.done():
            self._coming.set_exception(error)
            self._coming.exception()  # it may have left in this very moment, and nobody looks


def come(item: Waiting) -> None:
    assert isinstance(item, Turn)
    item.come()


class Visit:
    """One request on its way through the gateway: the ticket of who asked, the sink of who answers."""

    # Defaults stand on the class: most are never set.
    qos_class = ""
    priority = 0
    output: OutputFilter | None = None
    work: Work | None = None
    hold: Hold | None = None
    item: Turn | None = None
    line: FairQueue | None = None
    """Where `item` stands."""
    version = ""
    status = 200
    """In HTTP's numbers."""
    usage: Usage | None = None
    num_tokens = 0
    """Of the answer so far, as long as no usage tells."""
    started = 0.0
    """When it had its turn."""
    watched = True
    """It counts in what is known of its tenant's traffic."""
    recalled: Recalled | None = None
    reused = False
    """Nothing is computed for it: its answer is stored, or computed for somebody else."""
    leading = False
    """What it asked for is being computed, perhaps for others too."""
    answered = False
    finished = False
    error: FairleadError | None = None
    """How it ended for its caller."""
    settled = False
    took = NO_WORK
    cost = 0.0
    compute_seconds = 0.0
    # of the callback form
    taskless = False
    """`begin` drives it, in whatever task or callback that was called."""
    sink: Sink | None = None
    ticket: Ticket | None = None
    task: asyncio.Task[None] | None = None

    def __init__(self, gateway: Gateway, course: Course, request: Request) -> None:
        self.gateway = gateway
        self.course = course
        self.request = request
        self.caller = request.caller
        self.model = request.model
        """As it was asked for."""
        self.arrived = request.arrived or time.perf_counter()
        self.headers: dict[str, str] = {}
        """What the answer's head says of how it came about."""

    # The callback form

    def begin(self, sink: Sink) -> None:
        self.sink = sink
        gateway = self.gateway
        steps = gateway.admit(self)
        self.taskless = True
        try:
            waits_for = steps.send(None)
        except StopIteration as end:
            self._go(end.value)
        except FairleadError as error:
            self.close(error)
        except Exception:
            log.exception("request_failed", model=self.model)
            self.close(ModelError("internal error"))
        else:
            self.task = asyncio.get_running_loop().create_task(self._walk(_Resumed(steps, waits_for)))

    async def in_task(self) -> None:
        """Before a wait that needs a task of its own around it (a timeout, say): what was begun without one goes on in one."""
        if self.taskless:
            self.taskless = False
            await asyncio.sleep(0)

    async def _walk(self, steps: Awaitable[Answer | None]) -> None:
        try:
            answer = await steps
            self.task = None
            if not self.finished:
                self._go(answer)
        except FairleadError as error:
            self.close(error)
        except asyncio.CancelledError:
            self.close(Cancelled("request was cancelled"))
            raise
        except Exception:
            log.exception("request_failed", model=self.model)
            self.close(ModelError("internal error"))

    def _go(self, answer: Answer | None) -> None:
        dispatch, member = self.gateway.dispatch, self.member
        if isinstance(answer, Stored):
            for response in answer.replay():
                self.respond(response)
            self.close(None)
        elif answer is not None:
            answer.attach(self)
        elif member is None:
            ticket = dispatch.submit(self.request, self)
            if not self.finished:
                self.ticket = ticket
            else:
                ticket.cancel()  # of an answer that was blocked
        else:
            self.leading = True
            member.compute(lambda sink: dispatch.submit(self.request, sink), self.computed)
            member.attach(self)

    def respond(self, response: Response) -> None:
        if self.finished:
            return
        try:
            for each in self.seen(response):
                self._give(each)
        except FairleadError as error:
            self._break_off(error)
        except Exception:
            log.exception("request_failed", model=self.model)
            self._break_off(ModelError("internal error"))

    def _break_off(self, error: FairleadError) -> None:
        ticket, self.ticket = self.ticket, None
        self.close(error)
        if ticket is not None:
            ticket.cancel()

    def close(self, error: FairleadError | None) -> None:
        if self.finished:
            return
        if error is None:
            try:
                for each in self.last():
                    self._give(each)
            except FairleadError as failure:
                error = failure
            except Exception:
                log.exception("request_failed", model=self.model)
                error = ModelError("internal error")
        if error is not None:
            error = self.told(error)
        self.ticket = None  # which knows this visit: only the garbage collector would free them
        self.finish(error)
        assert self.sink is not None
        self.sink.close(error)

    def cancel(self) -> None:
        if self.finished:
            return
        if self.task is not None:
            self.task.cancel()
        self._break_off(Cancelled("request was cancelled"))

    def pause(self) -> None:
        """The caller reads slowly."""
        if isinstance(self.ticket, Pausable):
            self.ticket.pause()

    def resume(self) -> None:
        if isinstance(self.ticket, Pausable):
            self.ticket.resume()

    def _give(self, response: Response) -> None:
        assert self.sink is not None
        self.sink.respond(response)

    # The other form

    def answers(self, answer: Answer | None) -> AsyncGenerator[Response, None]:
        """The responses: stored ones, or of whoever computes them."""
        if isinstance(answer, Stored):
            return replay(answer)
        if answer is not None:
            return answer.follow()
        responses, member = self.gateway.dispatch.infer(self.request), self.member
        if member is None:
            return responses
        self.leading = True
        member.compute_stream(responses, self.computed)
        return member.follow()

    # Up

    def seen(self, response: Response) -> Sequence[Response]:
        """What of a response goes on to the caller. Raises Filtered."""
        if self.recalled is not None and self.recalled.recorder is not None:
            self.recalled.recorder.add(response)
        if self.member is None:
            self._count(response)
        response.id = self.request.id  # not that of whom it was computed for
        if not self.answered:
            self.answered = True
            self.version = response.version
            self.status = response.status
            if self.headers:
                response.headers = {**response.headers, **self.headers}
        return (response,) if self.output is None else self.output.push(response)

    def _count(self, response: Response) -> None:
        delta = response.delta
        if delta is not None:
            self.num_tokens += len(delta.token_ids)
            if delta.usage is not None:
                self.usage = delta.usage
        elif response.usage is not None:
            self.usage = response.usage

    def last(self) -> Sequence[Response]:
        """What a filter still held back."""
        return () if self.output is None else self.output.finish()

    def told(self, error: FairleadError) -> FairleadError:
        """The error with what the caller is told of limits. A copy: others may hear of the same one."""
        if self.headers and not self.answered:
            error = error.saying(error.message)
            error.headers = {**self.headers, **error.headers}
        return error

    # The end

    def finish(self, error: FairleadError | None) -> None:
        """Its caller has all of it, or left, or was refused. Whatever its end, exactly once."""
        if self.finished:
            return
        self.finished, self.error = True, error
        recalled, settled = self.recalled, self.settled
        if recalled is not None and error is None and not self.reused:
            self.gateway.recalls.keep(recalled, self.course.policy.cache)
        if recalled is not None and recalled.member is not None:
            recalled.member.leave()  # the last one ends what it led: that settles it
        if settled:
            self.gateway.note(self)
        elif not self.leading:
            self.settle(error)

    def computed(self, error: FairleadError | None) -> None:
        """What it led is over, whether or not its own caller is still there."""
        self.leading = False
        assert self.member is not None
        for response in self.member.flight.responses:
            self._count(response)
        self.settle(error)

    def forget(self) -> None:
        """Its answer will be nobody else's."""
        member = self.member
        self.recalled = None
        if member is not None:
            member.give_up()

    @property
    def member(self) -> Member | None:
        """Of a flight that it leads or joined."""
        return None if self.recalled is None else self.recalled.member

    def settle(self, error: FairleadError | None) -> None:
        """Nothing more is computed: give back what was held and not used, and let the next one go. Written down is a request when
        its caller has heard the end, too."""
        if self.settled:
            return
        self.settled = True
        took = self._took(error)
        if took is not None:
            self.took = took
            self.compute_seconds = time.perf_counter() - self.started if self.started else 0.0
        if self.hold is not None or self.course.price is not FREE:
            self._pay(took)
        if self.item is not None and self.line is not None:
            self.gateway.leave(self.line, self.item, None if took is None else served_work(took.usage, took.rows))
        if self.finished:
            self.gateway.note(self)

    def _pay(self, took: Work | None) -> None:
        amounts: Amounts = {}
        if self.reused or (took is not None and took is not NO_WORK):
            amounts = self.amounts(self.took.usage, self.took.rows, self.compute_seconds)
            self.cost = amounts.get(MONEY, 0.0)
        if self.hold is None:
            return
        if took is None:
            self.hold.release(time.time())
        else:
            self.hold.settle(amounts or {Unit.REQUESTS: float(self.request.num_requests)}, time.time())

    def amounts(self, usage: Usage | None, rows: int, compute_seconds: float) -> Amounts:
        num_requests = self.request.num_requests
        return amounts_of(self.course.price, num_requests=num_requests, usage=usage, rows=rows, compute_seconds=compute_seconds)

    @property
    def num_rows(self) -> int:
        request = self.request
        if request.prompt is not None:
            return 0
        return request.raw.num_rows if request.raw is not None else request.num_rows

    def _took(self, error: FairleadError | None) -> Work | None:
        """What it used; NO_WORK: no more than a request may; None: nothing, it failed through no fault of the caller's."""
        if self.reused:
            return NO_WORK
        if self.status >= 400:  # another server's error
            return None if self.status == 429 or self.status >= 500 else NO_WORK
        left = bool(self.started) and isinstance(error, Cancelled)
        if not (error is None or self.answered or self.num_tokens or left):
            return NO_WORK if isinstance(error, CALLERS_FAULT) else None
        if self.usage is not None:
            return Work(self.usage, 0)
        asked = (self.work or self.gateway.estimate(self.request)).usage
        if asked is None:
            return Work(None, self.num_rows)
        return Work(Usage(prompt_tokens=asked.prompt_tokens, completion_tokens=self.num_tokens), 0)


def ended(error: FairleadError | None) -> tuple[str, str]:
    """(outcome, reason) of a request that ended so."""
    if error is None:
        return "success", ""
    if isinstance(error, Cancelled):
        return "cancelled", "cancelled"
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return "refused", reason
    if isinstance(error, Unavailable):
        return "refused", error.reason
    return "failure", "replica-died" if isinstance(error, ReplicaDied) else "model-error"


REASONS: dict[type[FairleadError], str] = {
    Filtered: "filtered",
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    NotFound: "not-found",
    NotStored: "not-stored",
    InvalidRequest: "invalid-request",
    Unsupported: "unsupported",
}


def last_text(request: Request) -> str:
    """What its user asked: the last message, or the text."""
    prompt = request.prompt
    if isinstance(prompt, Generate) and prompt.chat is not None:
        return (prompt.chat.messages[-1].content or "") if prompt.chat.messages else ""
    if isinstance(prompt, (Generate, Embed)):
        return prompt.text or ""
    if request.raw is not None:
        return bytes(request.raw.prefix[-2048:]).decode("utf-8", "replace")
    return ""


def status_of(error: FairleadError | None) -> int:
    """The kind of end, in HTTP's numbers, whatever the protocol."""
    if error is None:
        return 200
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return status
    return 500


CALLERS_FAULT = tuple(REASONS)

STATUSES: dict[type[FairleadError], int] = {
    Cancelled: 499,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    NotStored: 504,
    InvalidRequest: 400,
    Filtered: 400,
    Unsupported: 501,
    LimitExceeded: 429,
    Shed: 429,
    Unavailable: 503,
}


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[at : at + size] for at in range(0, len(texts), size))


def plain(text: str) -> str:
    """As much of what a caller wrote as every database takes."""
    text = text[:MAX_NAME_CHARS]
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def kind_of(request: Request) -> str:
    """What was asked."""
    if request.raw is not None:
        return request.raw.path.rpartition("/")[2]
    return "infer" if request.prompt is None else type(request.prompt).__name__.lower()


class _Resumed:
    """A coroutine that was begun without a task, to go on in one."""

    def __init__(self, steps: Coroutine[Any, Any, Answer | None], waits_for: Any) -> None:
        self.steps = steps
        self.waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Answer | None]:
        steps, waits_for = self.steps, self.waits_for
        step: Callable[[], Any]
        while True:
            try:
                value = yield waits_for
            except BaseException as error:
                step = partial(steps.throw, error)
            else:
                step = partial(steps.send, value)
            try:
                waits_for = step()
            except StopIteration as end:
                answer: Answer | None = end.value
                return answer
