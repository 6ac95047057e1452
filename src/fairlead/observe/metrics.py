"""What is counted, and how Prometheus reads it.

Counting happens in the event loop only, in plain integers and lists: an observation is a bisect and an
addition (0.2 microseconds), where a client library's locked histogram costs four times that. The library
renders at scrape time.

| metric | unit | labels |
|---|---|---|
| fairlead_requests_total | requests | model, version, outcome (success, failure, cancelled, refused) |
| fairlead_rows_total | rows | model, version |
| fairlead_request_seconds | seconds | model, version |
| fairlead_queue_seconds | seconds | model, version |
| fairlead_compute_seconds | seconds, per batch | model, version |
| fairlead_batch_rows | rows, per batch | model, version |
| fairlead_batches_total | batches | model, version, close_reason |
| fairlead_queue_requests | requests waiting now | model, version |
| fairlead_queue_rows | rows waiting now | model, version |
| fairlead_instance_restarts_total | restarts | model, version |
| fairlead_responses_total | infer requests, as the protocol's status tells their end | protocol, status |
| fairlead_model_loads_total | loads | model, outcome (success, failure) |
| fairlead_time_to_first_token_seconds | seconds | model, version |
| fairlead_inter_token_seconds | seconds between two tokens of one answer | model, version |
| fairlead_generation_queue_seconds | seconds from arrival to the first step | model, version |
| fairlead_step_seconds | seconds, per step of the engine | model, version |
| fairlead_prompt_tokens_total | tokens | model, version |
| fairlead_generated_tokens_total | tokens | model, version |
| fairlead_prefix_cache_queried_tokens_total | tokens of prompts that were looked up | model, version |
| fairlead_prefix_cache_hit_tokens_total | tokens found | model, version |
| fairlead_preemptions_total | sequences that gave their blocks back and started again | model, version |
| fairlead_finished_sequences_total | sequences | model, version, reason (stop, length, abort, error) |
| fairlead_pictures_total | pictures that were finished | model, version |
| fairlead_denoising_steps_total | denoising steps, of every picture in each step | model, version |
| fairlead_cached_denoising_steps_total | of these, the ones that the first-block cache answered | model, version |
| fairlead_engine_failed_steps_total | steps | model, version |
| fairlead_quarantined_requests_total | requests that failed a step on their own | model, version |
| fairlead_kv_blocks | blocks of KV memory | model, version |
| fairlead_kv_blocks_free | blocks that are free, or hold nothing but prefix cache | model, version |
| fairlead_sequences | sequences now | model, version, state (running, waiting) |
| fairlead_gateway_waiting_requests | requests in the gateway's lines now | model, priority |
| fairlead_gateway_in_flight_requests | requests now, of models that have such a line | model |
| (fairlead.observe.counts.COUNTS) | what the gateway counts | |
| fairlead_process_* , python_* | the client library's own |

Engines count in their own processes and tell now and then (`EngineStats`); the counts of a replica that died stay.

Cardinality is bounded by the loaded versions; the series of an unloaded version end with it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from msgspec import structs
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fairlead.core.generation import EngineStats
from fairlead.observe.counts import Counts

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        return buckets(self.bounds, self.counts)


def buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    total = 0
    result: list[tuple[str, float]] = []
    for bound, number in zip((*map(float, bounds), float("inf")), counts, strict=True):
        total += number
        result.append(("+Inf" if bound == float("inf") else repr(bound), total))
    return result


class Durations:
    """A count and a sum of nanoseconds, as Triton's statistics give them."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, seconds: float, number: int = 1) -> None:
        self.count += number
        self.ns += int(seconds * 1e9)

    def json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class BatchDurations:
    __slots__ = ("compute_infer", "compute_input", "compute_output")

    def __init__(self) -> None:
        self.compute_input = Durations()
        self.compute_infer = Durations()
        self.compute_output = Durations()

    def json(self) -> dict[str, dict[str, int]]:
        return {
            "compute_input": self.compute_input.json(),
            "compute_infer": self.compute_infer.json(),
            "compute_output": self.compute_output.json(),
        }


