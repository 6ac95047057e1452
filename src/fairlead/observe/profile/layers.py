"""Where the time of requests goes, layer by layer: from their timelines."""

from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from fairlead.core.timeline import BatchNote, Phases, Timeline

LAYERS = {
    "read": ("network and decoding", "bodies come slowly or are large: use the binary tensor form or gRPC, keep connections open, look at the clients"),
    "gateway": ("the gateway's own work", "filters, caches in Redis and signatures cost time here: see which the model's policy asks for"),
    "line": ("the gateway's line", "more is asked than the model computes at once: raise instances.count, or the engine's max_num_seqs, or limit tenants"),
    "wait": ("a free instance, or a fuller batch", "raise instances.count or batching.max_batch_size; lower batching.max_queue_delay where batches close for age"),
    "engine wait": ("a place among the engine's sequences", "raise max_num_seqs or its memory for the KV cache, or instances.count"),
    "transfer": ("rows laid together, to the replica and back", "tensors are large for what is computed: isolation: thread where the library frees the GIL, float16 or uint8 inputs, fewer outputs"),
    "compute": ("the model's own work", "see the kernels and the flame graph: a smaller or quantised model, more threads, a device"),
    "prefill": ("prompts being read", "prompts are long for their answers: prefix caching, shorter prompts, a larger max_batch_tokens"),
    "decode": ("tokens being made", "bound by the weights' way through memory: batch more sequences at once, set llm.speculation where few are asked at once, or serve a smaller model"),
    "denoise": ("pictures being denoised", "fewer steps, the first-block cache, a distilled model, a device"),
    "texts": ("prompts of pictures being encoded", "repeat prompts so that they are found again, or use a smaller text encoder"),
    "preempted": ("sequences that gave their memory back", "the KV cache is too small for what runs: give it more memory or lower max_num_seqs"),
    "elsewhere": ("other servers' answers", "look at that server; or route to another place"),
    "answer": ("split, encoded and written", "answers are large or read slowly: ask for fewer outputs, the binary form, or look at the clients"),
}  # fmt: skip
"""Layer → what its time passes with, and what helps where it is most of it."""
OF_PHASES = {
    "waiting": "engine wait",
    "prefill": "prefill",
    "denoise": "denoise",
    "encode": "texts",
    "preempted": "preempted",
    "decode": "decode",
}
BEFORE = frozenset(("admitted", "checked", "held", "degraded", "reused", "queued", "sent"))


class Layer(Struct):
    name: str
    about: str
    seconds: float
    """Per request."""
    share: float


class Answer(Struct):
    """Where the time goes."""

    num_requests: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    """Per request, from its arrival to its end."""
    layers: list[Layer] = []
    bottleneck: str = ""
    """In a sentence."""
    advice: str = ""


class LayerSums:
    """A listener of `Finished`: adds up what the requests of one model did. Keeps no request."""

    def __init__(self, model: str, version: str = "") -> None:
        self.model = model
        self.version = version
        self.num_requests = 0
        self.num_failed = 0
        self.seconds = 0.0
        self.sums: Counter[str] = Counter()

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        for timeline in timelines:
            if timeline.model != self.model or self.version not in ("", timeline.version) or timeline.outcome == "refused":
                continue
            if timeline.job and timeline.protocol != "job":  # who waits for the job
                continue
            self.num_requests += 1
            self.num_failed += timeline.outcome == "failure"
            self.seconds += timeline.seconds
            for name, seconds in layers_of(timeline).items():
                self.sums[name] += seconds  # type: ignore[assignment]

    def answer(self) -> Answer:
        number, whole = self.num_requests, self.seconds
        if not number or not whole:
            return Answer(bottleneck="no request of this model ended in that time: send it some while it is looked at")
        layers = [
            Layer(name, about, self.sums[name] / number, self.sums[name] / whole)
            for name, (about, _) in LAYERS.items()
            if self.sums[name] > 0
        ]
        worst = max(layers, key=lambda layer: layer.share)
        sentence = f"{worst.share:.0%} of the time of a request ({_span(worst.seconds)} of {_span(whole / number)}) goes to: {worst.about}"
        return Answer(number, self.num_failed, whole / number, layers, sentence, LAYERS[worst.name][1])


def layers_of(timeline: Timeline) -> dict[str, float]:
    """Seconds by layer: together all that the request took."""
    found: Counter[str] = Counter()
    at, computed = timeline.arrived, False
    """Up to where the time is accounted for."""

    def until(then: float, layer: str) -> None:
        nonlocal at
        if then > at:
            found[layer] += then - at  # type: ignore[assignment]
            at = then

    events = sorted(timeline.events, key=lambda event: event[0])  # an engine tells what it did when it has done it
    waited = any(name == "queued" for _, name, _ in events)
    for then, name, details in events:
        if name == "decoded":
            until(then, "read")
        elif name in BEFORE:
            until(then, "gateway")
        elif name == "turn":
            until(then, "line" if waited else "gateway")
        elif isinstance(details, BatchNote):
            until(details.began or then, "wait")
            if details.ended:
                compute = min(details.compute_seconds, max(details.ended - at, 0.0))
                until(details.ended - compute, "transfer")
                until(details.ended, "compute")
            computed = True
        elif isinstance(details, Phases):
            began = then
            until(began, "wait")
            painted = any(phase.name == "denoise" for phase in details.phases)
            for phase in sorted(details.phases, key=lambda each: each.start):
                layer = "answer" if painted and phase.name == "decode" else OF_PHASES.get(phase.name, "compute")
                until(began + phase.start + phase.seconds, layer)
            computed = True
        elif name in ("first", "computed") and not computed:
            until(then, "elsewhere")
            computed = True
    until(timeline.ended, "answer" if computed else "gateway")
    return dict(found)


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
