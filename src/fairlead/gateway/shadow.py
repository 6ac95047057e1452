"""Copies of requests that another version answers, too, so that the two answers can be compared; and examples of both, recorded.

What a copy is of was answered well before anything is copied. A copy is a request of nobody: it is in no book, against no limit, in no
window and in no waiting line, and of the lowest priority. Where it would have to wait there is none.
"""

import asyncio
import random as random_module
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from copy import copy

import numpy as np
import structlog
from msgspec import Struct, structs

from fairlead.core.errors import FairleadError, NotFound, Unavailable
from fairlead.core.generation import Chat, Generate, Message, Paint, Prompt, Sampling
from fairlead.core.request import Request, Response
from fairlead.core.tensors import Tensors
from fairlead.core.watch import Pair, ShadowRule, request_nbytes, response_nbytes
from fairlead.gateway.routing.dispatch import Dispatch
from fairlead.gateway.routing.onlooker import Look, Onlooker
from fairlead.gateway.routing.trip import Trip
from fairlead.observe.counts import Counts
from fairlead.runtime.repository import ModelRepository

log = structlog.get_logger("fairlead.gateway")

MAX_WAITING = 256
"""Pairs and examples that nobody has read yet."""
MAX_WAITING_BYTES = 64 << 20
READ_SECONDS = 0.05
"""Between two times that they are read."""
PAUSE = 0.002
"""Seconds before a copy is asked for: who just got the answer reads it first, and whoever else came meanwhile."""
LOWEST = (1 << 31) + 1
"""The priority of copies, where the model declares no levels: behind whatever names none."""
COPIES = "fairlead_shadow_copies_total"

Offer = Callable[[Request, Sequence[Response]], None]
"""Takes a request and the whole answer to it, in a thread. Nothing in them is shared with anybody, but who asked is still in there."""


class Recording(Struct, frozen=True):
    """A share of a model's requests that are answered well is offered to somebody."""

    offer: Offer
    share: float = 1.0
    max_bytes: int = 1 << 20
    """Of one request and its answer together."""
    champion: Callable[[], str] = lambda: ""
    """The version whose answers are offered; "": any. Asked for each request, since another one may be promoted meanwhile."""


