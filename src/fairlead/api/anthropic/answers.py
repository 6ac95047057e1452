"""What goes out: deltas as Anthropic's message, whole or in events."""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from msgspec import Struct

from fairlead.api.web import framed
from fairlead.core.generation import Delta, FinishReason, ToolCall, Usage, add_calls

encode = msgspec.json.Encoder().encode

SIGNATURE = "fairlead"
"""Of every thinking block: it proves nothing, and it is not looked at when it comes back. Programs keep no block without one."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded"]


class OutputTokensDetails(Struct):
    thinking_tokens: int


class UsageBlock(Struct):
    """All tokens of the prompt are the sum of the first three."""

    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    """None: what is computed is cached by the way, and not told apart."""
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails | None = None
    service_tier: Literal["standard"] = "standard"


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageAnswer(Struct):
    id: str
    model: str
    content: list[AnswerBlock]
    usage: UsageBlock
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class TokenCount(Struct):
    input_tokens: int


class Messages:
    """One answer on its way out."""

    def __init__(self, id: str, model: str, *, max_tokens: int, max_model_len: int, shows_thinking: bool = True) -> None:
        """`max_model_len`: 0 where nobody knows. `shows_thinking`: else there is a thinking block, and nothing in it."""
        self.id, self.model = id, model
        self.max_tokens, self.max_model_len = max_tokens, max_model_len
        self.shows_thinking = shows_thinking
        self._started = False
        self._index = -1  # of the block that is open, or was last
        self._open = ""  # its type
        self._call = -1  # which it is, of the answer's calls
        self._ended: tuple[FinishReason, str | int | None] = ("", None)

    # Whole

    def whole(self, delta: Delta) -> MessageAnswer:
        content: list[AnswerBlock] = []
        if delta.reasoning:
            content.append(ThinkingBlock(delta.reasoning if self.shows_thinking else "", SIGNATURE))
        if delta.text:
            content.append(TextBlock(delta.text))
        content += _tool_uses(delta.tool_calls)
        usage = delta.usage or Usage()
        reason, sequence = self._stop(delta.finish_reason, delta.stop_reason, usage)
        return MessageAnswer(self.id, self.model, content, _usage(usage), reason, sequence)

    # In events

    def events(self, delta: Delta) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            yield _event("message_start", message=MessageAnswer(self.id, self.model, [], UsageBlock()))
            yield _event("ping")
        calls = delta.tool_calls
        if self._open == "tool_use":  # its rest goes before what follows it, where a slow reader has let them be joined
            for call in calls:
                if call.index == self._call:
                    yield self._delta(type="input_json_delta", partial_json=call.arguments)
            calls = [call for call in calls if call.index != self._call]
        if delta.reasoning:
            if self._open != "thinking":
                yield from self._begin("thinking", ThinkingBlock("", ""))
            if self.shows_thinking:
                yield self._delta(type="thinking_delta", thinking=delta.reasoning)
        if delta.text:
            if self._open != "text":
                yield from self._begin("text", TextBlock(""))
            yield self._delta(type="text_delta", text=delta.text)
        for call in calls:
            if call.index != self._call:
                self._call = call.index
                yield from self._begin("tool_use", ToolUseBlock(call.id, call.name, {}))
            if call.arguments:
                yield self._delta(type="input_json_delta", partial_json=call.arguments)
        if delta.finish_reason:
            self._ended = delta.finish_reason, delta.stop_reason
        if delta.usage is not None:
            yield from self._end()
            reason, sequence = self._stop(*self._ended, delta.usage)
            yield _event("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=_usage(delta.usage))
            yield _event("message_stop")

    def _begin(self, kind: str, block: AnswerBlock) -> Iterator[bytes]:
        yield from self._end()
        self._index += 1
        self._open = kind
        yield _event("content_block_start", index=self._index, content_block=block)

    def _end(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta(type="signature_delta", signature=SIGNATURE)
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, **fields: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta=fields)

    def _stop(self, finish: FinishReason, stop: str | int | None, usage: Usage) -> tuple[StopReason, str | None]:
        """(stop_reason, stop_sequence)."""
        match finish:
            case "tool_calls":
                return "tool_use", None
            case "content_filter":
                return "refusal", None
            case "length":
                full = 0 < self.max_model_len <= usage.prompt_tokens + usage.completion_tokens
                return ("model_context_window_exceeded" if full and usage.completion_tokens < self.max_tokens else "max_tokens"), None
        return ("stop_sequence", stop) if isinstance(stop, str) else ("end_turn", None)


def _event(kind: str, **fields: Any) -> bytes:
    return framed(encode({"type": kind, **fields}), kind)


def _tool_uses(pieces: list[ToolCall]) -> Iterator[ToolUseBlock]:
    """One that is cut off, because the answer may not be longer, is left out: nobody shall act on half of a call."""
    calls: list[ToolCall] = []
    add_calls(calls, pieces)
    for call in calls:
        try:
            given = msgspec.json.decode(call.arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            continue
        if isinstance(given, dict):
            yield ToolUseBlock(call.id, call.name, given)


def _usage(usage: Usage) -> UsageBlock:
    return UsageBlock(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(usage.reasoning_tokens),
    )
