"""What control asks the gateway to look at: how a model's requests end, and copies of them that another version answers, too."""

import sys
from typing import Annotated

from msgspec import Meta, Struct, structs

from fairlead.core.request import Request, Response
from fairlead.core.tensors import nbytes_of

Positive = Annotated[int, Meta(ge=1)]


class Watch(Struct, frozen=True, kw_only=True):
    """Of one model: its requests that name no version are counted into windows, by the version that traffic gave them."""

    rollout: str = ""
    """Its id. Another one begins a new window."""
    feedback: bool = False
    """Remember which version answered which request, so that feedback on it can be told apart."""


class ShadowRule(Struct, frozen=True, kw_only=True):
    """Of one model: a share of what its other versions answered well is asked of `version`, too, and the two answers are compared."""

    version: str
    share: Annotated[float, Meta(ge=0.0, le=1.0)]
    """Of the requests that name no version."""
    max_in_flight: Positive = 4
    """Copies under way at once in this process; what comes meanwhile is not copied."""
    timeout: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds for one copy, with its scores."""
    max_bytes: Positive = 4 << 20
    """Of one request and its answer together: larger ones are not copied."""
    score: bool = False
    """Of texts: both versions say how likely the champion's answer is. Takes a request more of each of them."""


class Pair(Struct, frozen=True, kw_only=True):
    """One request, what the champion answered, and what the candidate did. Nothing in it is shared with anybody."""

    model: str
    request: Request
    """As the champion got it. Whoever keeps of it more than a comparison needs takes out who asked."""
    champion_version: str
    candidate_version: str
    champion: tuple[Response, ...]
    """As they came: of a stream all its pieces."""
    candidate: tuple[Response, ...] = ()
    error: str = ""
    """Why the candidate gave no answer; "": it gave one."""
    champion_seconds: float
    candidate_seconds: float
    scores: tuple[Response, Response] | None = None
    """Where the rule asks for it: the champion's answer's log-probabilities (`Delta.prompt_logprobs`, with those of the prompt before it),
    as the champion gives them and as the candidate does."""

    @property
    def nbytes(self) -> int:
        """In memory, about."""
        answers = sum(map(response_nbytes, (*self.champion, *self.candidate, *(self.scores or ()))))
        return answers + request_nbytes(self.request)


def request_nbytes(request: Request) -> int:
    """In memory, about."""
    size, left = sum(map(nbytes_of, request.inputs.values())), [request.prompt, request.parameters]
    while left:  # no recursion: a caller says how deep the schemas of tools go
        each: object = left.pop()
        if isinstance(each, str | bytes):
            size += sys.getsizeof(each)
        elif isinstance(each, list | tuple):
            size += 36 * len(each)
            left += [one for one in each if type(one) is not int]
        elif isinstance(each, dict):
            left += (*each, *each.values())
        elif isinstance(each, Struct):
            left += structs.astuple(each)
    return size


def response_nbytes(response: Response) -> int:
    """In memory, about."""
    delta = response.delta
    size = 256 + sum(map(nbytes_of, response.outputs.values())) + len(response.raw or b"")
    if delta is not None:
        size += len(delta.text) + len(delta.reasoning) + len(delta.vector) + 36 * len(delta.token_ids)
        size += sum(200 + len(call.arguments) for call in delta.tool_calls)
        size += 200 * (len(delta.logprobs or ()) + len(delta.prompt_logprobs or ()))
        if delta.picture is not None:
            size += len(delta.picture.data)
    return size
