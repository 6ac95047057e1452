"""Words of generation: what a model is asked that answers piece by piece, text or pictures, and what it answers.

These cross from the doors to the replica and back; every one is a msgspec Struct, so the wire needs no other form.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, structs

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
"""Of one stop string: each of the n choices looks for it on its own."""


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen, and when to stop. None: what the model's generation_config says, else the neutral value."""

    max_tokens: Count | None = None
    """None: until the model's context is full; 0: nothing but the prompt's log-probabilities."""
    fits_context: bool = False
    """Fewer than `max_tokens` where the context is full before; else a prompt that leaves no room for so many is refused."""
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    """0: the most likely token."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    """0 and -1: all."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] = field(default_factory=dict)
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[tuple[str, ...], Meta(max_length=MAX_STOPS)] = ()
    stop_token_ids: Annotated[tuple[Count, ...], Meta(max_length=MAX_STOPS)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """How many alternatives to tell beside each chosen token; 0 tells the chosen one alone."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"`min_tokens` ({self.min_tokens}) must be at most `max_tokens` ({self.max_tokens})")
        if any(not text for text in self.stop):
            raise ValueError("`stop` must not hold an empty string")
        if any(len(text) > MAX_STOP_CHARS for text in self.stop):
            raise ValueError(f"`stop` must hold strings of at most {MAX_STOP_CHARS} characters")

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Sampling":
        """The fields that are None filled in, by the model's own defaults first."""
        neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        changes = {name: defaults.get(name, value) for name, value in neutral.items() if getattr(self, name) is None}
        return structs.replace(self, **changes) if changes else self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GuideKind = Literal["json", "regex", "choice", "lark"]
MAX_GUIDE_BYTES = 256 << 10


class Guide(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer must look like (structured output)."""

    kind: GuideKind
    """json: a JSON schema; choice: a JSON array of texts, one of which is the answer; lark: a grammar of llguidance's dialect."""
    text: str
    parameter: str = ""
    """Of the request, which an error names: `response_format.json_schema.schema`."""


class ToolChoice(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an answer may use the tools of its Chat."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    """required: at least one call; named: a call of `name`."""
    name: str = ""
    allowed: tuple[str, ...] = ()
    """Names of those that may be called of the tools that the model is shown; empty: all of them."""
    parallel: bool = True
    """Several calls in one answer."""
    inputs: dict[str, Guide] = {}
    """By the name of a tool whose only argument is a text, `input`: what that must look like (lark, regex)."""

    def permits(self, name: str) -> bool:
        """Whether that tool may be called."""
        return name == self.name if self.mode == "named" else name in (self.allowed or (name,))


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a chat, as chat templates want it."""

    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    """What the assistant thought before it answered."""


class Chat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A conversation that the model's chat template turns into text."""

    messages: list[Message]
    tools: list[dict[str, Any]] = []
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str = ""
    """none, minimal, low, medium, high or xhigh; "" for the template's own. Needs a template that heeds it."""
    template_kwargs: dict[str, Any] = {}


class Generate(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Continue a text, token ids or a chat: exactly one of the three."""

    text: str | None = None
    token_ids: list[int] | None = None
    chat: Chat | None = None
    add_special_tokens: bool = True
    sampling: Sampling = Sampling()
    guide: Guide | None = None
    tool_choice: ToolChoice = ToolChoice()
    parsed: bool = False
    """Reasoning and tool calls of the answer stand apart from its text, where the model's format is known; else all is text."""
    adapter: str = ""
    """A LoRA adapter of the model."""
    stream: bool = False
    """Deltas as tokens come; otherwise one Delta for each choice, when it is complete."""
    salt: str = ""
    """Prefix-cache blocks are shared only among requests of the same salt: the tenant's."""


class Embed(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="embed"):
    """One vector for a text or token ids."""

    text: str | None = None
    token_ids: list[int] | None = None
    dimensions: Positive | None = None
    """Only so many leading components, normalised again (Matryoshka embeddings)."""


class Score(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="score"):
    """How well a text answers another: one number."""

    text: str
    """What is asked."""
    pair: str
    """What may answer it."""
    max_tokens: Count | None = None
    """What is longer is cut, 0: to what the model takes; None: it is refused."""
    raw: bool = False
    """The number before the model's activation."""


class Tokenize(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokenize"):
    text: str | None = None
    chat: Chat | None = None
    add_special_tokens: bool = True


class Detokenize(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="detokenize"):
    token_ids: list[int]


Mode = Literal["exact", "balanced", "turbo"]
"""How much a picture may lose for speed: nothing; reduced precision and compiled kernels; caches between steps, too."""
PictureFormat = Literal["png", "jpeg", "webp"]

MAX_PICTURES = 16
MAX_PROMPT_CHARS = 32_000


class Lora(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Low-rank weights laid over the model's for one request."""

    name: str
    """Of those that the model's folder holds."""
    scale: Annotated[float, Meta(ge=-4.0, le=4.0)] = 1.0


class Paint(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="paint"):
    """Pictures from a text, and from a picture where one is given. None: what the model's own defaults say."""

    text: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]
    negative: Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)] = ""
    """What it should not show; needs a model with classifier-free guidance."""
    width: Positive | None = None
    height: Positive | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_PICTURES)] = 1
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    """Of the first picture; the next ones have the numbers that follow. None is replaced at the door, so that a repeated job
    gives the same pictures."""
    num_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    scheduler: str = ""
    """"" for the model's own; else one of `ImageInfo.schedulers`."""
    image: bytes = b""
    """To begin from: PNG, JPEG or WebP."""
    mask: bytes = b""
    """White where `image` is painted anew."""
    strength: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    """How far from `image` it may go: the share of the steps that are computed."""
    loras: Annotated[tuple[Lora, ...], Meta(max_length=8)] = ()
    mode: Mode = "exact"
    preview_steps: Count = 0
    """A small preview every so many steps; 0: none."""
    format: PictureFormat = "png"
    quality: Annotated[int, Meta(ge=1, le=100)] = 90
    """Of JPEG and WebP."""
    tenant: str = ""
    """Whose compute it is: tenants share the engine's steps fairly. Set by the gateway."""

    def __post_init__(self) -> None:
        if self.mask and not self.image:
            raise ValueError("`mask` needs an `image` that it belongs to")
        if self.strength is not None and not self.image:
            raise ValueError("`strength` needs an `image` to begin from")


Prompt = Generate | Embed | Score | Tokenize | Detokenize | Paint
"""What goes down in `Request.prompt`."""


class Progress(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a picture is."""

    step: Count
    """Denoising steps done."""
    num_steps: Positive
    """Of those that are computed for it."""
    preview: bytes = b""
    """A small JPEG of what it looks like by now, where asked for."""


class Picture(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished one."""

    data: bytes
    """A file of `content_type`."""
    content_type: str
    width: int
    height: int
    seed: int
    mode: Mode = "exact"
    """In which it was computed."""
    num_steps: int
    guidance: float
    scheduler: str


FinishReason = Literal["", "stop", "length", "abort", "content_filter", "tool_calls"]


class ToolCall(Struct, kw_only=True, omit_defaults=True):
    """A piece of a call of a tool. The first piece of each call has `id` and `name`; the arguments of all its pieces, one after another,
    are a JSON object."""

    index: int
    """Of the call in its answer."""
    id: str = ""
    name: str = ""
    arguments: str = ""


def add_calls(calls: list[ToolCall], pieces: Iterable[ToolCall]) -> None:
    """Join pieces of calls to those before them: one ToolCall for each call."""
    for piece in pieces:
        call = next((each for each in reversed(calls) if each.index == piece.index), None)
        if call is None:
            calls.append(copy(piece))
        else:
            call.id, call.name = call.id or piece.id, call.name or piece.name
            call.arguments += piece.arguments


class TokenLogprob(Struct, frozen=True, array_like=True):
    token_id: int
    token: str
    """As text; bytes that are no whole character show as U+FFFD."""
    data: bytes
    """The token's own bytes."""
    logprob: float
    rank: int
    """1 is the most likely."""
    top: list["TokenLogprob"] = []


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that the prefix cache held."""
    reasoning_tokens: int = 0
    """Of the answer's, those before it began to answer."""
    megapixels: float = 0.0
    """Of finished pictures; 1 is 1,000,000 pixels."""
    num_pictures: int = 0
    num_steps: int = 0
    """Denoising steps that were computed, of all pictures."""
    compute_seconds: float = 0.0
    """The request's share of the time that steps took; 0 where the engine does not tell."""


class Phase(Struct, array_like=True):
    """A stretch of an engine's work on one request. An engine counts from the request's arrival, a timeline from the moment when it was
    sent to the engine: clocks of two processes need not agree."""

    name: str
    """waiting, prefill, decode, preempted; of pictures waiting, encode, denoise, decode."""
    start: float
    seconds: float
    num_steps: int = 0
    num_tokens: int = 0
    max_seqs: int = 0
    """The most sequences, or pictures, that shared one of its steps."""
    slowest: float = 0.0
    """Seconds of its slowest step."""


class Delta(Struct, kw_only=True, omit_defaults=True):
    """A piece of one answer: what comes up in `Response.delta`. The last one of a request carries `usage`."""

    index: int = 0
    """Which of the n choices, or of the n pictures."""
    text: str = ""
    reasoning: str = ""
    """Where asked to be parsed: what is thought before the answer; `text` is then the answer alone."""
    tool_calls: list[ToolCall] = []
    """Where asked to be parsed."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each token of the prompt, None for the first; in the request's first Delta."""
    finish_reason: FinishReason = ""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""
    usage: Usage | None = None
    vector: bytes = b""
    """An embedding, or a score, which is one number: float32, little-endian."""
    tokens: list[str] | None = None
    """Of Tokenize: the tokens as the vocabulary spells them."""
    progress: Progress | None = None
    """Of a picture; a newer one stands for those before it."""
    picture: Picture | None = None
    phases: list[Phase] = []
    """What the engine did for the request; in its last Delta."""


class ImageInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image engine takes."""

    family: str
    """`sd`, `sd3`, `flux`; `whole` for a pipeline that runs from beginning to end without a step schedule."""
    width: int
    """Default, in pixels."""
    height: int
    multiple: int
    """Width and height must be multiples of it."""
    max_pixels: int
    """width times height of one picture."""
    num_steps: int
    """Default."""
    max_steps: int
    guidance: float
    """Default."""
    has_guidance: bool = True
    """Whether `guidance` means something."""
    has_negative: bool = True
    schedulers: tuple[str, ...] = ()
    inputs: tuple[Literal["text", "image", "mask"], ...] = ("text",)
    """What it can begin from."""
    loras: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("exact",)
    previews: bool = True


class EngineInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a loaded engine tells of itself."""

    tasks: tuple[Literal["generate", "embed", "score", "tokenize", "paint"], ...]
    max_model_len: int = 0
    """Tokens of prompt and answer together."""
    vocab_size: int = 0
    architecture: str = ""
    has_chat_template: bool = False
    tools: bool = False
    """It is known how it writes calls of tools."""
    structured_output: bool = False
    """It takes guides."""
    num_kv_blocks: int = 0
    block_size: int = 0
    kv_block_bytes: int = 0
    """Of one block of KV memory, in all layers."""
    embedding_size: int = 0
    image: ImageInfo | None = None
    """Of an image engine."""
    explain: tuple[str, ...] = ()
    """What was chosen at load, and why, one readable line each."""


class KvShare(Struct, frozen=True):
    """KV memory that a server leaves to one engine, of a budget for all of them."""

    num_bytes: int
    most: int
    """What it may take where less would not hold one sequence of its whole context."""
    why: str
    """Of the budget: as part of a sentence."""


class EngineStats(Struct, kw_only=True):
    """Counted since the engine was loaded; histograms over `observe.table.SECONDS`."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Free, or holding nothing but prefix cache."""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    """Proposed by speculation and computed."""
    num_accepted_tokens: int = 0
    """Of those, the ones that were chosen."""
    num_steps: int = 0
    num_failed_steps: int = 0
    num_quarantined: int = 0
    """Requests that failed a step on their own."""
    num_grammars: int = 0
    """Compiled, or refused."""
    num_grammar_hits: int = 0
    """Asked for again, and known."""
    grammar_seconds: float = 0.0
    """That compiling took."""
    num_adapters: int = 0
    """Loaded now."""
    adapter_bytes: int = 0
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Sequences by finish reason (stop, length, abort, error)."""
    time_to_first_token: tuple[list[int], float] = ([], 0.0)
    """(counts by bucket, sum)."""
    inter_token: tuple[list[int], float] = ([], 0.0)
    queue_time: tuple[list[int], float] = ([], 0.0)
    step_time: tuple[list[int], float] = ([], 0.0)
    recovering: bool = False
    num_pictures: int = 0
    num_denoising_steps: int = 0
    """One for each picture in each step."""
    num_cached_steps: int = 0
    """Of those, the ones that the first-block cache answered."""