class Shadows:
    """Called from the event loop only, but for `on_pair`."""

    def __init__(
        self,
        dispatch: Dispatch,
        repository: ModelRepository,
        counts: Counts,
        *,
        busy: Callable[[str], bool],
        random: Callable[[], float] = random_module.random,
        on_pair: Callable[[Pair], None] | None = None,
    ) -> None:
        """`busy`: whether requests wait for a model. `on_pair`: called in one thread; None: pairs are thrown away."""
        self.dispatch = dispatch
        self.repository = repository
        self.random = random
        self.busy = busy
        self.on_pair = on_pair
        self.stopping = False
        self._counts = counts
        self._shadowed: dict[str, Shadowed] = {}
        self._rules: dict[str, ShadowRule] = {}
        self._recordings: dict[str, Recording] = {}
        self._in_flight: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: list[Callable[[], None]] = []
        self._waiting_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reading: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "shadow")
        dispatch.looks_of.append(self._shadowed.get)

    # What control asks

    def set(self, rules: Mapping[str, ShadowRule]) -> None:
        """From now on these, and no others. Copies under way go on."""
        if self._rules != rules:
            self._rules = dict(rules)
            self._changed()

    def record(self, model: str, recording: Recording | None) -> None:
        """None: no more."""
        self._recordings.pop(model, None)
        if recording is not None:
            self._recordings[model] = recording
        self._changed()

    def _changed(self) -> None:
        self._shadowed.clear()
        for model in self._rules.keys() | self._recordings.keys():
            self._shadowed[model] = Shadowed(self, model, self._rules.get(model), self._recordings.get(model))
        self.dispatch.look_again()

    @property
    def num_in_flight(self) -> int:
        """Copies under way, or about to be."""
        return self._in_flight.total()

    @property
    def reading(self) -> bool:
        """Something waits to be read, or is."""
        return self._timer is not None or (self._reading is not None and not self._reading.done())

    async def stop(self) -> None:
        """Copies under way are given up, pairs that nobody has read are thrown away."""
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._waiting = None, []
        self._thread.shutdown(wait=False, cancel_futures=True)

    # What a captured request comes to

    def captured(self, shadowed: "Shadowed", capture: "Capture") -> None:
        """It was answered well, and its caller is about to have the answer: whatever can wait is done later."""
        model, rule, recording = shadowed.model, shadowed.rule, shadowed.recording
        if capture.recorded and recording is not None and capture.nbytes <= recording.max_bytes:
            request, responses, offer = capture.nobodys(), tuple(capture.responses), recording.offer
            self._read(lambda: offer(request, responses), capture.nbytes)
        if not capture.copied or rule is None:
            return
        if capture.nbytes > rule.max_bytes:
            self.count(model, "large")
        elif self._in_flight[model] >= rule.max_in_flight or len(self._waiting) >= MAX_WAITING:
            self.count(model, "full")
        else:
            self._in_flight[model] += 1
            asyncio.get_running_loop().call_later(PAUSE, self._begin, rule, capture)

    def _begin(self, rule: ShadowRule, capture: "Capture") -> None:
        model = capture.request.model
        why = self._not_now(rule, model)
        if why:
            self._in_flight[model] -= 1
            self.count(model, why)
            return
        task = asyncio.get_running_loop().create_task(self._copy(rule, capture), name="shadow")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _not_now(self, rule: ShadowRule, model: str) -> str:
        """Why there is no copy; "": there is one."""
        versions = self.repository.versions(model)
        if rule.version not in versions:
            return "missing"
        if self.stopping or self.busy(model) or any(self.repository.find(model, each).metrics.queue()[0] for each in versions):
            return "busy"
        return ""

    def count(self, model: str, outcome: str) -> None:
        self._counts.add(COPIES, model, outcome)

    async def _copy(self, rule: ShadowRule, capture: "Capture") -> None:
        asked, version, answer, salt = capture.nobodys(), capture.version, tuple(capture.responses), salt_of(capture.request)
        model, error, scores = asked.model, "", None
        responses: list[Response] = []
        began, ended = time.perf_counter(), 0.0
        try:
            async with asyncio.timeout(rule.timeout):
                await self._ask(self._request(asked, rule, rule.version, salted(asked.prompt, salt)), responses, rule.max_bytes)
                ended = time.perf_counter()
                scored = salted(scoring(asked.prompt, answer), salt) if rule.score else None
                if scored is not None:
                    scores = (await self._score(asked, rule, version, scored), await self._score(asked, rule, rule.version, scored))
        except TimeoutError:
            if ended:
                self.count(model, "refused")  # nobody scored it in time: the pair says less than others
                return
            error = f"no answer within {rule.timeout:g} s"
        except (NotFound, Unavailable):
            # It does not fail: it had no time, or is not there any more.
            self.count(model, "refused")
            return
        except FairleadError as failure:
            error = f"{type(failure).__name__}: {failure.message}"
        except TooMuch:
            self.count(model, "large")
            return
        except Exception:
            log.exception("shadow_not_asked", model=model)
            self.count(model, "refused")
            return
        finally:
            self._in_flight[model] -= 1
        self.count(model, "failed" if error else "answered")
        pair = Pair(
            model=model,
            request=asked,
            champion_version=version,
            candidate_version=rule.version,
            champion=answer,
            candidate=() if error else tuple(responses),
            error=error,
            champion_seconds=capture.seconds,
            candidate_seconds=(ended or time.perf_counter()) - began,
            scores=scores,
        )
        on_pair = self.on_pair
        if on_pair is not None and not self._read(lambda: on_pair(pair), pair.nbytes):
            self.count(model, "unread")

    async def _ask(self, request: Request, into: list[Response], max_bytes: int) -> None:
        """Raises FairleadError, TooMuch."""
        nbytes = 0
        async with aclosing(self.dispatch.infer(request)) as responses:
            async for response in responses:
                nbytes += response_nbytes(response)
                if nbytes > max_bytes:
                    raise TooMuch
                if response.status >= 400:
                    raise Unavailable(f"another server answered with {response.status}")
                into.append(kept(response))

    async def _score(self, asked: Request, rule: ShadowRule, version: str, prompt: Prompt) -> Response:
        """Raises FairleadError."""
        responses: list[Response] = []
        await self._ask(self._request(asked, rule, version, prompt), responses, 16 * rule.max_bytes)
        return responses[0]

    def _request(self, asked: Request, rule: ShadowRule, version: str, prompt: Prompt | None) -> Request:
        levels = self.repository.find(asked.model, version).spec.batching.priority_levels
        return Request(
            model=asked.model,
            version=version,
            inputs=asked.inputs,
            prompt=prompt,
            outputs=asked.outputs,
            parameters=asked.parameters,
            priority=levels or LOWEST,
            timeout=rule.timeout,
            arrived=time.perf_counter(),
            num_requests=0,
        )

    # The thread that reads

    def _read(self, work: Callable[[], None], nbytes: int) -> bool:
        """Whether there was room for it to wait."""
        if len(self._waiting) >= MAX_WAITING or nbytes + self._waiting_bytes > MAX_WAITING_BYTES:
            return False
        self._waiting.append(work)
        self._waiting_bytes += nbytes
        if self._timer is None:
            # Some together: a thread that wakes for each takes more from the event loop than what it does there.
            self._timer = asyncio.get_running_loop().call_later(READ_SECONDS, self._read_all)
        return True

    def _read_all(self) -> None:
        self._timer = None
        if self._reading is not None and not self._reading.done():
            self._timer = asyncio.get_running_loop().call_later(READ_SECONDS, self._read_all)
            return
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._reading = self._thread.submit(self._work, waiting)

    def _work(self, waiting: list[Callable[[], None]]) -> None:
        for work in waiting:
            if self.stopping:
                return
            try:
                work()
            except Exception:
                log.exception("shadow_not_read")
            time.sleep(0)  # whoever answers requests goes first


