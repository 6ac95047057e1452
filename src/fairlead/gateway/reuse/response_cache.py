"""The response cache: whole answers by the key of their request (`reuse.keys`), in this process's memory.

`now` is the wall clock in seconds, because answers may come from other gateways (`reuse.redis`).
"""

from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from sys import getsizeof

import numpy as np
from msgspec import Struct

from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, ToolCall, Usage, add_calls
from fairlead.core.policy import CacheSettings, ReuseSettings
from fairlead.core.request import Response
from fairlead.core.tensors import Tensors, nbytes_of

ENTRY_BYTES = 512
"""What a stored answer takes beside its texts and tensors, about."""
KEPT = ("content-type", "content-encoding", "inference-header-content-length")
"""Of an upstream's answer: what says how to read it."""


class NotStored(FairleadError):
    """`Cache-Control: only-if-cached`, and no answer is stored that will do: 504."""


class Stored(Struct, frozen=True):
    """One whole answer: of a prompt one Delta for each choice, however it came. Nothing in it may be changed."""

    responses: tuple[Response, ...]
    usage: Usage | None
    """What computing it took."""
    stored_at: float
    fresh_until: float
    stale_until: float

    @property
    def nbytes(self) -> int:
        return ENTRY_BYTES + sum(map(num_bytes, self.responses))

    def headers(self, outcome: str, now: float) -> dict[str, str]:
        """`outcome`: hit, stale or semantic."""
        return {"x-fairlead-cache": outcome, "age": str(max(int(now - self.stored_at), 0))}

    def replay(self) -> Iterator[Response]:
        """To whoever asked, in pieces or not."""
        return map(copy_of, self.responses)


class ResponseCache:
    """Bounded by bytes; the answer that was not asked for longest goes first."""

    def __init__(self, settings: ReuseSettings) -> None:
        self.max_bytes = settings.max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, tuple[Stored, int]] = OrderedDict()
        self._keys: dict[str, set[bytes]] = {}
        """By model."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float, *, stale_ok: bool = False, max_age: float | None = None) -> Stored | None:
        """`max_age`: what the caller allows, beside what the policy does."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        stored = entry[0]
        if now >= stored.stale_until:
            self._remove(key)
            return None
        if now >= stored.fresh_until and not stale_ok:
            return None
        if max_age is not None and now - stored.stored_at > max_age:
            return None
        self._entries.move_to_end(key)
        return stored

    def put(self, key: bytes, stored: Stored) -> None:
        size = stored.nbytes
        if key in self._entries:
            self._remove(key)
        if size > self.max_bytes:
            return
        self._entries[key] = stored, size
        self._keys.setdefault(stored.responses[0].model, set()).add(key)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._remove(next(iter(self._entries)))
            self.num_evicted += 1

    def drop(self, model: str) -> int:
        """All answers of a model: another version is served, or it is computed otherwise. Returns how many."""
        keys = list(self._keys.get(model, ()))
        for key in keys:
            self._remove(key)
        return len(keys)

    def _remove(self, key: bytes) -> None:
        stored, size = self._entries.pop(key)
        self.num_bytes -= size
        model = stored.responses[0].model
        keys = self._keys[model]
        keys.discard(key)
        if not keys:
            del self._keys[model]


