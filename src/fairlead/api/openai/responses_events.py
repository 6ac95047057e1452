"""What goes out at `/v1/responses`: deltas as events, and the object that they come to. Both hold the same items under the same ids.

| event | when |
|---|---|
| response.queued, .created, .in_progress | before all others |
| response.output_item.added | an item begins: reasoning, message, function_call, custom_tool_call |
| response.content_part.added | ... and its one part, of reasoning and messages |
| response.reasoning_text.delta, .output_text.delta, .function_call_arguments.delta, .custom_tool_call_input.delta | its text |
| ... .done, response.content_part.done, response.output_item.done | it is complete |
| response.completed, .incomplete, .failed | after all others; a cancelled answer ends with .incomplete, and its status says what became of it |
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from fairlead.api.openai.answers import LEAST
from fairlead.api.openai.errors import CODES, OpenAIError, OpenAIErrors
from fairlead.api.openai.responses_items import Item, new_id, sealed
from fairlead.api.openai.responses_tools import Known, call_item
from fairlead.api.web import framed
from fairlead.core import errors
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, TokenLogprob, ToolCall, Usage

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ENDED = frozenset(("completed", "incomplete", "failed", "cancelled"))

NO_TOOL = Known("")
NAMES = {"max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort"}
"""Of parameters, where the engine knows them by the names that chats have."""

encode = msgspec.json.Encoder().encode


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0
    """Writing costs nothing here, and is not counted."""


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    code: str
    message: str


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseObject(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[dict[str, Any]] = msgspec.field(default_factory=list)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, str | None]
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = False
    """Whether it can be asked for again."""
    temperature: float | None = None
    """null: the model's own."""
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class Answering:
    """One answer on its way out. `push` and the others give events, framed; `response` is what they come to so far."""

    def __init__(self, response: ResponseObject, known: dict[str, Known], *, seal: bool = False, logprobs: bool = False) -> None:
        """`known`: tools by the names that the model sees. `seal`: reasoning items have `encrypted_content`, too."""
        self.response = response
        self.known = known
        self.seal = seal
        self.logprobs = logprobs
        self.log: list[bytes] | None = None
        """Of all events by their numbers, where they are to be read again."""
        self.number = 0
        """Of the next event."""
        self._open: _Open | None = None
        self._held = _Open("message", 0)
        """White space that may be all that comes before a call."""
        self._events: list[bytes] = []
        self._finish = ""
        self._usage: Usage | None = None

    def opening(self, *, queued: bool = False) -> bytes:
        self._tell("response.created", response=self.response)
        if queued:
            self._tell("response.queued", response=self.response)
        return self._taken()

    def begun(self) -> bytes:
        self.response.status = "in_progress"
        self._tell("response.in_progress", response=self.response)
        return self._taken()

    def push(self, delta: Delta) -> bytes:
        if delta.reasoning:
            self._reason(delta.reasoning)
        if delta.text:
            told = [] if delta.logprobs is None or delta.reasoning or delta.tool_calls else delta.logprobs
            self._say(delta.text, told if self.logprobs else [])
        for piece in delta.tool_calls:
            self._call(piece)
        if delta.finish_reason:
            self._finish = delta.finish_reason
        if delta.usage is not None:
            self._usage = delta.usage
        return self._taken()

    def ending(self) -> bytes:
        """All is said: what is open is closed, and the object is complete. `last` is to follow."""
        response = self.response
        cut = self._finish in ("length", "content_filter")
        if not response.output and self._open is None:
            self._say(self._held.text or "", self._held.logprobs, at_once=True)
        self._close("incomplete" if cut else "completed")
        response.status = "incomplete" if cut else "completed"
        if cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens" if self._finish == "length" else "content_filter")
        else:
            response.completed_at = int(time.time())
        response.usage = usage_of(self._usage)
        return self._taken()

    def failing(self, error: FairleadError) -> bytes:
        self._close("incomplete")
        self.response.status, self.response.error = "failed", failure_of(error)
        self.response.usage = usage_of(self._usage)
        return self._taken()

    def cancelling(self) -> bytes:
        self._close("incomplete")
        self.response.status = "cancelled"
        self.response.usage = usage_of(self._usage)
        return self._taken()

    def last(self) -> bytes:
        return self._logged(ending_event(self.response, self.number))

    # Items

    def _reason(self, text: str) -> None:
        if self._open is None or self._open.kind != "reasoning":
            self._begin(_Open("reasoning", len(self.response.output)))
        self._add("response.reasoning_text.delta", text)

    def _say(self, text: str, told: Sequence[TokenLogprob], *, at_once: bool = False) -> None:
        if self._open is None or self._open.kind != "message":
            held = self._held
            held.text += text
            held.logprobs += told
            if not at_once and not held.text.strip():
                return
            text, told = held.text, held.logprobs
            self._begin(_Open("message", len(self.response.output)))
        assert self._open is not None
        self._open.logprobs += told
        if text:
            self._add("response.output_text.delta", text, logprobs=[_logprob(each) for each in told])

    def _call(self, piece: ToolCall) -> None:
        if self._open is None or self._open.kind != "call" or self._open.index != piece.index:
            known = self.known.get(piece.name) or Known(piece.name)
            self._begin(_Open("call", len(self.response.output), index=piece.index, known=known, call_id=piece.id or new_id("call")))
        assert self._open is not None
        if not piece.arguments:
            return
        if self._open.known.custom:
            self._open.text += piece.arguments  # the text is known once its JSON is whole
        else:
            self._add("response.function_call_arguments.delta", piece.arguments)

    def _begin(self, new: "_Open") -> None:
        self._close("completed")
        self._held = _Open("message", 0)
        self._open = new
        item = self._item(new, "in_progress")
        if new.kind != "call":
            item["content"] = []
        self._tell("response.output_item.added", output_index=new.number, item=item)
        if new.kind != "call":
            self._tell("response.content_part.added", **new.place(), part=self._part(new))
        self.response.output.append(item)

    def _add(self, kind: str, text: str, **more: Any) -> None:
        assert self._open is not None
        self._open.text += text
        self._tell(kind, **self._open.place(), delta=text, **more)

    def _close(self, status: str) -> None:
        done = self._open
        if done is None:
            return
        self._open = None
        place = done.place()
        item = self._item(done, status)
        match done.kind:
            case "reasoning":
                self._tell("response.reasoning_text.done", **place, text=done.text)
            case "message":
                told = [_logprob(each) for each in done.logprobs]
                self._tell("response.output_text.done", **place, text=done.text, logprobs=told)
            case "call" if done.known.custom:
                self._tell("response.custom_tool_call_input.delta", **place, delta=item["input"])
                self._tell("response.custom_tool_call_input.done", **place, input=item["input"])
            case "call":
                self._tell("response.function_call_arguments.done", **place, name=done.known.name, arguments=done.text)
        if done.kind != "call":
            self._tell("response.content_part.done", **place, part=self._part(done))
        self._tell("response.output_item.done", output_index=done.number, item=item)
        self.response.output[done.number] = item

    def _item(self, one: "_Open", status: str) -> Item:
        if one.kind == "call":
            return call_item(one.known, one.id, one.call_id, one.text, status)
        item: Item = {"id": one.id, "type": one.kind, "status": status, "content": [self._part(one)]}
        if one.kind == "message":
            return {**item, "role": "assistant"}
        return {**item, "summary": [], "encrypted_content": sealed(one.text) if self.seal and status != "in_progress" else None}

    def _part(self, one: "_Open") -> Item:
        if one.kind == "reasoning":
            return {"type": "reasoning_text", "text": one.text}
        return {"type": "output_text", "text": one.text, "annotations": [], "logprobs": [_logprob(each) for each in one.logprobs]}

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append(self._logged(framed_event(kind, self.number, **fields)))

    def _logged(self, event: bytes) -> bytes:
        self.number += 1
        if self.log is not None:
            self.log.append(event)
        return event

    def _taken(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events


class _Open:
    """The item that grows."""

    def __init__(
        self, kind: Literal["reasoning", "message", "call"], number: int, *, index: int = -1, known: Known = NO_TOOL, call_id: str = ""
    ) -> None:
        """`index`: of the call in the model's answer."""
        self.kind, self.number, self.index = kind, number, index
        self.known, self.call_id = known, call_id
        prefix = {"reasoning": "rs", "message": "msg", "call": "ctc" if known.custom else "fc"}[kind]
        self.id = new_id(prefix)
        self.text = ""
        self.logprobs: list[TokenLogprob] = []

    def place(self) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.number}
        return place if self.kind == "call" else {**place, "content_index": 0}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    def plain(each: TokenLogprob) -> dict[str, Any]:
        return {"token": each.token, "logprob": max(each.logprob, LEAST), "bytes": list(each.data)}

    return {**plain(token), "top_logprobs": [plain(each) for each in token.top]}


