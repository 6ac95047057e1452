"""How gates ask a version, and what they make of its answers."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from msgspec import Struct, field

from fairlead.control.checks import Question
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, ReplicaDied
from fairlead.core.generation import Chat, Embed, Generate, Paint, Picture, Sampling, Score
from fairlead.core.request import Request, Response
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors
from fairlead.runtime.version import Version

CONCURRENCY = 8
"""Of questions whose time is not measured."""
MAX_DEATHS = 3
"""Of the version's processes: then it is asked no more."""
_TEXTS = ("A boat on the sea.", "Bread needs flour, water and salt.", "How do I reset my password?", "The train was late again.")
_SHORT = Sampling(temperature=0.0, max_tokens=16)


class Answer(Struct, kw_only=True):
    outputs: Tensors = field(default_factory=dict)
    text: str = ""
    vector: np.ndarray | None = None
    pictures: list[Picture] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    seconds: float = 0.0


def request_of(question: Question, model: str) -> Request:
    """Raises InvalidRequest."""
    if question.inputs:
        inputs = {tensor.name: tensor.array() for tensor in question.inputs}
        return Request(model=model, inputs=inputs, parameters=dict(question.parameters))
    if question.embed is not None:
        return Request(model=model, prompt=Embed(text=question.embed))
    chat = Chat(messages=list(question.chat)) if question.chat else None
    return Request(model=model, prompt=Generate(text=question.prompt, chat=chat, sampling=question.sampling, parsed=chat is not None))


async def ask(version: Version, request: Request, seconds: float) -> Answer:
    """Raises FairleadError, ModelError where the whole answer takes longer than `seconds`."""
    began = request.arrived = time.perf_counter()
    try:
        async with asyncio.timeout(seconds), aclosing(version.infer(request)) as answers:
            responses = [response async for response in answers]
    except TimeoutError:
        raise ModelError(f"there was no answer within {seconds:g} s") from None
    answer = answer_of(responses)
    answer.seconds = time.perf_counter() - began
    return answer


def answer_of(responses: Sequence[Response]) -> Answer:
    """Of several responses with tensors, the rows of all."""
    answer = Answer()
    for response in responses:
        delta = response.delta
        if delta is None:
            for name, array in response.outputs.items():
                before = answer.outputs.get(name)
                answer.outputs[name] = array if before is None or not array.ndim else np.concatenate([before, array])
            continue
        if delta.picture is not None:
            answer.pictures.append(delta.picture)
        if delta.vector:
            answer.vector = np.frombuffer(delta.vector, "<f4")
        if delta.index == 0:
            answer.text += delta.text
        answer.logprobs.extend(each.logprob for each in delta.logprobs or ())
    return answer


async def ask_all(version: Version, requests: Sequence[Request], seconds: float) -> list[Answer | FairleadError]:
    """In order, a few at a time."""
    found: list[Answer | FairleadError | None] = [None] * len(requests)
    left = iter(enumerate(requests))
    deaths: list[FairleadError] = []

    async def work() -> None:
        for index, request in left:
            if len(deaths) >= MAX_DEATHS:
                found[index] = deaths[0]
                continue
            try:
                found[index] = await ask(version, request, seconds)
            except FairleadError as error:
                found[index] = error
                if isinstance(error, ReplicaDied):
                    deaths.append(error)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(CONCURRENCY, len(requests))):
            tasks.create_task(work())
    return [each for each in found if each is not None]


class Driven(Struct, kw_only=True):
    """What came of requests that were sent as fast as they were answered."""

    seconds: list[float] = field(default_factory=list)
    """Of each good answer."""
    errors: int = 0
    error: str = ""
    """The first."""

    @property
    def num(self) -> int:
        return len(self.seconds) + self.errors


async def drive(version: Version, requests: Sequence[Request], *, num: int, concurrency: int, until: float, seconds: float) -> Driven:
    """`num` requests, over and over the given ones, `concurrency` under way at once; none is begun after `until` (`time.perf_counter`).
    `seconds`: for each answer."""
    driven = Driven()
    left = iter(range(num))
    deaths = 0

    async def work() -> None:
        nonlocal deaths
        for index in left:
            if time.perf_counter() >= until or deaths >= MAX_DEATHS:
                return
            try:
                answer = await ask(version, copied(requests[index % len(requests)]), seconds)
            except FairleadError as error:
                driven.errors += 1
                deaths += isinstance(error, ReplicaDied)
                driven.error = driven.error or error.message
            else:
                driven.seconds.append(answer.seconds)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, num)):
            tasks.create_task(work())
    return driven