class Recorder:
    """Takes down an answer as it goes by, to be stored if it is one that can be: see `spoiled`."""

    def __init__(self, model: str, version: str, max_bytes: int) -> None:
        """`model`, `version`: of the key."""
        self.model = model
        self.version = version
        self.max_bytes = max_bytes
        self.spoiled = ""
        """Why it will not be stored."""
        self._responses: list[Response] = []
        self._num_bytes = ENTRY_BYTES

    def add(self, response: Response) -> None:
        if self.spoiled:
            return
        self.spoiled = self._wrong(response)
        self._num_bytes += num_bytes(response)
        if self._num_bytes > self.max_bytes:
            self.spoiled = "it is too large"
        if self.spoiled:
            self._responses.clear()
            return
        own = copy_of(response)
        own.outputs = _owned(response.outputs)
        self._responses.append(own)

    def finish(self, now: float, policy: CacheSettings) -> Stored | None:
        """The answer came to its end without an error."""
        responses = self._responses
        if self.spoiled or not responses:
            return None
        first = responses[0]
        if first.delta is not None:
            whole = _whole_choices(responses)
            if any(response.delta is not None and response.delta.finish_reason == "abort" for response in whole):
                return None
        elif first.raw is not None:
            joined = b"".join(response.raw or b"" for response in responses)
            headers = {name: value for name, value in first.headers.items() if name.lower() in KEPT}
            whole = [Response(model=self.model, version=self.version, raw=joined, headers=headers, usage=_usage(responses))]
        else:
            whole = responses
        for response in whole:
            response.id = ""
            if response.raw is None:
                response.headers = {}
        fresh_until = now + policy.ttl
        return Stored(tuple(whole), _usage(responses), now, fresh_until, fresh_until + policy.stale_seconds)

    def _wrong(self, response: Response) -> str:
        if response.model != self.model or response.version != self.version:
            return "another model or version answered"
        if response.status != 200:
            return "it is an error"
        if self._responses and not (response.delta is not None or response.raw is not None):
            return "it is a stream of tensors"
        return ""


def copy_of(response: Response) -> Response:
    """One that its reader may change: all but the tensors, which are read-only where they are stored."""
    own = copy(response)
    own.headers = dict(response.headers)
    own.parameters = dict(response.parameters)
    own.outputs = dict(response.outputs)
    if response.delta is not None:
        delta = own.delta = copy(response.delta)
        delta.token_ids = list(delta.token_ids)
        delta.tool_calls = [copy(call) for call in delta.tool_calls]
    return own


def num_bytes(response: Response) -> int:
    """In memory, about."""
    size = 64
    for array in response.outputs.values():
        size += nbytes_of(array) + 128
        if array.dtype.kind == "O":
            size += 40 * array.size
    delta = response.delta
    if delta is not None:
        size += getsizeof(delta.text) + getsizeof(delta.reasoning) + len(delta.vector) + 36 * len(delta.token_ids)
        for logprob in (*(delta.logprobs or ()), *(delta.prompt_logprobs or ())):
            if logprob is not None:
                size += 200 * (1 + len(logprob.top))
        size += sum(map(getsizeof, delta.tokens or ()))
        size += sum(256 + getsizeof(call.arguments) for call in delta.tool_calls)
    if response.raw is not None:
        size += len(response.raw)
    return size


def _owned(outputs: Tensors) -> Tensors:
    """What arrays look at may be a whole batch, or be used again."""
    own = {}
    for name, array in outputs.items():
        mine = np.array(array, order="C")
        mine.flags.writeable = False
        own[name] = mine
    return own


def _usage(responses: list[Response]) -> Usage | None:
    for response in reversed(responses):
        told = response.usage if response.delta is None else response.delta.usage
        if told is not None:
            return told
    return None


def _whole_choices(responses: list[Response]) -> list[Response]:
    """One response for each choice; the one that tells the usage last, as engines give them."""
    choices: dict[int, list[Delta]] = {}
    for response in responses:
        delta = response.delta
        assert delta is not None
        pieces = choices.pop(delta.index, []) if delta.usage is not None else choices.get(delta.index, [])
        pieces.append(delta)
        choices[delta.index] = pieces
    whole = []
    for pieces in choices.values():
        own = copy(responses[0])
        own.delta = _joined(pieces)
        whole.append(own)
    return whole


def _joined(pieces: list[Delta]) -> Delta:
    last = pieces[-1]
    ends = next((piece for piece in reversed(pieces) if piece.finish_reason), last)
    told = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    calls: list[ToolCall] = []
    add_calls(calls, [call for piece in pieces for call in piece.tool_calls])
    return Delta(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=calls,
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=[logprob for some in told for logprob in some] if told else None,
        prompt_logprobs=next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        finish_reason=ends.finish_reason,
        stop_reason=ends.stop_reason,
        usage=next((piece.usage for piece in reversed(pieces) if piece.usage is not None), None),
        vector=b"".join(piece.vector for piece in pieces),
        tokens=next((piece.tokens for piece in pieces if piece.tokens is not None), None),
    )
