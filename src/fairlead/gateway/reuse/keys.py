"""Which requests may share an answer, and what makes them equal.

A key is a hash over parts that are all written with their length before them, so that no two different requests can be
written alike. In it: model, version, tenant (unless answers are shared), and everything that the answer depends on. Not in
it: the request's id, its priority and times, whether the answer comes in pieces (a stored one is given either way), and the
labels that OpenAI defines to have no effect (`user`, `metadata`, ...).
"""

import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw as Json
from msgspec import Struct, structs

from fairlead.core.caller import Envelope
from fairlead.core.generation import Chat, Generate, Paint
from fairlead.core.policy import CacheSettings
from fairlead.core.request import Raw, Request
from fairlead.core.tensors import datatype_of, encode_bytes

FORM = b"fairlead answer 1"
"""Of keys: another one when what is written into them changes."""
MAX_CACHE_CONTROL = 1024
"""Characters."""
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
OF_STREAMS = ("stream", "stream_options")
CHOOSES = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Paths of answers that may be drawn at random."""
COMPUTES = frozenset({"/v1/embeddings", "/v1/tokenize", "/v1/detokenize", "/v1/moderations"})
"""Paths of answers that are always the same."""
OF_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
"""Parameters of models that remember what they were asked before."""

_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_fields = msgspec.json.Decoder(dict[str, Json])
_messages = msgspec.json.Decoder(list[Json])
_NUMBERS = re.compile(r"\d+(?:[.,:]\d+)*")
_DIRECTIVE = re.compile(r'[\t ]*(?:([!#$%&\'*+.^_`|~\w-]+)(?:=(?:"((?:[^"\\]|\\.)*)"|([!#$%&\'*+.^_`|~\w-]*)))?)?[\t ]*(?:,|$)', re.ASCII)


class CacheControl(Struct, frozen=True):
    """What a request's Cache-Control asks for (RFC 9111, section 5.2.1)."""

    no_store: bool = False
    """Neither a stored answer, nor one that is stored, nor somebody else's."""
    no_cache: bool = False
    """No stored answer; this one may be stored."""
    max_age: float | None = None
    """No stored answer older than so many seconds. In mode `all` it also says that one will do although it was drawn at random."""
    only_if_cached: bool = False
    """A stored answer or none (504)."""


NOTHING_ASKED = CacheControl()
NO_STORE = CacheControl(no_store=True)


def cache_control(envelope: Envelope | None) -> CacheControl:
    """What cannot be read for certain is taken for `no-store`; of directives that come twice the stricter counts."""
    value = envelope.header("cache-control") if envelope is not None else ""
    return _read(value) if value else NOTHING_ASKED


def _read(value: str) -> CacheControl:
    if len(value) > MAX_CACHE_CONTROL:
        return NO_STORE
    asked: dict[str, bool] = {}
    max_age: float | None = None
    at = 0
    while at < len(value):
        match = _DIRECTIVE.match(value, at)
        if match is None:
            return NO_STORE
        at = match.end()
        name = (match[1] or "").lower()
        if name == "max-age":
            seconds = match[3] if match[3] is not None else match[2] or ""
            age = float(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) <= 10 else 0.0
            max_age = age if max_age is None else min(age, max_age)
        elif name:
            asked[name] = True
    return CacheControl("no-store" in asked, "no-cache" in asked, max_age, "only-if-cached" in asked)


def request_key(request: Request, version: str, policy: CacheSettings, control: CacheControl = NOTHING_ASKED) -> bytes | None:
    """32 bytes, equal for requests that may share an answer; None for one that shares none.

    `version`: that which computes it.
    """
    if control.no_store or (policy.mode == "off" and not policy.single_flight):
        return None
    question = _question(request, anything=policy.mode == "all" and control.max_age is not None)
    if question is None:
        return None
    try:
        outputs = None if request.outputs is None else list(request.outputs)
        asked = _encode((outputs, request.parameters))
    except (TypeError, ValueError, OverflowError, RecursionError):  # of doors that let through what msgpack has no form for
        return None
    return _hash((*_scope(request, version, policy.shared), asked, *question))


def _scope(request: Request, version: str, shared: bool) -> tuple[bytes, ...]:
    tenant = b"" if shared else b"=" + request.caller.tenant.encode()
    return FORM, request.model.encode(), version.encode(), tenant


def _hash(parts: Iterable[Any]) -> bytes:
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _question(request: Request, *, anything: bool) -> tuple[Any, ...] | None:
    """The parts that say what is asked. `anything`: also where the answer is drawn at random."""
    prompt = request.prompt
    if prompt is not None:
        if isinstance(prompt, Paint):
            return None
        if isinstance(prompt, Generate):
            if not (anything or prompt.sampling.greedy or prompt.sampling.seed is not None):
                return None
            if prompt.stream or prompt.salt:
                prompt = structs.replace(prompt, stream=False, salt="")
        try:
            return b"prompt", _encode(prompt)
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None
    if request.raw is not None:
        return _raw(request, request.raw, anything=anything)
    return _tensors(request, anything=anything)


# Tensors


def _tensors(request: Request, *, anything: bool) -> tuple[Any, ...] | None:
    inputs = request.inputs
    parameters = request.parameters
    if parameters and any(name in parameters for name in OF_SEQUENCES):
        return None
    if "text_input" in inputs and not (anything or _is_chosen(request)):  # a language model in its form of tensors
        return None
    if _flag(request, "stream"):
        return None
    parts: list[Any] = [b"tensors"]
    try:
        for name in sorted(inputs):
            array = inputs[name]
            parts += (name.encode(), datatype_of(array).encode(), np.array(array.shape, "<i8").tobytes(), _bytes_of(array))
    except (ValueError, TypeError):  # a type without a name: not for us to refuse
        return None
    return tuple(parts)


