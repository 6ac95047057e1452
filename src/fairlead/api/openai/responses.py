"""OpenAI's Responses API: answers that are kept, go on from each other, and may be computed in the background."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Literal

import msgspec
import structlog
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from fairlead.api.line import AccessLine
from fairlead.api.openai.door import Door, Elsewhere, adapted, answered, delta_of, left
from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.responses_bodies import ENCRYPTED, ConversationBody, CountBody, ResponseBody
from fairlead.api.openai.responses_events import Answering, ResponseErrors, ResponseObject, StreamErrors, decoded, replayed
from fairlead.api.openai.responses_items import Conversation, Item, items_of, new_id, resolved
from fairlead.api.openai.responses_kept import Kept, Running, no_such_response
from fairlead.api.openai.responses_tools import Offered, offered
from fairlead.api.openapi import Operation
from fairlead.api.status import INTERNAL, end_of, http_status
from fairlead.api.web import ErrorShape, EventStream, json_response, while_connected
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, ShuttingDown, TimeoutExpired, TooLarge, Unavailable
from fairlead.core.generation import Chat, EngineInfo, Generate, Tokenize
from fairlead.core.policy import ResponseSettings
from fairlead.core.request import Inference, Request
from fairlead.core.timeline import Timeline
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository
from fairlead.store.responses import ResponseRow

DEFAULT_PAGE = 20
MAX_PAGE = 100

log = structlog.get_logger(__name__)

Answer = Callable[[HttpRequest, Kept, AccessLine], Awaitable[Any]]


class Deleted(Struct, kw_only=True):
    id: str
    object: str = "response"
    deleted: bool = True


class InputItems(Struct, kw_only=True):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class TokenCount(Struct, kw_only=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class Asked(Struct, kw_only=True):
    """A body, understood."""

    prompt: Generate
    answering: Answering
    input: list[Item]
    kept: Kept | None
    """Where the answer is kept; None: nowhere."""


class Responses(Door):
    def __init__(
        self,
        repository: ModelRepository,
        gateway: Inference,
        finished: Finished,
        max_body_bytes: int,
        elsewhere: Elsewhere | None,
        kept: Kept | None = None,
        settings: ResponseSettings | None = None,
    ) -> None:
        """`kept`: None for a server that keeps none."""
        super().__init__(repository, gateway, finished, max_body_bytes, elsewhere)
        self.kept = kept
        self.settings = settings or ResponseSettings()
        one = "/v1/responses/{response}"
        self.operations = (
            self.post(
                "/v1/responses",
                "createResponse",
                "Answer a conversation of items",
                self.create,
                ResponseBody,
                ResponseObject,
                events="also",
            ),
            self.post(
                "/v1/responses/input_tokens", "countResponseInput", "How long a conversation of items is", self.count, CountBody, TokenCount
            ),
            self._of_one(
                "GET", one, "getResponse", "A response that is kept, or its events again", self.retrieve, ResponseObject, stream=True
            ),
            self._of_one("DELETE", one, "deleteResponse", "Remove it; one that is computed is stopped", self.delete, Deleted),
            self._of_one("POST", f"{one}/cancel", "cancelResponse", "Stop computing it", self.cancel, ResponseObject),
            self._of_one(
                "GET",
                f"{one}/input_items",
                "responseInputItems",
                "What the model was shown for it",
                self.input_items,
                InputItems,
                paged=True,
            ),
        )

    def _of_one(
        self, method: str, path: str, name: str, summary: str, serve: Answer, answer: Any, *, stream: bool = False, paged: bool = False
    ) -> Operation:
        optional = ("stream", "starting_after") if stream else ("after", "limit", "order") if paged else ()
        return Operation(
            name=name,
            method=method,
            path=path,
            tag=self.tag,
            summary=summary,
            serve=self._kept_one(serve, optional),
            answer=answer,
            optional=optional,
            events="also" if stream else "",
            errors=(400, 404, 500, 503),
            error=self.error,
        )

    def errors(self, prompt_parameter: str | None = None) -> ErrorShape:
        return ResponseErrors(prompt_parameter)

    def info(self, caller: Caller, name: str, version: str) -> EngineInfo:
        """Raises BadParameter for a model of another server, too."""
        if self.elsewhere is not None and self.elsewhere.remote(name) and not self.repository.known(name):
            message = f"The model '{name}' is computed by another server: ask it at /v1/chat/completions."
            raise BadParameter(message, "model", "unsupported_model")
        return super().info(caller, name, version)

    # Asking

    async def create(self, http: HttpRequest, body: ResponseBody, line: AccessLine) -> Any:
        asked = await self._asked(body, line)
        if body.background:
            return await self._in_background(http, body, asked, line)
        request = self.request_of(asked.prompt, line, body.priority)
        request.session = request.session or _session(body)
        if body.stream:
            errors = StreamErrors(body.prompt_parameter, asked.answering)
            return EventStream(self._events(line, request, asked), line.end, line.headers, errors, error_event="response.failed")
        response = await while_connected(http.scope, http.receive, self._whole(line, request, asked))
        return left(line) if response is None else answered(response, line)

    async def _asked(self, body: ResponseBody, line: AccessLine) -> Asked:
        """Raises BadParameter, Unavailable."""
        sampling, guide = body.sampling(), body.guide()
        kept = self._keeper(body)
        items, offer, chat = await self._read(body, line.caller.tenant)
        if kept is not None and not kept.fits(items):
            if body.store or body.background:
                message = f"a response that is kept has at most {self.settings.max_bytes} bytes with its input: send `store: false`"
                raise TooLarge(message)
            kept = None
        # Of a whole answer the tokens of text and reasoning could not be told apart; in the background it is told when it begins.
        stream = bool(body.stream or body.background) or sampling.logprobs is not None
        prompt = Generate(chat=chat, sampling=sampling, guide=guide, tool_choice=offer.choice, parsed=True, stream=stream)
        response = response_of(body, offer, store=kept is not None)
        seal = ENCRYPTED in (body.include or ())
        answering = Answering(response, offer.known, seal=seal, logprobs=sampling.logprobs is not None)
        return Asked(prompt=prompt, answering=answering, input=items, kept=kept)

    async def _read(self, body: ConversationBody, tenant: str) -> tuple[list[Item], Offered, Chat]:
        """The items that came, the tools, and what the model is shown of both. Raises BadParameter, Unavailable."""
        conversation = Conversation(body.instructions)
        if body.previous_response_id is not None:
            if self.kept is None:
                message = "'previous_response_id' is not supported: this server keeps no responses. Send all items of the conversation."
                raise BadParameter(message, "previous_response_id", "unsupported_parameter")
            conversation.add(await self.kept.history(body.previous_response_id, tenant), "previous_response_id")
        items = [] if body.input is None else items_of(body.input)
        found = {} if self.kept is None else await self.kept.referred(items, tenant)
        items = resolved(items, found)
        conversation.add(items)
        offer = self._offered(body, conversation)
        messages = conversation.messages()
        chat = Chat(messages=messages, tools=offer.shown, reasoning_effort=body.effort or "", template_kwargs=body.template_kwargs)
        return items, offer, chat

    async def count(self, http: HttpRequest, body: CountBody, line: AccessLine) -> Any:
        body.check_options()
        body.guide()
        _, _, chat = await self._read(body, line.caller.tenant)
        delta = await while_connected(http.scope, http.receive, self.only(line, self.request_of(Tokenize(chat=chat), line)))
        return left(line) if delta is None else answered(TokenCount(input_tokens=len(delta.token_ids)), line)

    def _keeper(self, body: ResponseBody) -> Kept | None:
        """Raises BadParameter."""
        if self.kept is None:
            for name in ("store", "background"):
                if getattr(body, name):
                    message = f"'{name}' is not supported: this server keeps no responses."
                    raise BadParameter(message, name, "unsupported_parameter")
            return None
        if body.background and body.store is False:
            raise BadParameter("'background' needs 'store' to be true: its answer is fetched later.", "background", "invalid_value")
        return None if body.store is False else self.kept

    def _offered(self, body: ConversationBody, conversation: Conversation) -> Offered:
        """Raises BadParameter."""
        tools = list(body.tools or ())
        where = {len(tools) + number: place for number, (place, _) in enumerate(conversation.tools)}
        tools += [tool for _, tool in conversation.tools]
        return offered(tools, body.tool_choice, body.parallel_tool_calls, omit=self.settings.omit_tools, where=where)

    # Answering

    async def _whole(self, line: AccessLine, request: Request, asked: Asked) -> ResponseObject:
        answering = asked.answering
        async with aclosing(self.stream(line, request)) as responses:
            async for response in responses:
                answering.push(delta_of(response))
        answering.ending()
        if asked.kept is not None:
            await asked.kept.put(answering, line.caller.tenant, asked.input)
        return answering.response

    async def _events(self, line: AccessLine, request: Request, asked: Asked) -> AsyncGenerator[bytes, None]:
        """Nothing comes before the first delta: until then an error is an ordinary answer with its status."""
        answering, kept = asked.answering, asked.kept
        running = Running(answering, line.caller.tenant, asked.input, asyncio.current_task())
        try:
            async with aclosing(self.stream(line, request)) as responses:
                while (response := await running.next(responses)) is not None:
                    opening = b""
                    if not answering.number:
                        if kept is not None:
                            kept.begin(running)
                        opening = answering.opening() + answering.begun()
                    if events := opening + answering.push(delta_of(response)):
                        yield events
            events = answering.ending()
        except FairleadError as error:
            if not answering.number:
                raise
            if not running.cancelled:
                events = answering.failing(error)
                if kept is not None:
                    await kept.fail(running)
                yield events
                raise
            events = answering.cancelling()
        except (asyncio.CancelledError, GeneratorExit):
            if kept is not None and answering.number:
                answering.cancelling()
                kept.leave(running)
            raise
        except Exception:
            if kept is not None and answering.number:
                answering.failing(INTERNAL)
                kept.leave(running)
            raise
        yield events + (answering.last() if kept is None else await kept.end(running))

    async def _in_background(self, http: HttpRequest, body: ResponseBody, asked: Asked, line: AccessLine) -> Any:
        kept, answering, tenant = asked.kept, asked.answering, line.caller.tenant
        assert kept is not None
        kept.room(tenant)
        response = answering.response
        response.status = "queued"
        running = Running(answering, tenant, asked.input, None)
        if body.stream:
            answering.log = []
        answering.opening(queued=True)
        timeline = Timeline(response.id, "job", time.perf_counter())
        timeline.job, timeline.model, timeline.version = response.id, line.model, line.version
        request = Request(
            model=line.model,
            version=line.asked_version,
            prompt=adapted(asked.prompt, line) if line.adapter else asked.prompt,
            id=response.id,
            log_id=response.id,
            priority=body.priority or 0,
            caller=line.caller,
            signed_by=line.signed_by,
            qos_class=http.headers.get("x-fairlead-class", ""),
            session=http.headers.get("x-fairlead-session", "") or _session(body),
            arrived=timeline.arrived,
            timeline=timeline,
        )
        written = kept.begin(running)
        kept.compute(running, self._compute(kept, running, request, timeline))
        if not await asyncio.shield(written):
            raise Unavailable("the store does not answer: the response could not be fetched later")
        if body.stream:
            return EventStream(running.events(-1), line.end, line.headers, self.errors())
        return answered(response, line)

    async def _compute(self, kept: Kept, running: Running, request: Request, timeline: Timeline) -> None:
        answering = running.answering
        error: FairleadError | None = None
        try:
            if not await running.is_written():
                kept.forget(running)
                return
            async with asyncio.timeout(self.settings.background_seconds), aclosing(self.gateway.infer(request)) as responses:
                while (response := await running.next(responses)) is not None:
                    timeline.version = response.version
                    if answering.response.status == "queued":
                        answering.begun()
                        kept.begun(running)
                    answering.push(delta_of(response))
                    running.changed()
            answering.ending()
        except TimeoutError:
            error = TimeoutExpired(f"it was not answered within {self.settings.background_seconds:g} s")
        except asyncio.CancelledError:
            error = ShuttingDown("the server stopped")
        except FairleadError as failure:
            error = failure
        except Exception:
            log.exception("response_failed", response=running.id)
            error = INTERNAL
        if error is not None and running.cancelled:
            answering.cancelling()
        elif error is not None:
            answering.failing(error)
        await kept.end(running)
        status = 200 if error is None else 499 if running.cancelled else http_status(error)
        timeline.end(time.perf_counter(), status, "" if error is None else error.message, *end_of(status))
        self.finished.add(timeline)

    # What is kept

    def _kept_one(self, serve: Answer, optional: tuple[str, ...]) -> Callable[[HttpRequest], Awaitable[Any]]:
        """Every end that comes before the answer has begun is logged here."""

        async def endpoint(http: HttpRequest) -> Any:
            line = AccessLine(self.finished, http)
            try:
                unknown = next((name for name in http.query_params if name.removesuffix("[]") not in optional), None)
                if unknown is not None:
                    raise BadParameter(f"Unknown parameter: '{unknown[:64]}'.", unknown[:64], "unknown_parameter")
                if self.kept is None:
                    raise no_such_response(http.path_params["response"])
                answer = await serve(http, self.kept, line)
            except FairleadError as error:
                answer = self.errors().response(error, line.headers)
                line.end(answer.status_code, error.message)
                return answer
            except BaseException:
                line.end(500, INTERNAL.message)
                raise
            if not isinstance(answer, EventStream):
                line.end(200, "")
            return answer

        return endpoint

    async def retrieve(self, http: HttpRequest, kept: Kept, line: AccessLine) -> Any:
        id, tenant = http.path_params["response"], line.caller.tenant
        after = _number(http, "starting_after", -1, least=0)
        stream = http.query_params.get("stream", "false").lower()
        if stream not in ("true", "false"):
            raise BadParameter(
                f"Invalid value for 'stream': {stream[:64]!r}. Supported values are: 'true', 'false'.", "stream", "invalid_value"
            )
        if stream == "false":
            if after >= 0:
                raise BadParameter("'starting_after' is only allowed when 'stream' is true.", "starting_after", "invalid_value")
            return json_response(_object(await kept.get(id, tenant)), headers=line.headers)
        row = await kept.get(id, tenant)
        running = kept.running.get(id)
        if running is not None and running.answering.log is not None:
            return EventStream(running.events(after), line.end, line.headers, self.errors())
        if row.events is None:
            why = "is computed by another server just now" if row.ended is None else "was not made with 'background' and 'stream'"
            raise BadParameter(f"This response cannot be streamed: it {why}.", "stream", "invalid_value")
        return EventStream(_once(replayed(row.events, _object(row), after)), line.end, line.headers, self.errors())

    async def delete(self, http: HttpRequest, kept: Kept, line: AccessLine) -> HttpResponse:
        id = http.path_params["response"]
        await kept.delete(id, line.caller.tenant)
        return json_response(Deleted(id=id), headers=line.headers)

    async def cancel(self, http: HttpRequest, kept: Kept, line: AccessLine) -> HttpResponse:
        row = await kept.cancel(http.path_params["response"], line.caller.tenant)
        return json_response(_object(row), headers=line.headers)

    async def input_items(self, http: HttpRequest, kept: Kept, line: AccessLine) -> HttpResponse:
        row = await kept.get(http.path_params["response"], line.caller.tenant)
        limit = _number(http, "limit", DEFAULT_PAGE, least=1, most=MAX_PAGE)
        order, after = http.query_params.get("order", "desc"), http.query_params.get("after")
        if order not in ("asc", "desc"):
            raise BadParameter(f"Invalid value for 'order': {order[:64]!r}. Supported values are: 'asc', 'desc'.", "order", "invalid_value")
        items = await kept.input(row)
        if order == "desc":
            items.reverse()
        at = 0
        if after is not None:
            at = next((number for number, item in enumerate(items, 1) if item["id"] == after), 0)
            if not at:
                raise BadParameter(f"Item with id '{after[:128]}' not found.", "after", "invalid_value")
        page = items[at : at + limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return json_response(InputItems(data=page, first_id=first, last_id=last, has_more=at + limit < len(items)), headers=line.headers)


async def _once(events: bytes) -> AsyncGenerator[bytes, None]:
    if events:
        yield events


def _session(body: ResponseBody) -> str:
    return body.prompt_cache_key or body.safety_identifier or body.user or ""


def _number(http: HttpRequest, name: str, default: int, *, least: int, most: int = 1 << 31) -> int:
    given = http.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 11 and least <= int(given) <= most):
        bounds = f"at least {least}" if most == 1 << 31 else f"between {least} and {most}"
        raise BadParameter(f"Invalid value for '{name}': expected a whole number, {bounds}.", name, "invalid_value")
    return int(given)


def _object(row: ResponseRow) -> ResponseObject:
    response = decoded(row.body)
    if row.ended is None and row.status == "in_progress":
        response.status = "in_progress"
    return response


def response_of(body: ResponseBody, offer: Offered, *, store: bool) -> ResponseObject:
    """As it begins: what was asked is told again."""
    text = {"type": "text"} if body.text is None or body.text.format is None else msgspec.to_builtins(body.text.format)
    return ResponseObject(
        id=new_id("resp"),
        created_at=int(time.time()),
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": body.effort, "summary": None},
        safety_identifier=body.safety_identifier,
        store=store,
        temperature=body.temperature,
        text={"format": {name: value for name, value in text.items() if value is not None}, "verbosity": "medium"},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=offer.told,
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        user=body.user,
    )
