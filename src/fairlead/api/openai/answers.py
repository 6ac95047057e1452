"""What goes out: deltas as OpenAI's chunks and objects."""

import base64
from typing import Any

import msgspec
import numpy as np

from fairlead import __version__
from fairlead.core.generation import Delta, TokenLogprob, Usage

FINGERPRINT = f"fairlead-{__version__}"

encode = msgspec.json.Encoder().encode


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total_usage(usages: list[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )


class Chats:
    """The objects of one chat completion."""

    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def start(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice, before any text."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, delta: Delta, index: int) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        choice = {"index": index, "delta": content, "logprobs": self.logprobs(delta), "finish_reason": delta.finish_reason or None}
        return _with_stop_reason(choice, delta)

    def choice(self, delta: Delta, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = {"index": index, "message": message, "logprobs": self.logprobs(delta), "finish_reason": delta.finish_reason}
        return _with_stop_reason(choice, delta)

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None

        def told(each: TokenLogprob) -> dict[str, Any]:
            return {"token": each.token, "logprob": _finite(each.logprob), "bytes": list(each.data)}

        return {"content": [told(each) | {"top_logprobs": [told(other) for other in each.top]} for each in delta.logprobs], "refusal": None}


class Completions:
    """The objects of one text completion."""

    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, prompts: list[str] | None = None) -> None:
        """`prompts`: their texts, for answers that echo them."""
        self.prompts = prompts

    def start(self, index: int) -> None:
        return None

    def piece(self, delta: Delta, index: int) -> dict[str, Any]:
        return self._choice(delta, index, "")

    def choice(self, delta: Delta, index: int, prompt: str = "") -> dict[str, Any]:
        return self._choice(delta, index, prompt)

    def _choice(self, delta: Delta, index: int, prompt: str) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": prompt + delta.text,
            "logprobs": self._logprobs(delta, echo=bool(prompt)),
            "finish_reason": delta.finish_reason or None,
        }
        return _with_stop_reason(choice, delta)

    def _logprobs(self, delta: Delta, *, echo: bool) -> dict[str, Any] | None:
        tokens: list[TokenLogprob | None] = [*((delta.prompt_logprobs or []) if echo else []), *(delta.logprobs or [])]
        if delta.logprobs is None and not tokens:
            return None
        offsets, at = [], 0
        for each in tokens:
            offsets.append(at)
            at += len(each.token) if each else 0
        return {
            "tokens": [each.token if each else "" for each in tokens],
            "token_logprobs": [_finite(each.logprob) if each else None for each in tokens],
            "top_logprobs": [{other.token: _finite(other.logprob) for other in each.top} if each else None for each in tokens],
            "text_offset": offsets,
        }


def _with_stop_reason(choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
    if delta.finish_reason:
        choice["stop_reason"] = delta.stop_reason
    return choice


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI says -9999.0."""
    return logprob if logprob > -9999.0 else -9999.0


def vector_json(data: bytes, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(data).decode("ascii")
    return np.frombuffer(data, "<f4").tolist()  # type: ignore[no-any-return]


def prompt_logprobs_json(told: list[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """As vLLM has them: for each token of the prompt, token id → how likely it was."""

    def entry(each: TokenLogprob) -> dict[str, Any]:
        return {"logprob": _finite(each.logprob), "rank": each.rank, "decoded_token": each.token}

    return [None if each is None else {str(other.token_id): entry(other) for other in (each, *each.top)} for each in told]