class TooMuch(Exception):
    """The candidate's answer is larger than what is kept."""


class Shadowed(Look):
    """One model whose requests are copied, recorded, or both."""

    def __init__(self, shadows: Shadows, model: str, rule: ShadowRule | None, recording: Recording | None) -> None:
        self.shadows = shadows
        self.model = model
        self.rule = rule
        self.recording = recording

    def begin(self, request: Request, version: str, trip: Trip | None) -> "Capture | None":
        shadows, rule, recording = self.shadows, self.rule, self.recording
        copied = rule is not None and version != rule.version and shadows.random() < rule.share
        recorded = recording is not None and recording.champion() in ("", version) and shadows.random() < recording.share
        if not (copied or recorded) or shadows.stopping:
            return None
        max_bytes = max(rule.max_bytes if rule is not None else 0, recording.max_bytes if recording is not None else 0)
        nbytes = request_nbytes(request)
        # A body that is passed on as it came; beside what was read of it, it is for other servers only.
        passed_on = request.raw is not None and request.prompt is None and not request.inputs
        if passed_on or nbytes > max_bytes:
            if copied:
                shadows.count(self.model, "elsewhere" if passed_on else "large")
            return None
        return Capture(self, request, version, trip, copied=copied, recorded=recorded, nbytes=nbytes, max_bytes=max_bytes)