def usage_of(usage: Usage | None) -> ResponseUsage | None:
    if usage is None:
        return None
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.cached_tokens),
        usage.completion_tokens,
        OutputTokensDetails(usage.reasoning_tokens),
        usage.prompt_tokens + usage.completion_tokens,
    )


# Failures


def failure_of(error: FairleadError) -> ResponseError:
    """In the words that this protocol has for them."""
    _, _, code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), (500, "", None))
    if isinstance(error, (errors.LimitExceeded, errors.Shed, errors.QueueFull)):
        return ResponseError("rate_limit_exceeded", error.message)
    if isinstance(error, errors.ContextExceeded):
        return ResponseError("context_length_exceeded", error.message)
    if isinstance(error, (errors.InvalidRequest, errors.Filtered)):
        return ResponseError("invalid_prompt", error.message)
    return ResponseError("server_error" if code is None or code == "model_error" else code, error.message)


class ResponseErrors(OpenAIErrors):
    """Under the names that this protocol has for what chats call otherwise."""

    def body(self, error: FairleadError) -> OpenAIError:
        told = super().body(error)
        told.error.param = NAMES.get(told.error.param or "", told.error.param)
        return told


class StreamErrors(ResponseErrors):
    """An error in mid-stream is the event `response.failed`."""

    def __init__(self, prompt: str, answering: Answering) -> None:
        super().__init__(prompt)
        self.answering = answering

    def event(self, error: FairleadError) -> bytes:
        if self.answering.response.status != "failed":
            self.answering.failing(error)
        return self.answering.last().partition(b"\ndata: ")[2].rstrip()


def failed_by_death(response: ResponseObject) -> ResponseObject:
    """Of an answer whose server is gone."""
    response.status = "failed"
    response.error = ResponseError("server_error", "the server that computed this answer stopped")
    return response


def replayed(events: bytes, response: ResponseObject, after: int) -> bytes:
    """Those of an ended answer that follow number `after`; `events` are all but the last."""
    told = events.split(b"\n\n")[:-1]
    rest = [each + b"\n\n" for each in told[after + 1 :]]
    if after < len(told):
        rest.append(ending_event(response, len(told)))
    return b"".join(rest)


def ending_event(response: ResponseObject, number: int) -> bytes:
    kind = "incomplete" if response.status == "cancelled" else response.status
    return framed_event(f"response.{kind}", number, response=response)


def framed_event(kind: str, number: int, **fields: Any) -> bytes:
    return framed(encode({"type": kind, "sequence_number": number, **fields}), kind)


decoded = msgspec.json.Decoder(ResponseObject).decode
