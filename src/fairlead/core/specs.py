"""What is known of a model: its `model.yaml`, completed by what its artefact tells."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, structs

from fairlead.core.errors import InvalidRequest
from fairlead.core.request import Request
from fairlead.core.tensors import DATATYPES, Tensors, datatype_of

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"
]
Dimension = Annotated[int, Meta(ge=-1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class TensorSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output. `shape` is the whole shape, -1 where any length goes; a leading -1 is the batch."""

    name: Annotated[str, Meta(min_length=1)]
    datatype: Datatype
    shape: tuple[Dimension, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()
    """Class names by index, for the classification extension."""


class TimeoutAction(StrEnum):
    REJECT = "REJECT"
    DELAY = "DELAY"


class QueuePolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one priority level waits (Triton's ModelQueuePolicy)."""

    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout: Seconds = 0.0
    """0: none."""
    allow_timeout_override: bool = True
    """A request may set a timeout of its own: lower than the default, or any where there is no default."""
    max_queue_size: Count = 0
    """Requests; 0 leaves only the bounds on rows and bytes."""


class BatchingSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Dynamic batching (Triton's ModelDynamicBatching). Sizes and bounds count rows, not requests."""

    max_batch_size: Count = 64
    """0: one request at a time, no batch dimension is assumed."""
    preferred_batch_sizes: tuple[Positive, ...] = ()
    max_queue_delay: Seconds = 0.0
    """0: a batch is what piled up while the instances were busy."""
    preserve_ordering: bool = False
    priority_levels: Count = 0
    default_priority: Count = 0
    queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policies: dict[int, QueuePolicy] = field(default_factory=dict)
    max_queue_rows: Positive = 65_536
    max_queue_bytes: Positive = 1 << 30

    def __post_init__(self) -> None:
        if any(size > self.max_batch_size for size in self.preferred_batch_sizes):
            raise ValueError(f"`preferred_batch_sizes` must be at most `max_batch_size`, {self.max_batch_size}")
        if self.default_priority > self.priority_levels:
            raise ValueError(f"`default_priority` must be one of the `priority_levels`, of which there are {self.priority_levels}")
        if any(not 1 <= level <= self.priority_levels for level in self.priority_queue_policies):
            raise ValueError(f"`priority_queue_policies` must be of the `priority_levels`, of which there are {self.priority_levels}")


class Isolation(StrEnum):
    AUTO = "auto"
    """What suits the backend: threads where the library releases the GIL, else a process."""
    THREAD = "thread"
    PROCESS = "process"


class Execution(StrEnum):
    """Where a thread-isolated instance computes."""

    AUTO = "auto"
    """In the event loop while its measured batch time is small, else in a thread."""
    INLINE = "inline"
    THREAD = "thread"


class InstancesSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Positive = 1
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    isolation: Isolation = Isolation.AUTO
    execution: Execution = Execution.AUTO
    threads: Count = 0
    """Intra-op threads of each instance; 0 divides the cores by the instances."""


class VersionPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of the three; without any, `latest: 1`."""

    latest: Count = 0
    all: bool = False
    specific: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        if (self.latest > 0) + self.all + bool(self.specific) > 1:
            raise ValueError("only one of `latest`, `all` and `specific` can be wanted")


class Sample(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data for one warm-up request: an array of zeros or random numbers, or the values themselves."""

    shape: tuple[Positive, ...] = ()
    fill: Literal["zeros", "random"] = "zeros"
    data: list[Any] | None = None

    def __post_init__(self) -> None:
        if self.data is not None and self.fill != "zeros":
            raise ValueError("`data` and `fill` cannot both be given")


class WarmupSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inputs: dict[str, Sample]
    count: Positive = 1


class SpeculationSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `llm.speculation` section: tokens that are proposed cheaply and computed several at once. Answers are the same."""

    method: Literal["off", "ngram", "draft"] = "off"
    """ngram: what followed when the last tokens stood in the text before; draft: what a smaller model says."""
    num_tokens: Annotated[int, Meta(ge=1, le=16)] = 8
    """Proposed at once at most; how many they are follows from how often they are right and what they cost."""
    draft: str = ""
    """With `method: draft`: the folder of a smaller checkpoint with the same tokenizer, inside the version's folder, the
    model's, or the repository (`small/1`)."""

    def __post_init__(self) -> None:
        if (self.method == "draft") != bool(self.draft):
            raise ValueError("`method: draft` and `draft`, the smaller model's folder, belong together")
        parts = self.draft.split("/")
        if self.draft.startswith("/") or ".." in parts or "\\" in self.draft or ":" in parts[0]:
            raise ValueError(f"`draft` is {self.draft!r}, and must be a folder inside the model's or the repository")


class LlmSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `llm` section: how a language model's engine runs. Every default suits a small machine."""

    task: Literal["auto", "generate", "embed", "score"] = "auto"
    """auto: what the checkpoint's architecture and files say."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the checkpoint's own; float16 becomes bfloat16 on CPU."""
    max_model_len: Count = 0
    """Tokens of prompt and answer together; 0: the checkpoint's context, as far as KV memory holds it."""
    kv_cache_bytes: Count = 0
    """KV memory of one instance; 0: enough for `max_num_seqs` sequences of 2,048 tokens, at most half of what is left of the
    server's budget for all instances of the model together."""
    block_size: Literal[16, 32, 64, 128] = 32
    """Tokens of one KV block."""
    max_num_seqs: Positive = 64
    """Sequences that compute at once."""
    max_batch_tokens: Positive = 512
    """Tokens that one step computes: longer prompts are cut into chunks."""
    max_waiting: Positive = 1024
    """Requests that may wait; more get 429."""
    prefix_caching: bool = True
    decoder: Literal["auto", "graph", "lean"] = "auto"
    """lean: Fairlead's own decoder; graph: transformers' model; auto: lean where a probe at load shows the same logits."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """native: C++ kernels; torch: stock operators; auto: native where a compiler is found or a built copy is cached."""
    quantization: Literal["off", "int8"] = "off"
    """int8: weights as bytes, each output with its scale; on CPU tokens too. Twice as fast for few tokens, half the memory."""
    deterministic: bool = False
    """A request's tokens and log-probabilities have the same bits whatever is computed beside it (CPU, lean decoder)."""
    loras: str = "loras"
    """A folder in the version's: every folder in it that holds an adapter_config.json is a LoRA adapter, asked for as `model: NAME:ADAPTER`."""
    lora_bytes: Count = 512 << 20
    """Memory for adapters; those that nobody uses make room for others. 0: no adapters."""
    max_lora_rank: Positive = 64
    """Adapters of a higher rank are refused."""
    guides: bool = True
    """Structured output; false: requests for it are refused."""
    forced_tokens: bool = True
    """Tokens that a grammar leaves no choice about are computed in one step with those before them."""
    speculation: SpeculationSpec = SpeculationSpec()
    cuda_graphs: bool = True
    """On a CUDA device, steps that only decode are captured and replayed."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """on: the next step is planned and given to the device while it computes one; auto: on a CUDA device, without speculation."""
    chat_template: str = ""
    """A file in the model's folder to use in place of the checkpoint's own template."""
    response_template: str = "auto"
    """How its answers are parted into reasoning, text and calls of tools: auto (the tokenizer's own, else the format that its chat
    template tells), off, the name of a format, or a file in the model's folder."""
    step_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds after which a step counts as hung: its process is started again."""


class SleepSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `sleep` section: of a model with an engine that gives its memory back while nobody asks it."""

    idle_seconds: Seconds = 0.0
    """Without a request, after which it falls asleep; 0: never by itself."""
    level: Literal[1, 2] = 2
    """1: its process stays, and gives KV memory back; 2: its process ends."""
    wake: Literal["request", "manual"] = "request"
    """request: the first request wakes it; manual: none does, they are refused."""
    wait_seconds: Annotated[float, Meta(gt=0)] = 60.0
    """That a request waits for it to wake, where its own timeout is not shorter; then it gets 503."""


class EngineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `engine` section: an OpenAI server of somebody else's, which is started for the model, or is there already (`url`)."""

    url: str = ""
    """Of a server that runs already, without `/v1`; "": one is started."""
    model: str = ""
    """With `url`: what the server calls the model ("": the same). Else: what it loads (a path, or a name that it downloads); "": the version's folder."""
    key: str = ""
    """The server's API key; `${NAME}` for the value of a variable of the environment."""
    environment: str = ""
    """A virtual environment (or any folder with `bin`) that holds its program; "": found by PATH."""
    command: tuple[str, ...] = ()
    """In place of the backend's own: `{model}`, `{name}`, `{host}` and `{port}` are filled in."""
    args: tuple[str, ...] = ()
    """Behind the command."""
    env: dict[str, str] = field(default_factory=dict)
    """Laid over what it is given of this server's environment; `${NAME}` as in `key`."""
    health: str = ""
    """The path that tells its health; "": the backend's own."""
    start_timeout: Annotated[float, Meta(gt=0)] = 600.0
    """Seconds until it must answer."""
    restarts: Count = 10
    """Starts in a row that may fail before it is left down."""
    stop_timeout: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    max_in_flight: Positive = 256
    """Requests there at once; more get 429."""
    timeout: Annotated[float, Meta(gt=0)] = 600.0
    """Seconds without a byte of an answer."""

    def __post_init__(self) -> None:
        given = [name for name in ("environment", "command", "args", "env") if getattr(self, name)]
        if self.url and given:
            raise ValueError(f"`{given[0]}` is for a server that is started: leave it out, or leave `url` out")


class DiffusionSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `diffusion` section: how an image model's engine runs. Every default suits a small machine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on CPU, the checkpoint's own on CUDA (bfloat16 where it has none)."""
    width: Count = 0
    """Of pictures whose size is not asked for; 0: what the checkpoint was trained for."""
    height: Count = 0
    num_steps: Count = 0
    """Of requests that name none; 0: what is usual for the pipeline."""
    guidance: Annotated[float, Meta(ge=0.0)] | None = None
    """Of requests that name none; null: what is usual for the pipeline."""
    max_pixels: Positive = 4 << 20
    max_steps: Positive = 200
    max_batch_tokens: Positive = 4096
    """Latent tokens (of 2x2 latents) that one forward computes, guidance included; a picture larger than that is computed alone."""
    max_num_seqs: Positive = 32
    """Pictures under way at once; others wait."""
    max_waiting: Positive = 256
    """Requests that may wait; more get 429."""
    prompt_cache: Count = 64
    """Prompts whose embeddings are kept; 0: none."""
    first_block_threshold: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """First-block cache: a step whose first block changes relatively less than this reuses the rest of the step before.
    0: only in mode `turbo`, which then takes 0.08."""
    tiling_pixels: Positive = 2 << 20
    """Pictures of more are decoded in tiles."""
    compile: bool = False
    """Compile the repeated blocks (CUDA), with bucketed shapes and a cache that lasts."""
    loras: str = "loras"
    """A folder in the model's: every *.safetensors in it is a LoRA that requests may name."""
    step_timeout: Annotated[float, Meta(gt=0)] = 120.0
    """Seconds after which a step counts as hung: its process is started again."""


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model.yaml`: every key is optional where the artefact or the folder tells it."""

    name: str = ""
    backend: str = ""
    """onnx, xgboost, lightgbm, catboost, sklearn, torchscript, torch_export, llm, diffusion, python, or somebody else's
    engine (vllm, sglang, tensorrt_llm, tgi, llama_cpp, openai); "" to detect it."""
    file: str = ""
    """The artefact's name inside the version folder; "" to detect it."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batching: BatchingSpec = BatchingSpec()
    instances: InstancesSpec = InstancesSpec()
    version_policy: VersionPolicy = VersionPolicy()
    warmup: tuple[WarmupSpec, ...] = ()
    trusted: bool = False
    """The operator vouches for an artefact whose loading runs code of its own (joblib, pickle)."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Passed to the backend, or to a Python model's `load`."""
    llm: LlmSpec = LlmSpec()
    """Of language models and embedders."""
    diffusion: DiffusionSpec = DiffusionSpec()
    """Of image models."""
    engine: EngineSpec = EngineSpec()
    """Of models that somebody else's engine computes."""
    sleep: SleepSpec = SleepSpec()
    """Of models with an engine of Fairlead's own."""
    streams: bool = False
    """Several responses may answer one request (Triton: decoupled). Told by the artefact."""

    @property
    def batches(self) -> bool:
        """Whether rows of several requests may run together."""
        return self.batching.max_batch_size > 0

    def input(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.outputs if spec.name == name), None)

    def replace(self, **changes: Any) -> "ModelSpec":
        return structs.replace(self, **changes)


class InputCheck:
    """Holds requests against one model's spec; built once per version because it runs on every request.

    The messages are Triton's, which its users' programs match on.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.model = spec.name
        self.max_batch_size = spec.batching.max_batch_size
        self.specs = {s.name: s for s in spec.inputs}
        self.required = frozenset(s.name for s in spec.inputs if not s.optional)
        self.outputs = frozenset(s.name for s in spec.outputs)
        self.items = {s.name: s.shape[1:] if self.max_batch_size else s.shape for s in spec.inputs}
        self.fixed = {name: item for name, item in self.items.items() if -1 not in item}

    def __call__(self, request: Request) -> None:
        """Set `request.num_rows`. Raises InvalidRequest."""
        inputs = request.inputs
        if inputs.keys() != self.required:
            self._check_names(inputs)
        rows = 1
        first = True
        for name, array in inputs.items():
            spec = self.specs[name]
            if DATATYPES.get(array.dtype) != spec.datatype:
                raise InvalidRequest(
                    f"inference input '{name}' data-type is '{datatype_of(array)}', but model '{self.model}' expects '{spec.datatype}'"
                )
            shape = array.shape
            if self.max_batch_size:
                if not shape or shape[1:] != self.fixed.get(name):
                    self._check_shape(spec, shape)
                if first:
                    rows, first = shape[0], False
                elif shape[0] != rows:
                    raise InvalidRequest(f"input '{name}' batch size does not match other inputs for '{self.model}'")
            elif shape != self.fixed.get(name):
                self._check_shape(spec, shape)
        if self.max_batch_size:
            if rows > self.max_batch_size:
                raise InvalidRequest(f"inference request batch-size must be <= {self.max_batch_size} for '{self.model}'")
            if rows == 0 and not first:
                raise InvalidRequest(f"inference request for '{self.model}' has an empty batch dimension")
        request.num_rows = rows
        if request.outputs is not None and not self.outputs.issuperset(request.outputs):
            unknown = next(name for name in request.outputs if name not in self.outputs)
            raise InvalidRequest(
                f"unexpected inference output '{unknown}' for model '{self.model}', allowed outputs are: {', '.join(sorted(self.outputs))}"
            )

    def _check_names(self, inputs: Tensors) -> None:
        missing = [name for name in self.specs if name in self.required and name not in inputs]
        if missing:
            expected, got = len(self.required), len(inputs)
            raise InvalidRequest(
                f"expected {expected} inputs but got {got} inputs for model '{self.model}'. Got input(s) {_quoted(inputs)}, but missing required input(s) {_quoted(missing)}. Please provide all required input(s)."
            )
        for name in inputs:
            if name not in self.specs:
                allowed = ", ".join(self.specs)
                raise InvalidRequest(f"unexpected inference input '{name}' for model '{self.model}', allowed inputs are: {allowed}")

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        want = spec.shape
        if len(shape) == len(want) and all(w == -1 or w == s for w, s in zip(want, shape, strict=True)):
            return
        note = ""
        if self.max_batch_size:
            note = (
                ". NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each input shape."
                " If you want to specify the full shape including the batch dim in your input dims config, try setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
            )
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{self.model}'. Expected {_dims(want)}, got {_dims(shape)}{note}"
        )


def _quoted(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _dims(shape: Iterable[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