class ModelMetrics:
    """Everything counted of one version of one model."""

    def __init__(
        self,
        model: str,
        version: str,
        queue: Callable[[], tuple[int, int]],
        restarts: Callable[[], int],
        engine: Callable[[], EngineStats] | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.queue = queue
        """(requests, rows) waiting now."""
        self.restarts = restarts
        self.engine = engine
        """Of a model that has one: what its replicas told."""
        self.latency = Histogram(SECONDS)
        self.queued = Histogram(SECONDS)
        self.compute = Histogram(SECONDS)
        self.batch_rows = Histogram(ROWS)
        self.close_reasons: Counter[str] = Counter()
        self.rows = 0
        self.executions = 0
        self.last_inference_ms = 0
        self.refused = 0
        self.cancelled = 0
        self.success = Durations()
        self.fail = Durations()
        self.queue_time = Durations()
        self.total = BatchDurations()
        self.batches: dict[int, BatchDurations] = {}

    def batch(self, rows: int, reason: str, gather: float, compute: float, split: float) -> None:
        self.executions += 1
        self.close_reasons[reason] += 1
        self.batch_rows.observe(rows)
        self.compute.observe(compute)
        of_size = self.batches.get(rows)
        if of_size is None:
            of_size = self.batches[rows] = BatchDurations()
        for durations in (of_size, self.total):
            durations.compute_input.add(gather)
            durations.compute_infer.add(compute)
            durations.compute_output.add(split)

    def statistics(self) -> dict[str, object]:
        """One entry of Triton's `model_stats`."""
        none = Durations().json()
        executions, queue, total = self.executions, self.queue_time.json(), self.total.json()
        if self.engine is not None:
            told = self.engine()
            executions, queue = told.num_steps, _durations_json(told.queue_time)
            total["compute_infer"] = _durations_json(told.step_time)
        return {
            "name": self.model,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.rows,
            "execution_count": executions,
            "inference_stats": {
                "success": self.success.json(),
                "fail": self.fail.json(),
                "queue": queue,
                **total,
                "cache_hit": none,
                "cache_miss": none,
            },
            "response_stats": {},
            "batch_stats": [{"batch_size": rows, **durations.json()} for rows, durations in sorted(self.batches.items())],
            "memory_usage": [],
        }


class Metrics:
    """All of one server's numbers."""

    def __init__(self, *, triton_names: bool = False, vllm_names: bool = False) -> None:
        self.models: dict[tuple[str, str], ModelMetrics] = {}
        self.responses: Counter[tuple[str, int]] = Counter()
        """Finished infer requests by (protocol, status)."""
        self.loads: Counter[tuple[str, str]] = Counter()
        self.counts = Counts()
        """The gateway's."""
        self.lines: Callable[[], Iterable[Line]] = tuple
        """The gateway's waiting lines."""
        self.triton_names = triton_names
        self.vllm_names = vllm_names
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self, accept: str = "") -> tuple[str, bytes]:
        """(content type, exposition) in the format that the scraper accepts."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def collect(self) -> Iterator[Metric]:
        models = list(self.models.values())
        engines = [(model, model.engine()) for model in models if model.engine is not None]
        yield from _families(models)
        yield from _engine_families(engines)
        responses = CounterMetricFamily("fairlead_responses", "Infer requests by how they ended", labels=["protocol", "status"])
        for (protocol, status), number in self.responses.items():
            responses.add_metric([protocol, str(status)], number)
        yield responses
        loads = CounterMetricFamily("fairlead_model_loads", "Versions loaded, or not", labels=["model", "outcome"])
        for key, number in self.loads.items():
            loads.add_metric(key, number)
        yield loads
        yield from self.counts.collect()
        yield from _line_families(self.lines())
        if self.triton_names:
            yield from _triton_families(models)
        if self.vllm_names:
            yield from _vllm_families(engines)


class Line(NamedTuple):
    """One model's line before the gateway gives it its requests."""

    model: str
    waiting: Mapping[int, int]
    """Requests by priority."""
    in_flight: int


