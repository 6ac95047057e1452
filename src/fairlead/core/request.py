"""What goes down through the rooms, and what comes back up."""

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol, runtime_checkable

from msgspec import Struct, field

from fairlead.core.caller import ANYONE, Caller, Envelope
from fairlead.core.errors import FairleadError
from fairlead.core.generation import Delta, Prompt, Usage
from fairlead.core.tensors import Tensors
from fairlead.core.timeline import Timeline


class Raw(Struct, kw_only=True):
    """A body that goes on as it came, to an upstream of the same protocol, with what little the gateway reads of it."""

    path: str
    """`/v1/chat/completions`, or what follows `/v2/models/NAME[/versions/N]` for KServe: `/infer`."""
    body: bytes | memoryview
    content_type: str = "application/json"
    accept: str = ""
    """What kinds of answer its caller takes."""
    header_length: str = ""
    """KServe's Inference-Header-Content-Length."""
    stream: bool = False
    max_tokens: int | None = None
    num_choices: int = 1
    num_rows: int = 0
    """Of tensors."""
    prompt_chars: int = 0
    """Of all texts together, from which the prompt's tokens are estimated."""
    prefix: bytes = b""
    """How the prompt begins, for prefix affinity: any bytes that are equal where prompts are."""


class Request(Struct, kw_only=True):
    """One question to one model.

    Times are seconds on the monotonic clock (`time.perf_counter`).
    """

    model: str
    inputs: Tensors = field(default_factory=dict)
    prompt: Prompt | None = None
    """In place of `inputs`, for models that generate or embed."""
    raw: Raw | None = None
    """In place of both, for models that another server computes."""
    caller: Caller = ANYONE
    signed_by: str = ""
    """The id of the key that signed it; "" for one without a signature."""
    envelope: Envelope | None = None
    """None where it came by no HTTP message of its own: gRPC, warm-up, jobs."""
    qos_class: str = ""
    """The class that it asks for; "" for its caller's."""
    session: str = ""
    """Requests of one session may be kept together."""
    id: str = ""
    """The caller's id, echoed in the answer; "" when it gave none."""
    log_id: str = ""
    """What logs and usage records know it by: its x-request-id."""
    version: str = ""
    """"" for the one that the version policy makes the default."""
    outputs: tuple[str, ...] | None = None
    """Names of the outputs wanted; None for all."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the model itself may read; the ones with a meaning of their own are fields here."""
    priority: int = 0
    """1 is the highest level, 0 the model's default."""
    timeout: float = 0.0
    """Seconds that it may wait for its turn; 0 for the model's default."""
    trace: str = ""
    """The W3C traceparent that came with it."""
    timeline: Timeline | None = None
    """What happens to it is noted here; None for one that nobody asked for: warm-up, shadow copies, the gateway's own."""
    booked: Callable[[Any], None] | None = None
    """Takes its usage record in place of the log: a job's is written together with its end."""
    arrived: float = 0.0
    num_requests: int = 1
    """As limits and usage count it: of the prompts that came in one HTTP request, the first is one and the others are none."""
    num_rows: int = 1
    """Length of the batch dimension; set by the check against the model's spec."""

    @property
    def traceparent(self) -> str:
        """What goes with it to the place that computes it: our own, or where nothing is traced, what came with it."""
        timeline = self.timeline
        return self.trace if timeline is None or timeline.sample < 0.0 else timeline.outgoing()


class Response(Struct, kw_only=True):
    """One answer of one or more."""

    model: str
    version: str
    outputs: Tensors = field(default_factory=dict)
    delta: Delta | None = None
    """In place of `outputs`: a piece of the answer to a `prompt`."""
    raw: bytes | None = None
    """In place of both: bytes of an upstream's answer."""
    status: int = 200
    """Of the upstream's answer, with `raw`: an error's body is passed on as it is."""
    usage: Usage | None = None
    """What an upstream said that it used; an engine says it in its last Delta."""
    headers: dict[str, str] = field(default_factory=dict)
    """What the gateway wants said of it to the caller; of a stream, only those of the first response are."""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Where the answers to one request go: `respond` any number of times, then `close` exactly once.

    Called from the event loop only. Neither may raise.
    """

    def respond(self, response: Response) -> None: ...

    def close(self, error: FairleadError | None) -> None:
        """No more answers: all went well (None), or this went wrong."""


class Ticket(Protocol):
    """A request on its way."""

    def cancel(self) -> None:
        """The caller left. Its sink is closed with Cancelled unless it was already closed."""


@runtime_checkable
class Pausable(Ticket, Protocol):
    """A ticket of an answer in pieces, whose reader may be slow."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Inference(Protocol):
    """One noun, one verb: what answers requests. The gateway is one, and so is a model repository alone."""

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """For a request with one response. Errors go to the sink, possibly before this returns."""

    def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """One response, or as many as there are. Raises FairleadError; closing it cancels."""
