"""What the `input` of a job says, by what its model takes."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from fairlead.api.jobs.face import Face, base64_bytes, decode_named
from fairlead.api.kserve.codec import decode as decode_tensors
from fairlead.api.line import AccessLine
from fairlead.api.openai.bodies import Body, ChatBody, CompletionBody, EmbeddingBody, generate_of, texts_of
from fairlead.api.openai.errors import decode_body
from fairlead.api.openai.formats import guide_of
from fairlead.api.openai.passing import peek, raw_of
from fairlead.core.errors import InvalidRequest, NotFound, Unsupported
from fairlead.core.generation import MAX_PICTURES, Embed, Generate, Mode, PictureFormat
from fairlead.core.request import Request
from fairlead.core.specs import InputCheck
from fairlead.gateway.identity.identity import may_use

PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
"""The operation of the OpenAI API that an input is of, by the field that tells."""
INPUT = "input"
"""Where it stands in the whole body."""


class LoraBody(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    scale: Annotated[float, Meta(ge=-4.0, le=4.0)] = 1.0


class PaintBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Pictures, in our own words: core.generation.Paint, with files in base64."""

    prompt: Annotated[str, Meta(max_length=32_000)]
    negative_prompt: Annotated[str, Meta(max_length=32_000)] = ""
    width: Annotated[int, Meta(ge=1)] | None = None
    height: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_PICTURES)] = 1
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    num_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    scheduler: str = ""
    image: str = ""
    mask: str = ""
    strength: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    loras: Annotated[list[LoraBody], Meta(max_length=8)] = []
    mode: Mode = "exact"
    preview_steps: Annotated[int, Meta(ge=0)] = 0
    format: PictureFormat = "png"
    quality: Annotated[int, Meta(ge=1, le=100)] = 90

    def fields(self) -> dict[str, Any]:
        """Of a Paint. Raises InvalidRequest."""
        return {
            "text": self.prompt,
            "negative": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "n": self.n,
            "seed": self.seed,
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler,
            "image": base64_bytes(self.image, f"{INPUT}.image"),
            "mask": base64_bytes(self.mask, f"{INPUT}.mask"),
            "strength": self.strength,
            "loras": [{"name": lora.name, "scale": lora.scale} for lora in self.loras],
            "mode": self.mode,
            "preview_steps": self.preview_steps,
            "format": self.format,
            "quality": self.quality,
        }


def asked(face: Face, line: AccessLine, data: bytes) -> Request:
    """The request that a job of the line's model stores. `data`: its `input`, as JSON. Raises FairleadError, naming the field."""
    model, version, shared = line.model, line.version, face.shared
    fields = decode_named(data, dict[str, msgspec.Raw], INPUT)
    if "model" in fields:
        raise InvalidRequest("`input.model`: the model is named beside `input`")
    if shared.remote.remote(model) and may_use(line.caller, model):
        path = next((path for field, path in PATHS.items() if field in fields), None)
        if path is None:
            raise InvalidRequest("`input` must have `messages`, `prompt` or `input`: another server computes this model by the OpenAI API")
        whole = msgspec.json.encode({**fields, "model": model})
        raw = raw_of(peek(whole), path, whole, "application/json")
        if raw.stream:
            raise InvalidRequest("`input.stream`: a job's answer comes as a whole")
        return line.complete(Request(model=model, version=version, raw=raw, id=line.id))
    repository = shared.repository
    if not repository.known(model) or not may_use(line.caller, model):
        raise NotFound(f"there is no model `{model}`")
    info = repository.engine_info(model, version)
    if info is None:
        return line.complete(_tensors(face, line, data))
    if info.image is not None:
        return face.painted(line, decode_named(data, PaintBody, INPUT).fields())
    whole = msgspec.json.encode({**fields, "model": model})
    prompt: Generate | Embed
    body: Body | EmbeddingBody
    if "messages" in fields:
        body = chat = decode_body(whole, ChatBody)
        _check_kept(chat)
        prompt = generate_of(chat)
    elif "prompt" in fields:
        body = completion = decode_body(whole, CompletionBody)
        _check_kept(completion)
        if completion.echo:
            raise InvalidRequest("`input.echo` is not offered by jobs")
        text, ids = _one(texts_of(completion.prompt, "prompt"), "prompt")
        sampling, guide = completion.complete(), guide_of(completion.response_format, completion.structured_outputs)
        prompt = Generate(text=text, token_ids=ids, sampling=sampling, guide=guide, add_special_tokens=completion.add_special_tokens)
    elif "input" in fields:
        body = embedding = decode_body(whole, EmbeddingBody)
        if embedding.encoding_format == "base64":
            raise InvalidRequest("`input.encoding_format`: a job's vectors are lists of numbers")
        text, ids = _one(texts_of(embedding.input, "input"), "input")
        prompt = Embed(text=text, token_ids=ids, dimensions=embedding.dimensions)
    else:
        raise InvalidRequest("`input` must have `messages` or `prompt` (generate), or `input` (embed): this is a language model")
    request = line.complete(Request(model=model, version=version, prompt=prompt, id=line.id, priority=body.priority or 0))
    request.session = request.session or getattr(body, "prompt_cache_key", None) or body.user or ""
    return request


def _tensors(face: Face, line: AccessLine, data: bytes) -> Request:
    """KServe's body, in JSON."""
    request, form = decode_tensors(data, None, line.model, line.version, True)
    spec = face.shared.repository.find(line.model, line.version).spec
    if spec.streams:
        raise Unsupported("`model`: it answers with several responses, which a job does not keep")
    if form.classes:
        raise InvalidRequest("`input.outputs`: `classification` is not offered by jobs")
    if request.timeout:
        raise InvalidRequest("`input.parameters`: `timeout` is not for jobs, which have `start_seconds`")
    InputCheck(spec)(request)
    return request


def _check_kept(body: ChatBody | CompletionBody) -> None:
    """Raises InvalidRequest for what a job's result would not have."""
    if body.stream:
        raise InvalidRequest("`input.stream`: a job's answer comes as a whole; watch the job's events instead")
    if body.prompt_logprobs is not None or body.logprobs not in (None, False):
        raise InvalidRequest("`input.logprobs` and `input.prompt_logprobs` are not kept by jobs")


def _one(texts: list[tuple[str | None, list[int] | None]], field: str) -> tuple[str | None, list[int] | None]:
    if len(texts) != 1:
        raise InvalidRequest(f"`input.{field}`: a job takes one text")
    return texts[0]