def _line_families(lines: Iterable[Line]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("fairlead_gateway_waiting_requests", "Requests in the gateway's lines now", labels=["model", "priority"])
    in_flight = GaugeMetricFamily("fairlead_gateway_in_flight_requests", "Requests of such models under way now", labels=["model"])
    for line in lines:
        for priority, number in line.waiting.items():
            waiting.add_metric([line.model, str(priority)], number)
        in_flight.add_metric([line.model], line.in_flight)
    yield waiting
    yield in_flight


def _families(models: Iterable[ModelMetrics]) -> Iterator[Metric]:
    labels = ["model", "version"]
    requests = CounterMetricFamily("fairlead_requests", "Requests by how they ended", labels=[*labels, "outcome"])
    rows = CounterMetricFamily("fairlead_rows", "Rows answered", labels=labels)
    batches = CounterMetricFamily("fairlead_batches", "Batches by why they closed", labels=[*labels, "close_reason"])
    waiting = GaugeMetricFamily("fairlead_queue_requests", "Requests waiting now", labels=labels)
    waiting_rows = GaugeMetricFamily("fairlead_queue_rows", "Rows waiting now", labels=labels)
    restarts = CounterMetricFamily("fairlead_instance_restarts", "Replica processes that died and were started again", labels=labels)
    histograms = {
        "latency": HistogramMetricFamily("fairlead_request_seconds", "From arrival to answer", labels=labels),
        "queued": HistogramMetricFamily("fairlead_queue_seconds", "From arrival to dispatch", labels=labels),
        "compute": HistogramMetricFamily("fairlead_compute_seconds", "The model's time for one batch", labels=labels),
        "batch_rows": HistogramMetricFamily("fairlead_batch_rows", "Rows of one batch", labels=labels),
    }
    for m in models:
        key = [m.model, m.version]
        for outcome, number in (
            ("success", m.success.count),
            ("failure", m.fail.count),
            ("cancelled", m.cancelled),
            ("refused", m.refused),
        ):
            requests.add_metric([*key, outcome], number)
        rows.add_metric(key, m.rows)
        for reason, number in m.close_reasons.items():
            batches.add_metric([*key, reason], number)
        num_requests, num_rows = m.queue()
        waiting.add_metric(key, num_requests)
        waiting_rows.add_metric(key, num_rows)
        restarts.add_metric(key, m.restarts())
        for name, family in histograms.items():
            histogram: Histogram = getattr(m, name)
            family.add_metric(key, histogram.buckets(), histogram.sum)
    yield from (requests, rows, batches, waiting, waiting_rows, restarts, *histograms.values())


def _triton_families(models: Iterable[ModelMetrics]) -> Iterator[Metric]:
    """Triton's names (docs/user_guide/metrics.md of its server), for dashboards that exist."""
    labels = ["model", "version"]
    counters: dict[str, Callable[[ModelMetrics], int]] = {
        "nv_inference_request_success": lambda m: m.success.count,
        "nv_inference_count": lambda m: m.rows,
        "nv_inference_exec_count": lambda m: m.executions,
        "nv_inference_request_duration_us": lambda m: (m.success.ns + m.fail.ns) // 1000,
        "nv_inference_queue_duration_us": lambda m: m.queue_time.ns // 1000,
        "nv_inference_compute_input_duration_us": lambda m: m.total.compute_input.ns // 1000,
        "nv_inference_compute_infer_duration_us": lambda m: m.total.compute_infer.ns // 1000,
        "nv_inference_compute_output_duration_us": lambda m: m.total.compute_output.ns // 1000,
    }
    for name, value in counters.items():
        # Triton's counters have no `_total`: a gauge family keeps the exact name in the text format.
        family = GaugeMetricFamily(name, name.removeprefix("nv_").replace("_", " "), labels=labels)
        for m in models:
            family.add_metric([m.model, m.version], value(m))
        yield family
    failures = GaugeMetricFamily("nv_inference_request_failure", "inference requests failed, by reason", labels=[*labels, "reason"])
    pending = GaugeMetricFamily("nv_inference_pending_request_count", "inference requests waiting", labels=labels)
    for m in models:
        for reason, number in (("REJECTED", m.refused), ("CANCELED", m.cancelled), ("BACKEND", m.fail.count)):
            failures.add_metric([m.model, m.version, reason], number)
        pending.add_metric([m.model, m.version], m.queue()[0])
    yield failures
    yield pending


# Engines

Told = tuple[list[int], float]
"""A histogram over SECONDS: (counts by bucket, sum)."""
_NONE: Told = ([], 0.0)


def add_stats(left: EngineStats, right: EngineStats) -> EngineStats:
    """What two engines, or two lives of one, have counted together."""

    def add(a: Any, b: Any) -> Any:
        match a:
            case bool():
                return a or b
            case dict():
                return dict(Counter(a) + Counter(b))
            case tuple():
                return _add_told(a, b)
        return a + b

    return EngineStats(**{name: add(getattr(left, name), getattr(right, name)) for name in EngineStats.__struct_fields__})


def _add_told(left: Told, right: Told) -> Told:
    """Empty counts stand for a histogram that nobody has begun."""
    return [x + y for x, y in zip_longest(left[0], right[0], fillvalue=0)], left[1] + right[1]


def counted(stats: EngineStats) -> EngineStats:
    """Only what was counted, without what was true at the moment."""
    return structs.replace(stats, num_running=0, num_waiting=0, num_blocks=0, num_free_blocks=0, recovering=False)


def _durations_json(told: Told) -> dict[str, int]:
    return {"count": sum(told[0]), "ns": int(told[1] * 1e9)}


def _histogram(family: HistogramMetricFamily, key: list[str], told: Told) -> None:
    family.add_metric(key, buckets(SECONDS, told[0] or [0] * (len(SECONDS) + 1)), told[1])


ENGINE_HISTOGRAMS = (
    ("fairlead_time_to_first_token_seconds", "From arrival to the first token", "time_to_first_token"),
    ("fairlead_inter_token_seconds", "Between two tokens of one answer", "inter_token"),
    ("fairlead_generation_queue_seconds", "From arrival to the first step", "queue_time"),
    ("fairlead_step_seconds", "One step of the engine", "step_time"),
)
ENGINE_COUNTERS = (
    ("fairlead_prompt_tokens", "Tokens of prompts", "num_prompt_tokens"),
    ("fairlead_generated_tokens", "Tokens generated", "num_generated_tokens"),
    ("fairlead_prefix_cache_queried_tokens", "Tokens of prompts looked up in the prefix cache", "num_prefix_queried_tokens"),
    ("fairlead_prefix_cache_hit_tokens", "Tokens of prompts found in the prefix cache", "num_prefix_hit_tokens"),
    ("fairlead_preemptions", "Sequences that gave their blocks back and started again", "num_preemptions"),
    ("fairlead_pictures", "Pictures that were finished", "num_pictures"),
    ("fairlead_denoising_steps", "Denoising steps, of every picture in each step", "num_denoising_steps"),
    ("fairlead_cached_denoising_steps", "Denoising steps that the first-block cache answered", "num_cached_steps"),
    ("fairlead_engine_failed_steps", "Steps of the engine that failed", "num_failed_steps"),
    ("fairlead_quarantined_requests", "Requests that failed a step on their own", "num_quarantined"),
)
ENGINE_GAUGES = (
    ("fairlead_kv_blocks", "Blocks of KV memory", "num_blocks"),
    ("fairlead_kv_blocks_free", "Blocks that are free, or hold nothing but prefix cache", "num_free_blocks"),
)
Engines = list[tuple[ModelMetrics, EngineStats]]


def _engine_families(engines: Engines) -> Iterator[Metric]:
    labels = ["model", "version"]
    for name, text, field in ENGINE_HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for m, stats in engines:
            _histogram(histogram, [m.model, m.version], getattr(stats, field))
        yield histogram
    for family, rows in ((CounterMetricFamily, ENGINE_COUNTERS), (GaugeMetricFamily, ENGINE_GAUGES)):
        for name, text, field in rows:
            single = family(name, text, labels=labels)
            for m, stats in engines:
                single.add_metric([m.model, m.version], getattr(stats, field))
            yield single
    finished = CounterMetricFamily("fairlead_finished_sequences", "Sequences by why they ended", labels=[*labels, "reason"])
    sequences = GaugeMetricFamily("fairlead_sequences", "Sequences now", labels=[*labels, "state"])
    for m, stats in engines:
        for reason, number in stats.finished.items():
            finished.add_metric([m.model, m.version, reason], number)
        sequences.add_metric([m.model, m.version, "running"], stats.num_running)
        sequences.add_metric([m.model, m.version, "waiting"], stats.num_waiting)
    yield finished
    yield sequences


def _kv_usage(stats: EngineStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


def _vllm_families(engines: Engines) -> Iterator[Metric]:
    """vLLM's names (docs/usage/metrics.md of its repository), for dashboards that exist. They know no versions: a model's are added up."""
    labels = ["model_name"]
    of_models: dict[str, tuple[EngineStats, Told]] = {}
    for m, stats in engines:
        told, latency = of_models.get(m.model, (EngineStats(), _NONE))
        of_models[m.model] = (add_stats(told, stats), _add_told(latency, (m.latency.counts, m.latency.sum)))
    gauges: dict[str, Callable[[EngineStats], float]] = {
        "num_requests_running": lambda s: s.num_running,
        "num_requests_waiting": lambda s: s.num_waiting,
        "kv_cache_usage_perc": _kv_usage,
        "gpu_cache_usage_perc": _kv_usage,  # the older name, which dashboards still ask for
    }
    counters: dict[str, Callable[[EngineStats], int]] = {
        "prefix_cache_queries": lambda s: s.num_prefix_queried_tokens,
        "prefix_cache_hits": lambda s: s.num_prefix_hit_tokens,
        "num_preemptions": lambda s: s.num_preemptions,
        "prompt_tokens": lambda s: s.num_prompt_tokens,
        "generation_tokens": lambda s: s.num_generated_tokens,
    }
    histograms: dict[str, Callable[[EngineStats, Told], Told]] = {
        "time_to_first_token_seconds": lambda s, _: s.time_to_first_token,
        "inter_token_latency_seconds": lambda s, _: s.inter_token,
        "time_per_output_token_seconds": lambda s, _: s.inter_token,
        "request_queue_time_seconds": lambda s, _: s.queue_time,
        "e2e_request_latency_seconds": lambda _, latency: latency,
    }
    for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, value in values.items():
            single = family(f"vllm:{name}", name.replace("_", " "), labels=labels)
            for model, (stats, _) in of_models.items():
                single.add_metric([model], value(stats))
            yield single
    for name, pick in histograms.items():
        histogram = HistogramMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=labels)
        for model, (stats, latency) in of_models.items():
            _histogram(histogram, [model], pick(stats, latency))
        yield histogram
    success = CounterMetricFamily("vllm:request_success", "requests by why they ended", labels=[*labels, "finished_reason"])
    for model, (stats, _) in of_models.items():
        for reason, number in stats.finished.items():
            success.add_metric([model, reason], number)
    yield success
