"""Requests and answers as the tests of reuse want them."""

from typing import Any

import msgspec
import numpy as np

from fairlead.core.caller import Caller, Envelope
from fairlead.core.generation import Chat, Delta, Generate, Message, Sampling, Usage
from fairlead.core.policy import CacheSettings
from fairlead.core.request import Raw, Request, Response

POLICY = CacheSettings(mode="deterministic")
GREEDY = Sampling(temperature=0.0)


def envelope(**headers: str) -> Envelope:
    pairs = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return Envelope(method="POST", target="/", scheme="http", authority="localhost", headers=pairs)


def tensors(tenant: str = "a", model: str = "m", **fields: Any) -> Request:
    fields.setdefault("inputs", {"x": np.array([1.0, 2.0], np.float32)})
    return Request(model=model, caller=Caller(tenant=tenant), **fields)


def chat(*texts: str, tenant: str = "a", sampling: Sampling = GREEDY, stream: bool = False, **fields: Any) -> Request:
    """User and assistant by turns, the user last."""
    roles = ["user" if number % 2 == 0 else "assistant" for number in range(len(texts))][::-1]
    messages = [Message(role=role, content=text) for role, text in zip(roles, texts, strict=True)]
    prompt = Generate(chat=Chat(messages=messages), sampling=sampling, stream=stream, salt=tenant)
    return Request(model="m", caller=Caller(tenant=tenant), prompt=prompt, **fields)


def raw(body: dict[str, Any] | bytes, path: str = "/v1/chat/completions", tenant: str = "a", **fields: Any) -> Request:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Request(model="m", caller=Caller(tenant=tenant), raw=Raw(path=path, body=data, **fields))


def delta(text: str, index: int = 0, **fields: Any) -> Response:
    return Response(model="m", version="1", delta=Delta(index=index, text=text, **fields))


def told(text: str = "", **fields: Any) -> Response:
    """The last piece."""
    return delta(text, finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2), **fields)
