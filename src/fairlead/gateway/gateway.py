"""The path that every request walks, whatever it asks for: read it from the top to the bottom.

    allow    this caller may use this model, in this class of service
    watch    its tenant is not blocked or throttled
    check    its texts pass the filters
    recall   an answer that is stored, or one that is being computed, will do
    hold     what it may take is reserved from every limit that applies
    turn     it waits for its turn before the model
    (dispatch: a version, a replica, another try; `instead`, where another model is to answer)
    seen     every response on its way back: usage, filters
    finish   the hold is settled, the next one's turn, the books

Who calls was found out at the door, before the body was read. A request that needs none of this is handed on at once.
`admit` is one coroutine for both forms of asking. It is driven here and now, without a task: what usually never waits costs
no hand-off. Only one that does wait becomes a task.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import numpy as np
import structlog
from msgspec import structs

from fairlead.core.caller import ANONYMOUS_TENANT, ANYONE, Caller
from fairlead.core.errors import (
    Cancelled,
    FairleadError,
    Filtered,
    Forbidden,
    InvalidRequest,
    ModelError,
    NotFound,
    Shed,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
)
from fairlead.core.generation import Embed, Generate, Paint, Picture
from fairlead.core.policy import Amounts, FilterPolicy, GatewaySettings, Unit, rules_of
from fairlead.core.request import Request, Response, Sink, Ticket
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import Tensors
from fairlead.gateway.abuse import Abuse
from fairlead.gateway.bodies import Bodies
from fairlead.gateway.books import Books, kind_of
from fairlead.gateway.course import Course, Courses
from fairlead.gateway.ends import CALLERS_FAULT, ended
from fairlead.gateway.estimate import Work, estimate, num_chars
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.moderation import above, by_label, check_classifier, text_rows
from fairlead.gateway.filters.pictures import check_picture_classifier, picture_row
from fairlead.gateway.identity.identity import may_use, qos_class_of
from fairlead.gateway.limits.ledger import AnyLimiter, Hold
from fairlead.gateway.limits.meter import Subject
from fairlead.gateway.queue import FairQueue, Waiting, degradation
from fairlead.gateway.recall import Answer, Recall, Recalled
from fairlead.gateway.reuse.keys import CHOOSES
from fairlead.gateway.reuse.response_cache import Stored
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.shadow import Shadows
from fairlead.gateway.upstreams import Upstreams
from fairlead.gateway.usage import UsageLog
from fairlead.gateway.visit import NO_WORK, Turn, Visit, come
from fairlead.gateway.watch import Watches
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import ModelRepository
from fairlead.runtime.version import Version
from fairlead.store.rows import AuditRow

log = structlog.get_logger("fairlead.gateway")

MAX_SUBJECTS = 10_000
"""Callers whose limits are kept ready."""
CLASSIFY_SECONDS = 10.0
ONE_REQUEST: Amounts = {Unit.REQUESTS: 1.0}
MANY_CHARS = 1 << 15
"""Of a request's texts: from here on a thread searches them."""


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
        self.abuse = abuse
        self.counts = counts
        self.note = Books(counts, abuse, usage, audit).note
        self.recalls = Recall(settings, repository, self.embed, counts)
        self.watches = Watches(dispatch)
        self.shadows = Shadows(dispatch, repository, counts, busy=self._busy)
        self._subjects: dict[tuple[str, str, str], tuple[Caller, tuple[Subject, ...]]] = {}
        self._timers: dict[FairQueue, asyncio.TimerHandle] = {}
        self.stopping = False
        self.bodies: Bodies | None = None
        """Where texts of a sample of requests are written to the log."""
        self.trace: Callable[[Request], None] | None = None
        """Called with every request that has a timeline, before anything is asked elsewhere for it."""

    def configure(self, settings: GatewaySettings, filters: dict[FilterPolicy, Filters]) -> None:
        """Other policies, from the next request on."""
        self.settings = settings
        self.courses.configure(settings, filters)
        self._subjects = {}

    # What the doors call

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """For a request with one response. Errors go to the sink, possibly before this returns."""
        course = self.courses[request.model]
        if (timeline := request.timeline) is not None:
            timeline.kind = kind_of(request)
            if self.trace is not None:
                self.trace(request)
        if self._free(request, course):
            if timeline is not None:
                timeline.tenant = ANONYMOUS_TENANT
            return self.dispatch.submit(request, sink)
        visit = Visit(self, course, request)
        visit.begin(sink)
        return visit

    async def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """The responses. Raises FairleadError; closing it cancels."""
        course = self.courses[request.model]
        if (timeline := request.timeline) is not None:
            timeline.kind = kind_of(request)
            if self.trace is not None:
                self.trace(request)
        if self._free(request, course):
            if timeline is not None:
                timeline.tenant = ANONYMOUS_TENANT
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
        return (
            request.caller is ANYONE
            and self.usage is None
            and request.booked is None
            and course.plain
            and not request.qos_class
            and not self.stopping
            and self.bodies is None
        )

    def find(self, name: str, version: str = "") -> Version:
        """Raises NotFound."""
        return self.repository.find(name, version)

    def remote(self, model: str) -> bool:
        """No version of it is here, but other servers compute it: its bodies go on as they come."""
        return bool(self.upstreams(model)) and not self.repository.versions(model)

    def passes(self, model: str, version: str) -> bool:
        """Other servers compute it, or engines of others: its bodies of OpenAI's protocol go on as they come."""
        return self.repository.external(model, version) or self.remote(model)

    def falls_back(self, model: str) -> bool:
        """A model that is here may answer in its place."""
        course = self.courses[model]
        return course.falls_back and any(self.repository.versions(name) for name in course.policy.routing.fallback)

    @property
    def any_remote(self) -> bool:
        return self.repository.any_external or bool(self.upstreams)

    def remote_models(self) -> list[str]:
        """Those of the OpenAI protocol."""
        return [name for name in self.upstreams.models() if self.remote(name) and self.upstreams(name)[0].openai]

    # What doors ask that have no model

    @asynccontextmanager
    async def counted(self, caller: Caller) -> AsyncGenerator[Mapping[str, str], None]:
        """Around a request that asks no model: what the head of its answer says. Its caller's limits count it as any other, and not at all
        where the server is at fault. It leaves no usage record. Raises FairleadError for one that is refused."""
        try:
            if self.stopping:
                raise ShuttingDown("Server is stopping")
            if self.abuse is not None and (error := self.abuse.decide(caller.tenant, time.monotonic())) is not None:
                raise error
            hold = await self.limits.ask(self.subjects(caller), ONE_REQUEST, time.time())
        except FairleadError as refusal:
            self.counts.add("fairlead_gateway_refused_total", "", ended(refusal)[1])
            raise
        try:
            yield hold.headers
        except CALLERS_FAULT:
            raise
        except BaseException:
            hold.release(time.time())
            raise
        finally:
            hold.settle(ONE_REQUEST, time.time())  # unless it was released

    # What jobs ask

    def welcome(self, request: Request) -> tuple[str, int]:
        """(class, priority) of a request that its caller will be answered later. Raises what would refuse it at once."""
        if request.timeline is not None:
            request.timeline.kind = kind_of(request)
            if self.trace is not None:
                self.trace(request)
        visit = Visit(self, self.courses[request.model], request)
        self.allow(visit)
        self.watch(visit)
        return visit.qos_class, visit.priority

    async def inspect(self, request: Request, picture: Picture) -> None:
        """Raises Filtered for one that the policy's classifier finds fault with."""
        course = self.courses[request.model]
        policy = request.caller.policy.filters or course.policy.filters
        if policy is None or policy.picture_moderation == "off":
            return
        model = policy.picture_moderation_model

        async def classify() -> Sequence[Mapping[str, float]]:
            spec = self.repository.find(model).spec
            labels = check_picture_classifier(spec)
            return await self.judge(spec, labels, await asyncio.to_thread(picture_row, spec, picture.data))

        for label in above(await self.moderated(model, classify()), policy.moderation_threshold):
            rule = f"picture:{label}"
            self.counts.add("fairlead_gateway_flagged_total", course.label, rule)
            if policy.picture_moderation == "block":
                raise Filtered("the picture is withheld by a filter", rule, answer=True)

    # Down

    async def admit(self, visit: Visit) -> Answer | None:
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

    def allow(self, visit: Visit) -> None:
        request, caller = visit.request, visit.caller
        if (timeline := request.timeline) is not None:
            timeline.tenant, timeline.key = caller.tenant, caller.key
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
        if timeline is not None:
            timeline.qos_class = visit.qos_class
            timeline.note(time.perf_counter(), "admitted", {"class": visit.qos_class, "priority": visit.priority})
        prompt = request.prompt
        if isinstance(prompt, Paint):
            request.prompt = structs.replace(prompt, tenant=caller.tenant)
        elif caller is not ANYONE and isinstance(prompt, Generate):
            request.prompt = structs.replace(prompt, salt=caller.tenant)

    def watch(self, visit: Visit) -> None:
        """A refused one is not noted: that would keep it refused."""
        if self.abuse is not None and (error := self.abuse.decide(visit.caller.tenant, time.monotonic())) is not None:
            visit.watched = False
            raise error

    async def check(self, visit: Visit, policy: FilterPolicy) -> None:
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
        flagged = list(found.flagged)
        if filters.moderates:
            await visit.in_task()
            flagged += await filters.moderate(checked, self.moderate)
        for rule in flagged:
            self.counts.add("fairlead_gateway_flagged_total", visit.course.label, rule)
        if request.timeline is not None:
            request.timeline.note(time.perf_counter(), "checked", {"flagged": flagged})
        # in place: its door reads there how many rows it had
        request.inputs, request.prompt, request.raw, request.parameters = checked.inputs, checked.prompt, checked.raw, checked.parameters
        visit.output = filters.output(stream=visit.sink is None, also=visit.output)

    async def moderate(self, model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        """For each text the labels' probabilities. Raises Unavailable: whatever is wrong with the classifier, its caller did right."""
        return await self.moderated(model, self.classify(model, texts))

    async def moderated(self, model: str, judging: Coroutine[Any, Any, Sequence[Mapping[str, float]]]) -> Sequence[Mapping[str, float]]:
        """What it gives. Raises Unavailable where it fails."""
        try:
            async with asyncio.timeout(CLASSIFY_SECONDS):
                return await judging
        except TimeoutError:
            error = f"no answer within {CLASSIFY_SECONDS:g} s"
        except (FairleadError, ValueError) as failure:
            error = str(failure)
        log.warning("not_moderated", model=model, error=error)
        raise Unavailable("the texts of this request could not be moderated: try again later")

    async def classify(self, model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        """By a served model that takes a text in each row. Raises FairleadError."""
        spec = self.repository.find(model).spec
        labels = check_classifier(spec)
        found: list[Mapping[str, float]] = []
        for some in batched(texts, spec.batching.max_batch_size or len(texts)):
            found += await self.judge(spec, labels, text_rows(spec, some))
        if len(found) != len(texts):
            raise ModelError(f"model '{model}' judged {len(found)} of {len(texts)} texts")
        return found

    async def judge(self, spec: ModelSpec, labels: Sequence[str], inputs: Tensors) -> Sequence[Mapping[str, float]]:
        """Raises FairleadError."""
        found: list[Mapping[str, float]] = []
        request = Request(model=spec.name, inputs=inputs, arrived=time.perf_counter())
        async with aclosing(self.dispatch.infer(request)) as responses:
            async for response in responses:
                found += by_label(labels, response.outputs[spec.outputs[0].name])
        return found

    async def embed(self, model: str, text: str) -> np.ndarray:
        """By a served embedder. Raises FairleadError."""
        request = Request(model=model, prompt=Embed(text=text), arrived=time.perf_counter())
        async with aclosing(self.dispatch.infer(request)) as responses:
            async for response in responses:
                if response.delta is not None and response.delta.vector:
                    return np.frombuffer(response.delta.vector, "<f4")
        raise ModelError(f"model '{model}' gave no vector")

    async def recall(self, visit: Visit) -> Answer | None:
        policy, request = visit.course.policy, visit.request
        fixed = bool(request.version) or not self.dispatch.splits(request.model)
        found = visit.recalled = Recalled()
        await self.recalls.look(found, request, policy.cache, policy.queue.max_wait, visit.in_task, fixed=fixed)
        visit.headers.update(found.headers)
        if found.answer is not None:
            visit.reused = True
            if request.timeline is not None:
                request.timeline.note(time.perf_counter(), "reused", {"outcome": found.headers.get("x-fairlead-cache", "hit")})
            await self.hold(visit)
        return found.answer

    async def hold(self, visit: Visit) -> None:
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
            if (timeline := visit.request.timeline) is not None:
                timeline.note(time.perf_counter(), "held", {"limits": len(subjects)})

    def estimate(self, request: Request) -> Work:
        batches = True
        if request.inputs:
            with suppress(FairleadError):
                batches = self.find(request.model, request.version).spec.batches
        return estimate(request, self.settings.limits.output_tokens, batches=batches)

    def subjects(self, caller: Caller, course: Course | None = None) -> tuple[Subject, ...]:
        """Everything whose limits a request of this caller counts against. `course`: None for one that asks no model."""
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
        return found[1] if course is None or course.subject is None else (*found[1], course.subject)

    async def turn(self, visit: Visit) -> Answer | None:
        """Returns an answer that will do although it is old, where the policy allows that for such a wait."""
        queue = visit.course.queue
        assert queue is not None and visit.work is not None
        now = time.perf_counter()
        steps = visit.course.policy.queue.degrade
        if steps and queue.num_waiting:
            stored = await self.degrade(visit, queue, now)
            if stored is not None:
                return stored
            queue = visit.course.queue
            if queue is None:
                return None
            now = time.perf_counter()
        item = Turn(visit, visit.work, now)
        offered = queue.offer(item, now)
        visit.item, visit.line = item, queue
        if offered.evicted is not None:
            assert isinstance(offered.evicted, Turn)
            retry_after = queue.retry_after(offered.evicted, now)
            offered.evicted.refuse(Shed("another request took its place in the line", reason="evicted", retry_after=retry_after))
        timeline = visit.request.timeline
        if not offered.turn:
            if timeline is not None:
                timeline.note(now, "queued", {"ahead": queue.num_waiting - 1, "in_flight": queue.num_in_flight})
            self._arm(queue)
            await item.comes()
        if timeline is not None:
            timeline.note(time.perf_counter(), "turn")
        return None

    async def degrade(self, visit: Visit, queue: FairQueue, now: float) -> Stored | None:
        """Ask for less, where the policy says so for such a wait. Returns an old answer, if that is what there is to be."""
        wait = self._wait(visit, queue, now)
        step = degradation(visit.course.policy.queue.degrade, visit.qos_class, wait)
        if step is None:
            return None
        stored = self.recalls.stale(visit.recalled) if step.cached else None
        if stored is not None:
            visit.reused = True
            visit.headers |= {**stored.headers("stale", time.time()), "x-fairlead-degraded": "cached"}
            self.counts.add("fairlead_gateway_reused_total", visit.course.name, "stale")
            if visit.request.timeline is not None:
                visit.request.timeline.note(now, "reused", {"outcome": "stale"})
            return stored
        request, done = visit.request, []
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
            visit.work = self.estimate(request)
        if step.model is not None and self.dispatch.knows(step.model):
            course = self.courses[step.model]
            other = course.queue
            sooner = other is None or (other.has_room and self._wait(visit, other, now) < min(wait, other.shed_wait))
            if sooner and await self.stand_in(visit, course):
                request.model, request.version = step.model, ""
                visit.course = course
                visit.work = self.estimate(request)
                done.insert(0, f"model={step.model}")
        if done:
            visit.forget()  # what is computed now is no answer to what was asked
            visit.headers["x-fairlead-degraded"] = ", ".join(done)
            if request.timeline is not None:
                request.timeline.note(now, "degraded", {"what": ", ".join(done)})
            self.counts.add("fairlead_gateway_degraded_total", visit.course.name, visit.qos_class)
        return None

    # Instead of the model that was asked for

    async def stand_in(self, visit: Visit, course: Course) -> bool:
        """Whether another model may answer: what that one asks of requests of its own holds for this one, too, and is held."""
        policy, request = course.policy, visit.request
        if not may_use(visit.caller, course.name) or (policy.require_signature and not request.signed_by):
            return False
        hold: Hold | None = None
        try:
            if course.subject is not None:
                work = visit.work or self.estimate(request)
                subjects, amounts, now = (course.subject,), visit.amounts(work.usage, work.rows, 0.0), time.time()
                hold = self.limits.hold(subjects, amounts, now)
                if hold is None:
                    await visit.in_task()
                    hold = await self.limits.ask(subjects, amounts, now)
            if policy.filters not in (None, visit.course.policy.filters) and visit.caller.policy.filters is None:
                if visit.leading:
                    raise Unavailable("whoever has joined this request would get the answer past these filters")
                await self.check(visit, policy.filters)
        except BaseException as error:
            if hold is not None:
                hold.release(time.time())
            if not isinstance(error, FairleadError):
                raise
            log.debug("not_instead", model=request.model, instead=course.name, error=error.message)
            return False
        visit.lend(hold)
        return True

    def instead(self, visit: Visit, model: str) -> bool:
        """Whether a fallback may be asked now. One that would have to be waited for may not: this is called in the middle of a
        dispatch, in whatever callback or task that is."""
        course = self.courses[model]
        queue = course.queue
        if visit.settled or (queue is not None and not queue.free):
            return False
        visit.taskless = True
        steps = self.stand_in(visit, course)
        try:
            steps.send(None)
        except StopIteration as end:
            if not end.value:
                return False
        except Exception:
            log.exception("not_instead", model=visit.model, instead=model)
            return False
        else:
            steps.close()
            return False
        self._change_line(visit, queue)
        return True

    def _change_line(self, visit: Visit, queue: FairQueue | None) -> None:
        """Its turn at the one model is over, at the other it has one at once."""
        item, line = visit.item, visit.line
        visit.item = visit.line = None
        if item is not None and line is not None:
            self.leave(line, item, None)
        if queue is not None:
            now = time.perf_counter()
            visit.item, visit.line = Turn(visit, visit.work or self.estimate(visit.request), now), queue
            offered = queue.offer(visit.item, now)
            assert offered.turn

    # The waiting lines

    def _busy(self, model: str) -> bool:
        """Requests wait for it, or will not be answered much longer."""
        queue = self.courses.queues.get(model)
        return self.stopping or (queue is not None and bool(queue.num_waiting))

    def _wait(self, visit: Visit, queue: FairQueue, now: float) -> float:
        """As it seems."""
        return queue.predicted_wait(visit.priority, visit.caller.tenant, visit.caller.policy.weight, now)

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


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[at : at + size] for at in range(0, len(texts), size))
