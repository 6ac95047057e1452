"""A language model asked with tensors, as Triton's vLLM backend is: text in `text_input`, text out in `text_output`."""

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, structs

from fairlead.core.caller import ANYONE
from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.generation import Delta, Embed, EngineInfo, Generate, Prompt, Sampling, Score
from fairlead.core.request import Request
from fairlead.core.specs import TensorSpec
from fairlead.core.tensors import Tensors, object_array

TEXT = TensorSpec(name="text_input", datatype="BYTES", shape=(1,))
OPTIONS = (
    TensorSpec(name="stream", datatype="BOOL", shape=(1,), optional=True),
    TensorSpec(name="sampling_parameters", datatype="BYTES", shape=(1,), optional=True),
    TensorSpec(name="exclude_input_in_output", datatype="BOOL", shape=(1,), optional=True),
)
ANSWER = TensorSpec(name="text_output", datatype="BYTES", shape=(-1,))
PAIR = TensorSpec(name="text_pair", datatype="BYTES", shape=(1,))
SCORE = TensorSpec(name="score", datatype="FP32", shape=(1,))
VECTOR = TensorSpec(name="embedding", datatype="FP32", shape=(-1,))
FLAGS = ("stream", "exclude_input_in_output")


class TextForm(Struct, frozen=True):
    """How the answer to one request becomes tensors."""

    prompt: Prompt
    prefix: str = ""
    """What stands before every answer: the prompt, unless it is to be left out."""

    @property
    def streams(self) -> bool:
        return isinstance(self.prompt, Generate) and self.prompt.stream

    def tensors(self, deltas: list[Delta]) -> Tensors:
        """Of one response: several Deltas are the choices of one answer."""
        if isinstance(self.prompt, Embed):
            return {VECTOR.name: np.frombuffer(deltas[0].vector, "<f4")}
        if isinstance(self.prompt, Score):
            return {SCORE.name: np.frombuffer(deltas[0].vector, "<f4")}
        texts = [self.prefix] * (self.prompt.sampling.n if isinstance(self.prompt, Generate) else 1)
        for delta in deltas:
            texts[delta.index] += delta.text
        return {ANSWER.name: object_array([text.encode() for text in texts], (len(texts),))}


def tensor_specs(info: EngineInfo) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a model with this engine; none of one that makes pictures."""
    if "paint" in info.tasks:
        return (), ()
    if "generate" in info.tasks:
        return (TEXT, *OPTIONS), (ANSWER,)
    if "score" in info.tasks:
        return (TEXT, PAIR), (SCORE,)
    return (TEXT,), (VECTOR,)


def text_form(request: Request, info: EngineInfo) -> TextForm:
    """Read a request whose tensors have been held against the specs. Sampling parameters stand in `sampling_parameters` as
    JSON, else in the request's parameters. Raises InvalidRequest or Unsupported."""
    if "paint" in info.tasks:
        raise Unsupported(f"model '{request.model}' makes pictures, and takes no tensors: ask it with a job (POST /v1/jobs)")
    text = _text(request.inputs, TEXT.name)
    if "score" in info.tasks:
        return TextForm(Score(text=text, pair=_text(request.inputs, PAIR.name)))
    if "generate" not in info.tasks:
        return TextForm(Embed(text=text))
    parameters = dict(request.parameters)
    flags = {name: parameters.pop(name, None) for name in FLAGS}
    for name in FLAGS:
        if name in request.inputs:
            flags[name] = bool(request.inputs[name][0])
        elif not isinstance(flags[name], (bool, type(None))):
            raise InvalidRequest(f"parameter '{name}' must be a boolean")
    if "sampling_parameters" in request.inputs:
        parameters = _decode(_text(request.inputs, "sampling_parameters"))
    elif isinstance(parameters.get("sampling_parameters"), str):
        parameters = _decode(parameters["sampling_parameters"])
    stream, exclude = bool(flags["stream"]), flags["exclude_input_in_output"]
    if stream and exclude is False:
        raise InvalidRequest("when streaming, `exclude_input_in_output` cannot be false")
    sampling = _sampling(parameters)
    salt = "" if request.caller is ANYONE else request.caller.tenant
    return TextForm(Generate(text=text, sampling=sampling, stream=stream, salt=salt), "" if stream or exclude else text)


def _text(inputs: Tensors, name: str) -> str:
    try:
        return bytes(inputs[name][0]).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input '{name}' is not UTF-8: {error}") from None


def _decode(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"input 'sampling_parameters' is not a JSON object: {error}") from None


def _sampling(parameters: dict[str, Any]) -> Sampling:
    known = {field.name for field in structs.fields(Sampling)}
    if unknown := sorted(parameters.keys() - known):
        raise InvalidRequest(f"unknown sampling parameter '{unknown[0]}'; there are: {', '.join(sorted(known))}")
    if isinstance(parameters.get("stop"), str):
        parameters = parameters | {"stop": [parameters["stop"]]}
    try:
        return msgspec.convert(parameters, Sampling, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None
