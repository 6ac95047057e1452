"""One request on its way through the gateway: what it asked, what is held for it, how it ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from fairlead.core.errors import Cancelled, FairleadError, ModelError
from fairlead.core.generation import Usage
from fairlead.core.policy import Amounts, Unit
from fairlead.core.request import Pausable, Request, Response, Sink, Ticket
from fairlead.core.timeline import Timeline
from fairlead.gateway.bodies import Bodies, Sample
from fairlead.gateway.course import Course
from fairlead.gateway.ends import CALLERS_FAULT, ended
from fairlead.gateway.estimate import Work
from fairlead.gateway.filters.output import OutputFilter
from fairlead.gateway.limits.ledger import Hold
from fairlead.gateway.limits.price import FREE, MONEY, amounts_of
from fairlead.gateway.queue import FairQueue, Waiting, served_work
from fairlead.gateway.recall import Answer, Recall, Recalled, replay
from fairlead.gateway.reuse.response_cache import Stored
from fairlead.gateway.reuse.single_flight import Member
from fairlead.gateway.routing.dispatch import Dispatch

log = structlog.get_logger("fairlead.gateway")

NO_WORK = Work(None, 0)


class Way(Protocol):
    """What a visit asks of the gateway."""

    dispatch: Dispatch
    recalls: Recall
    bodies: Bodies | None

    @property
    def note(self) -> "Callable[[Visit], None]": ...

    async def admit(self, visit: "Visit") -> Answer | None: ...

    def estimate(self, request: Request) -> Work: ...

    def instead(self, visit: "Visit", model: str) -> bool: ...

    def leave(self, queue: FairQueue, item: Waiting, served: float | None) -> None: ...


class Turn(Waiting):
    """A visit in a waiting line."""

    __slots__ = ("_coming",)

    def __init__(self, visit: "Visit", work: Work, now: float) -> None:
        usage, timeout = work.usage, visit.request.timeout
        super().__init__(
            tenant=visit.caller.tenant,
            priority=visit.priority,
            weight=visit.caller.policy.weight,
            work=served_work(usage, work.rows),
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
    lent: Hold | None = None
    """Of the limits of a model that stands in."""
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
    """As its engine told; else all the time from its turn on."""
    sample: Sample | None = None
    """Of the texts that are written to the log."""
    # of the callback form
    taskless = False
    """`begin` drives it, in whatever task or callback that was called."""
    sink: Sink | None = None
    ticket: Ticket | None = None
    task: asyncio.Task[None] | None = None

    def __init__(self, gateway: Way, course: Course, request: Request) -> None:
        self.gateway = gateway
        self.course = course
        self.request = request
        self.caller = request.caller
        self.model = request.model
        """As it was asked for."""
        self.arrived = request.arrived or time.perf_counter()
        self.headers: dict[str, str] = {}
        """What the answer's head says of how it came about."""
        if gateway.bodies is not None:
            self.sample = gateway.bodies.begin(request.model)

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
            log.exception("request_failed", model=self.model, request_id=self.request.log_id)
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
            log.exception("request_failed", model=self.model, request_id=self.request.log_id)
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
            ticket = dispatch.submit(self.request, self, self.instead if self.course.falls_back else None)
            if not self.finished:
                self.ticket = ticket
            else:
                ticket.cancel()  # of an answer that was blocked
        else:
            self.leading = True
            member.compute(lambda sink: dispatch.submit(self.request, sink, self.instead), self.computed)
            member.attach(self)

    def respond(self, response: Response) -> None:
        if self.finished:
            return
        try:
            given = self.seen(response)
            assert self.sink is not None
            for each in given:
                self.sink.respond(each)
        except FairleadError as error:
            self._break_off(error)
        except Exception:
            log.exception("request_failed", model=self.model, request_id=self.request.log_id)
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
                assert self.sink is not None
                for each in self.last():
                    self.sink.respond(each)
            except FairleadError as failure:
                error = failure
            except Exception:
                log.exception("request_failed", model=self.model, request_id=self.request.log_id)
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

    # The other form

    def answers(self, answer: Answer | None) -> AsyncGenerator[Response, None]:
        """The responses: stored ones, or of whoever computes them."""
        if isinstance(answer, Stored):
            return replay(answer)
        if answer is not None:
            return answer.follow()
        responses, member = self.gateway.dispatch.infer(self.request, self.instead if self.course.falls_back else None), self.member
        if member is None:
            return responses
        self.leading = True
        member.compute_stream(responses, self.computed)
        return member.follow()

    def instead(self, model: str) -> bool:
        """Whether this fallback may be asked."""
        return self.gateway.instead(self, model)

    def lend(self, hold: Hold | None) -> None:
        """Of a model that stands in; what was held of the one before it is not needed any more."""
        if self.lent is not None:
            self.lent.release(time.time())
        self.lent = hold

    # Up

    def seen(self, response: Response) -> Sequence[Response]:
        """What of a response goes on to the caller. Raises Filtered."""
        recalled = self.recalled
        if recalled is not None and recalled.recorder is not None:
            recalled.recorder.add(response)
        if recalled is None or recalled.member is None:
            self._count(response)
        response.id = self.request.id  # not that of whom it was computed for
        if not self.answered:
            self.answered = True
            self.version = response.version
            self.status = response.status
            if self.headers:
                response.headers = {**response.headers, **self.headers}
        given = (response,) if self.output is None else self.output.push(response)
        if self.sample is not None:
            self.sample.add(given)
        return given

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
        given = () if self.output is None else self.output.finish()
        if self.sample is not None:
            self.sample.add(given)
        return given

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
        if self.sample is not None and self.gateway.bodies is not None:
            self.gateway.bodies.finished(self, self.sample)
        if self.request.timeline is not None:
            self._tell(self.request.timeline, error)
        recalled, settled = self.recalled, self.settled
        if recalled is not None and error is None and not self.reused:
            self.gateway.recalls.keep(recalled, self.course.policy.cache)
        if recalled is not None and recalled.member is not None:
            recalled.member.leave()  # the last one ends what it led: that settles it
        if settled:
            self.gateway.note(self)
        elif not self.leading:
            self.settle(error)

    def _tell(self, timeline: Timeline, error: FairleadError | None) -> None:
        """How it ended for its caller. Of several prompts of one request, the first that went wrong counts."""
        if timeline.outcome not in ("", "success"):
            return
        outcome, reason = ended(error)
        if error is None and self.status >= 400:
            outcome, reason = "failure", "upstream-error"
        now = time.perf_counter()
        if self.output is not None and self.output.rules:
            timeline.note(now, "filtered", {"rules": list(self.output.rules)})
        if outcome == "refused":
            timeline.note(now, "refused", {"reason": reason})
        elif outcome == "cancelled":
            timeline.note(now, "left")
        timeline.outcome, timeline.reason = outcome, reason

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
            told = 0.0 if took.usage is None else took.usage.compute_seconds
            self.compute_seconds = told or (time.perf_counter() - self.started if self.started else 0.0)
        if self.hold is not None or self.lent is not None or self.course.price is not FREE:
            self._pay(took)
        timeline = self.request.timeline
        if timeline is not None and not timeline.ended:
            timeline.cost += self.cost
            if self.usage is None and self.took.usage is not None:
                timeline.used(self.took.usage)  # as far as it came: whoever tells its usage has told it there
        if self.item is not None and self.line is not None:
            self.gateway.leave(self.line, self.item, None if took is None else served_work(took.usage, took.rows))
        if self.finished:
            self.gateway.note(self)

    def _pay(self, took: Work | None) -> None:
        amounts: Amounts = {}
        if self.reused or (took is not None and took is not NO_WORK):
            amounts = self.amounts(self.took.usage, self.took.rows, self.compute_seconds)
            self.cost = amounts.get(MONEY, 0.0)
        for hold in (self.hold, self.lent):
            if hold is None:
                continue
            if took is None:
                hold.release(time.time())
            else:
                hold.settle(amounts or {Unit.REQUESTS: float(self.request.num_requests)}, time.time())

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
