"""What finished requests add up to, by tenant and by model: all that needs a request's whole timeline."""

from collections.abc import Callable, Iterator, Sequence

from fairlead.core.timeline import Phases, Timeline
from fairlead.observe.metrics import Histogram, Sample
from fairlead.observe.table import TABLE

OTHER = "other"
"""All tenants beyond the most that are told apart."""
VLLM_PHASES = {"prefill": "vllm:request_prefill_time_seconds", "decode": "vllm:request_decode_time_seconds"}


class _Sums:
    """Of one tenant."""

    __slots__ = ("cost", "input_tokens", "outcomes", "output_tokens")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.input_tokens = self.output_tokens = 0
        self.cost = 0.0


class Traffic:
    """A listener of `Finished`."""

    def __init__(self, *, max_tenants: int = 200, vllm_names: bool = False, known: Callable[[str], bool] = lambda _: True) -> None:
        """`known`: whether a model is served here or elsewhere: other names are anybody's, and become no label."""
        self.max_tenants = max_tenants
        self.vllm_names = vllm_names
        self.known = known
        self._tenants: dict[str, _Sums] = {}
        """The first that asked, and OTHER."""
        self._costs: dict[str, float] = {}
        """By model."""
        self._histograms: dict[tuple[str, str], Histogram] = {}
        """(name, model)."""

    def __call__(self, timelines: Sequence[Timeline]) -> None:
        for timeline in timelines:
            if timeline.kind:
                self._add(timeline)

    def _add(self, timeline: Timeline) -> None:
        sums = self._tenants.get(timeline.tenant) or self._newcomer(timeline.tenant)
        outcomes, outcome = sums.outcomes, timeline.outcome
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        usage, cost = timeline.usage, timeline.cost
        if usage is not None:
            sums.input_tokens += usage.prompt_tokens
            sums.output_tokens += usage.completion_tokens
        if cost:
            sums.cost += cost
            model = self._label(timeline.model)
            self._costs[model] = self._costs.get(model, 0.0) + cost
        queued = 0.0
        for at, name, _ in timeline.events:
            if name == "queued":
                queued = at
            elif name == "turn" and queued:
                self._observe("fairlead_gateway_wait_seconds", self._label(timeline.model), at - queued)
                queued = 0.0
        if self.vllm_names and timeline.kind == "generate":
            self._add_generation(timeline)

    def _newcomer(self, tenant: str) -> _Sums:
        name = tenant if len(self._tenants) < self.max_tenants else OTHER
        return self._tenants.setdefault(name, _Sums())

    def _label(self, model: str) -> str:
        return model if self.known(model) else ""

    def _add_generation(self, timeline: Timeline) -> None:
        model, usage = self._label(timeline.model), timeline.usage
        if model and usage is not None:
            self._observe("vllm:request_prompt_tokens", model, usage.prompt_tokens)
            self._observe("vllm:request_generation_tokens", model, usage.completion_tokens)
        for _, _, details in timeline.events:
            if isinstance(details, Phases):
                inference = 0.0
                for phase, name in VLLM_PHASES.items():
                    seconds = sum(each.seconds for each in details.phases if each.name == phase)
                    inference += seconds
                    self._observe(name, details.model, seconds)
                self._observe("vllm:request_inference_time_seconds", details.model, inference)

    def _observe(self, name: str, model: str, value: float) -> None:
        histogram = self._histograms.get((name, model))
        if histogram is None:
            histogram = self._histograms[name, model] = Histogram(TABLE[name].bounds)
        histogram.observe(value)

    def samples(self) -> Iterator[Sample]:
        for tenant, sums in list(self._tenants.items()):
            for outcome, number in list(sums.outcomes.items()):
                yield "fairlead_tenant_requests_total", (tenant, outcome), number
            if sums.input_tokens or sums.output_tokens:
                yield "fairlead_tenant_tokens_total", (tenant, "input"), sums.input_tokens
                yield "fairlead_tenant_tokens_total", (tenant, "output"), sums.output_tokens
            if sums.cost:
                yield "fairlead_tenant_cost_total", (tenant,), sums.cost
        for model, money in list(self._costs.items()):
            yield "fairlead_cost_total", (model,), money
        for (name, model), histogram in list(self._histograms.items()):
            yield name, (model,), histogram