def _bytes_of(array: np.ndarray) -> Any:
    if array.dtype.kind == "O":
        return encode_bytes(array)
    if array.dtype.kind in "SU":
        raise ValueError("its elements' width is not among what is hashed")
    if array.ndim and array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8).data
    return array.tobytes()


def _flag(request: Request, name: str) -> bool:
    array = request.inputs.get(name)
    return bool(array.any()) if array is not None and array.dtype == np.bool_ else bool(request.parameters.get(name))


def _is_chosen(request: Request) -> bool:
    """Temperature 0 or a seed, where the text form of a language model says so."""
    given = request.parameters
    text: Any = given.get("sampling_parameters")
    array = request.inputs.get("sampling_parameters")
    if array is not None:
        text = array.reshape(-1)[0] if array.size else b""
    if text is not None:
        try:
            given = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            return False
    return _is_zero(given.get("temperature")) or isinstance(given.get("seed"), int)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


# Bodies that go on to another server


def _raw(request: Request, raw: Raw, *, anything: bool) -> tuple[Any, ...] | None:
    """Of the body the top level is put in order. What is below stays as it is, byte for byte: two readers of JSON that
    understand a text differently (a key that comes twice, say) must not be given each other's answers."""
    accept = request.envelope.header("accept") if request.envelope is not None else ""
    head = (b"raw", raw.path.encode(), raw.content_type.encode(), raw.header_length.encode(), accept.encode())
    if raw.path not in CHOOSES and raw.path not in COMPUTES:
        return _kserve(raw, head)
    try:
        fields = _fields.decode(raw.body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if raw.path in CHOOSES and not (anything or _is_fixed(fields)):
        return None
    if not raw.stream:
        for name in OF_STREAMS:
            fields.pop(name, None)
    for name in LABELS:
        fields.pop(name, None)
    parts: list[Any] = [*head, b"" if raw.max_tokens is None else b"%d" % raw.max_tokens]
    for name in sorted(fields):
        parts += (name.encode(), bytes(fields[name]))
    return tuple(parts)


def _is_fixed(fields: dict[str, Json]) -> bool:
    seed = bytes(fields.get("seed", b"null"))
    try:
        return seed.lstrip(b"-").isdigit() or _is_zero(msgspec.json.decode(fields.get("temperature", b"null")))
    except msgspec.MsgspecError:
        return False


def _kserve(raw: Raw, head: tuple[bytes, ...]) -> tuple[Any, ...] | None:
    """Not taken apart, because it goes on as it is. With an id it has an answer with that id."""
    if raw.path != "/infer":
        return None
    length = int(raw.header_length) if raw.header_length.isascii() and raw.header_length.isdigit() else len(raw.body)
    try:
        fields = _fields.decode(memoryview(raw.body)[:length])
        parameters = _fields.decode(fields.get("parameters", b"{}"))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if "id" in fields or any(name in parameters for name in OF_SEQUENCES):
        return None
    return (*head, bytes(raw.body))


# Nearly the same question


class Question(Struct, frozen=True):
    """A conversation, for the semantic cache: the last message is compared by its meaning, all else must be equal."""

    tenant: str
    bucket: bytes
    text: str


def question_of(request: Request, version: str) -> Question | None:
    """None where the last message is not the user's, or no text. Numbers in it are among what must be equal: to an embedder
    two and three dogs are nearly the same."""
    prompt = request.prompt
    if isinstance(prompt, Generate) and prompt.chat is not None and prompt.chat.messages:
        return _of_chat(request, version, prompt, prompt.chat)
    if request.raw is not None and request.raw.path == "/v1/chat/completions":
        return _of_body(request, version, request.raw)
    return None


def _of_chat(request: Request, version: str, prompt: Generate, chat: Chat) -> Question | None:
    *before, last = chat.messages
    if last.role != "user" or not last.content or chat.continue_final_message:
        return None
    rest = structs.replace(prompt, chat=structs.replace(chat, messages=[*before, structs.replace(last, content="")]))
    question = _question(structs.replace(request, prompt=rest), anything=True)
    return None if question is None else _asked(request, version, question, last.content)


class _Last(Struct, forbid_unknown_fields=True):
    role: str
    content: str


def _of_body(request: Request, version: str, raw: Raw) -> Question | None:
    try:
        fields = _fields.decode(raw.body)
        *before, end = _messages.decode(fields.pop("messages", b"[]")) or [Json(b"")]
        last = msgspec.json.decode(end, type=_Last)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if last.role != "user" or not last.content:
        return None
    body = msgspec.json.encode({**fields, "messages": before})
    question = _question(structs.replace(request, raw=structs.replace(raw, body=body)), anything=True)
    return None if question is None else _asked(request, version, question, last.content)


def _asked(request: Request, version: str, question: tuple[Any, ...], text: str) -> Question | None:
    try:
        parameters = _encode(request.parameters)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    numbers = _encode(_NUMBERS.findall(text))
    # the tenant is always part of it, whatever the exact cache shares
    return Question(request.caller.tenant, _hash((*_scope(request, version, False), b"near", numbers, parameters, *question)), text)