class Capture(Onlooker):
    """One request, and its answer as it goes by."""

    __slots__ = (
        "_began",
        "_max_bytes",
        "_shadowed",
        "_trip",
        "copied",
        "inputs",
        "nbytes",
        "recorded",
        "request",
        "responses",
        "seconds",
        "version",
    )

    def __init__(
        self,
        shadowed: Shadowed,
        request: Request,
        version: str,
        trip: Trip | None,
        *,
        copied: bool,
        recorded: bool,
        nbytes: int,
        max_bytes: int,
    ) -> None:
        self._shadowed = shadowed
        self._trip = trip
        self.request = request
        self.version = version
        self.copied = copied
        self.recorded = recorded
        self.nbytes = nbytes
        self.responses: list[Response] = []
        # What may be written to is copied before the model has it in hand; a view of a body cannot be.
        self.inputs = owned(request.inputs) if any(array.flags.writeable for array in request.inputs.values()) else {}
        self._max_bytes = max_bytes
        self.seconds = 0.0
        """That its answer took."""
        self._began = time.perf_counter()

    def respond(self, response: Response) -> None:
        # Its reader may change the pieces of a text, and gives tensors back; the tensors are copied when it has them.
        own = thin(response)
        self.sink.respond(response)
        self._keep(own)

    def saw(self, response: Response) -> None:
        self._keep(thin(response))

    def _keep(self, response: Response) -> None:
        if self.nbytes > self._max_bytes:
            return
        self.nbytes += response_nbytes(response)
        if self.nbytes > self._max_bytes or response.status >= 400 or response.raw is not None:
            self.nbytes = self._max_bytes + 1
            self.responses.clear()
            return
        response.outputs = owned(response.outputs)
        self.responses.append(response)

    def ended(self, error: FairleadError | None) -> None:
        trip = self._trip
        if error is not None or (trip is not None and trip.fell_back):
            return
        self.seconds = time.perf_counter() - self._began
        self.inputs = self.inputs or owned(self.request.inputs)
        self._shadowed.shadows.captured(self._shadowed, self)

    def nobodys(self) -> Request:
        """What was asked, and not by whom. Its ids stay: feedback names them."""
        request = self.request
        return Request(
            model=request.model,
            inputs=self.inputs,
            prompt=salted(request.prompt, ""),
            id=request.id,
            log_id=request.log_id,
            outputs=request.outputs,
            parameters=dict(request.parameters),
            num_rows=request.num_rows,
        )


def thin(response: Response) -> Response:
    """One that its reader does not change; the tensors are still the same."""
    own = copy(response)
    own.outputs = dict(response.outputs)
    own.headers = {}
    if own.delta is not None:
        delta = own.delta = copy(own.delta)
        delta.token_ids = list(delta.token_ids)
        delta.tool_calls = [copy(call) for call in delta.tool_calls]
    return own


def kept(response: Response) -> Response:
    own = thin(response)
    own.outputs = owned(own.outputs)
    return own


def owned(tensors: Tensors) -> Tensors:
    """What arrays look at may be a whole batch, or be used again."""
    return {name: np.array(array, order="C") for name, array in tensors.items()}


def salt_of(request: Request) -> str:
    return request.prompt.salt if isinstance(request.prompt, Generate) else ""


def salted(prompt: Prompt | None, salt: str) -> Prompt | None:
    """What of a prompt a copy asks: all at once, nobody's, and beside no other tenant's blocks."""
    if isinstance(prompt, Generate):
        return structs.replace(prompt, salt=salt, stream=False)
    return structs.replace(prompt, tenant="", preview_steps=0) if isinstance(prompt, Paint) else prompt


def scoring(prompt: Prompt | None, answer: Sequence[Response]) -> Prompt | None:
    """What asks how likely this answer is; None where it is no text, or several."""
    if not isinstance(prompt, Generate) or prompt.sampling.n != 1:
        return None
    deltas = [response.delta for response in answer if response.delta is not None]
    text = "".join(delta.text for delta in deltas)
    token_ids = [token for delta in deltas for token in delta.token_ids]
    sampling = Sampling(max_tokens=0, prompt_logprobs=0, temperature=0.0)
    if prompt.token_ids is not None and token_ids:
        return Generate(token_ids=[*prompt.token_ids, *token_ids], sampling=sampling, adapter=prompt.adapter)
    if not text or any(delta.reasoning or delta.tool_calls for delta in deltas):  # the text alone is not what was written
        return None
    if prompt.chat is not None:
        return Generate(chat=continued(prompt.chat, text), sampling=sampling, adapter=prompt.adapter)
    whole = (prompt.text or "") + text
    return Generate(text=whole, add_special_tokens=prompt.add_special_tokens, sampling=sampling, adapter=prompt.adapter)


def continued(chat: Chat, text: str) -> Chat:
    """The conversation with this answer, as if it went on from there."""
    messages = list(chat.messages)
    if chat.continue_final_message and messages:
        messages[-1] = structs.replace(messages[-1], content=(messages[-1].content or "") + text)
    else:
        messages.append(Message(role="assistant", content=text))
    return structs.replace(chat, messages=messages, add_generation_prompt=False, continue_final_message=True)