def copied(request: Request) -> Request:
    """The same question once more: a Request belongs to one way through a version."""
    return Request(model=request.model, inputs=request.inputs, prompt=request.prompt, parameters=request.parameters)


def rows_of(spec: ModelSpec, arrays: Tensors, *, at_once: int = 32) -> list[tuple[Request, int]]:
    """Requests for all rows of some arrays, and how many rows each has. Raises InvalidRequest where they do not fit the version."""
    fitting = {}
    for name, array in arrays.items():
        if (tensor := spec.input(name)) is None:
            raise InvalidRequest(f"the data set has an input '{name}', the version: {', '.join(each.name for each in spec.inputs)}")
        fitting[name] = _fitted(array, tensor)
    num_rows = len(next(iter(arrays.values())))
    if spec.batches:
        size = min(at_once, spec.batching.max_batch_size)
        cuts = [(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]
        return [
            (Request(model=spec.name, inputs={name: array[begin:end] for name, array in fitting.items()}), end - begin)
            for begin, end in cuts
        ]
    return [(Request(model=spec.name, inputs=_alone(spec, fitting, row)), 1) for row in range(num_rows)]


def _alone(spec: ModelSpec, arrays: Tensors, row: int) -> Tensors:
    """One row for a version without a batch dimension; one that declares a first dimension beyond the row's gets it of length 1."""
    alone = {}
    for name, array in arrays.items():
        tensor = spec.input(name)
        assert tensor is not None
        alone[name] = array[row : row + 1] if len(tensor.shape) == array.ndim else array[row]
    return alone


def _fitted(array: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    """In the version's datatype, where nothing of a whole number is lost. Raises InvalidRequest."""
    dtype = DTYPES[tensor.datatype]
    if array.dtype == dtype:
        return array
    if (array.dtype.kind == "O") != (dtype.kind == "O"):
        raise InvalidRequest(f"the data set's input '{tensor.name}' does not hold {tensor.datatype}")
    with np.errstate(all="ignore"):
        fitted = array.astype(dtype)
    if dtype.kind in "iub" and not np.array_equal(fitted, array):
        raise InvalidRequest(f"the data set's input '{tensor.name}' holds values that are no {tensor.datatype}")
    return fitted


def made_requests(spec: ModelSpec, tasks: Sequence[str], num: int) -> list[Request]:
    """Where nobody gave a question: random numbers of the right shapes, a few words. None where texts in tensors are asked for."""
    if "paint" in tasks:
        return [Request(model=spec.name, prompt=Paint(text=text, seed=index)) for index, text in enumerate(_TEXTS)]
    if "generate" in tasks:
        return [Request(model=spec.name, prompt=Generate(text=text, sampling=_SHORT)) for text in _TEXTS]
    if "embed" in tasks:
        return [Request(model=spec.name, prompt=Embed(text=text)) for text in _TEXTS]
    if "score" in tasks:
        return [Request(model=spec.name, prompt=Score(text=text, pair=_TEXTS[0])) for text in _TEXTS]
    wanted = [tensor for tensor in spec.inputs if not tensor.optional]
    if not wanted or any(tensor.datatype == "BYTES" for tensor in wanted):
        return []
    rng = np.random.default_rng(0)
    return [Request(model=spec.name, inputs={tensor.name: _random(tensor, rng) for tensor in wanted}) for _ in range(num)]


def _random(tensor: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    shape = tuple(1 if length == -1 else length for length in tensor.shape)
    dtype = DTYPES[tensor.datatype]
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def finite(array: np.ndarray) -> bool:
    """True of what holds no floating point numbers."""
    if array.dtype.kind == "O" or np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        return True
    return bool(np.isfinite(array.astype(np.float64, copy=False)).all())


def shown(value: Any, chars: int = 200) -> str:
    """Short enough for a report."""
    text = value if isinstance(value, str) else np.array2string(np.asarray(value), threshold=8, edgeitems=3, precision=6).replace("\n", "")
    return text if len(text) <= chars else f"{text[:chars]}..."
