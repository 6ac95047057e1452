"""What is counted, and how Prometheus reads it. `observe.table` says what each metric means, `observe.page` how it is written.

Counting happens in the event loop only, in plain integers and lists: an observation is a bisect and an addition (0.2
microseconds), where a client library's locked histogram costs four times that. A scrape is written in slices of SLICE_SECONDS
in the event loop, too, so that requests are served in between: a thread would keep the interpreter from them for longer.

Engines count in their own processes and tell now and then (`EngineStats`); the counts of a replica that died stay.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import structlog
from msgspec import structs

from fairlead.core.generation import EngineStats
from fairlead.core.timeline import BatchNote, Phases, Timeline
from fairlead.observe.counts import Counts
from fairlead.observe.page import Exemplar, Page, labels_of, wants_openmetrics
from fairlead.observe.table import ROWS, SECONDS, TABLE

SLICE_SECONDS = 0.001
LARGE_BYTES = 1 << 20
"""Of a text: from here on `join` works without the interpreter's lock, and a thread does it."""

log = structlog.get_logger("fairlead.observe")


class Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


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
        *,
        max_batch_size: int = 0,
        kv_bytes: int = 0,
    ) -> None:
        """`max_batch_size`: 0 for a model that does not batch. `kv_bytes`: of all replicas together."""
        self.model = model
        self.version = version
        self.labels = labels_of(("model", "version"), (model, version))
        self.around = labels_of(("model",), (model,)), labels_of(("version",), (version,))
        """The same, for what stands between."""
        self.max_batch_size = max_batch_size
        self.kv_bytes = kv_bytes
        self.wakes = 0
        """Times that it was loaded again after sleep."""
        self.load_seconds = 0.0
        self.exemplars: dict[str, list[Exemplar | None]] = {}
        """By histogram: the latest kept trace of each bucket."""
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

    def exemplify(self, name: str, exemplar: Exemplar) -> None:
        """In the place of the one before, in its bucket."""
        kept = self.exemplars.setdefault(name, [None] * (len(SECONDS) + 1))
        kept[bisect_left(SECONDS, exemplar.value)] = exemplar

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


Sample = tuple[str, tuple[str, ...], "float | Histogram"]
"""(name, labels, value)."""
Source = Callable[[], Iterable[Sample | None]]
"""Tells, when it is asked, what is true at the moment; None between two samples where finding the next one takes a while."""


class Metrics:
    """All of one server's numbers."""

    def __init__(self, *, triton_names: bool = False, vllm_names: bool = False) -> None:
        self.models: dict[tuple[str, str], ModelMetrics] = {}
        self.responses: Counter[tuple[str, int]] = Counter()
        """Finished requests by (protocol, status)."""
        self.loads: Counter[tuple[str, str]] = Counter()
        self.counts = Counts()
        """The gateway's."""
        self.lines: Callable[[], Iterable[Line]] = tuple
        """The gateway's waiting lines."""
        self.sources: list[Source] = []
        """Of what is counted elsewhere."""
        self.triton_names = triton_names
        self.vllm_names = vllm_names
        self.scrape_seconds = 0.0

    async def scrape(self, accept: str = "") -> tuple[str, bytes]:
        """(content type, exposition) in the format that the scraper accepts; others have their turn meanwhile."""
        began = time.perf_counter()
        page, pieces, due = self._page(accept), list[bytes](), began + SLICE_SECONDS
        for piece in self._written(page):
            if piece is not None:
                pieces.append(piece)
            if time.perf_counter() >= due:
                await asyncio.sleep(0)
                due = time.perf_counter() + SLICE_SECONDS
        large = sum(map(len, pieces)) > LARGE_BYTES
        text = await asyncio.to_thread(b"".join, pieces) if large else b"".join(pieces)
        self.scrape_seconds = time.perf_counter() - began
        return page.content_type, text

    def text(self, accept: str = "") -> tuple[str, bytes]:
        """The same at once."""
        page = self._page(accept)
        return page.content_type, b"".join(piece for piece in self._written(page) if piece is not None)

    def _page(self, accept: str) -> Page:
        hidden = {"triton": not self.triton_names, "vllm": not self.vllm_names}
        return Page(openmetrics=wants_openmetrics(accept), hidden=[group for group, hides in hidden.items() if hides])

    def _written(self, page: Page) -> Iterator[bytes | None]:
        yield from self._fill(page)
        yield from page.pieces()

    def _fill(self, page: Page) -> Iterator[None]:
        """None between two steps that may be far apart in time."""
        page.put("fairlead_scrape_seconds", self.scrape_seconds)
        of_models: dict[str, tuple[EngineStats, Told]] = {}
        for m in list(self.models.values()):
            _add_version(page, m)
            if m.engine is not None:
                stats = m.engine()
                _add_engine(page, m, stats)
                told, latency = of_models.get(m.model, (EngineStats(), _NONE))
                if self.vllm_names:
                    of_models[m.model] = (add_stats(told, stats), _add_told(latency, (m.latency.counts, m.latency.sum)))
            if self.triton_names:
                _add_triton(page, m)
            yield
        for model, (stats, latency) in of_models.items():
            _add_vllm(page, labels_of(("model_name",), (model,)), stats, latency)
            yield
        for source in (self._own, self.counts.samples, *self.sources):
            try:
                for sample in source():
                    if sample is not None:
                        _add_sample(page, *sample)
                    yield
            except Exception:  # the other metrics are worth having
                log.exception("not_shown", source=getattr(source, "__qualname__", repr(source)))

    def _own(self) -> Iterator[Sample]:
        for (protocol, status), num in list(self.responses.items()):
            yield "fairlead_responses_total", (protocol, str(status)), num
        for key, num in list(self.loads.items()):
            yield "fairlead_model_loads_total", key, num
        for line in list(self.lines()):
            for priority, num in line.waiting.items():
                yield "fairlead_gateway_waiting_requests", (line.model, str(priority)), num
            yield "fairlead_gateway_in_flight_requests", (line.model,), line.in_flight

    def exemplify(self, timeline: Timeline) -> None:
        """Its trace is kept, and it has just ended: it may stand for its buckets."""
        model, version = timeline.model, timeline.version
        for _, _, details in timeline.events:
            if isinstance(details, (BatchNote, Phases)):
                model, version = details.model, details.version
        m = self.models.get((model, version))
        if m is None or timeline.outcome != "success":
            return
        now = time.time()
        m.exemplify("fairlead_request_seconds", Exemplar(timeline.trace_id, timeline.seconds, now))
        if m.engine is not None and timeline.first_at:
            first = Exemplar(timeline.trace_id, timeline.first_at - timeline.arrived, now)
            m.exemplify("fairlead_time_to_first_token_seconds", first)


class Line(NamedTuple):
    """One model's line before the gateway gives it its requests."""

    model: str
    waiting: Mapping[int, int]
    """Requests by priority."""
    in_flight: int


def _add_sample(page: Page, name: str, values: tuple[str, ...], value: "float | Histogram") -> None:
    labels = labels_of(TABLE[name].labels, values)
    if isinstance(value, Histogram):
        page.histogram(name, value.counts, value.sum, labels)
    else:
        page.put(name, value, labels)


def _add_version(page: Page, m: ModelMetrics) -> None:
    labels, put = m.labels, page.put
    of, at = m.around
    put("fairlead_requests_total", m.success.count, f'{of},outcome="success",{at}')
    put("fairlead_requests_total", m.fail.count, f'{of},outcome="failure",{at}')
    put("fairlead_requests_total", m.cancelled, f'{of},outcome="cancelled",{at}')
    put("fairlead_requests_total", m.refused, f'{of},outcome="refused",{at}')
    put("fairlead_rows_total", m.rows, labels)
    for reason, num in m.close_reasons.items():
        put("fairlead_batches_total", num, f'close_reason="{reason}",{labels}')
    if m.max_batch_size:
        put("fairlead_batch_capacity_rows_total", m.executions * m.max_batch_size, labels)
    num_requests, num_rows = m.queue()
    put("fairlead_queue_requests", num_requests, labels)
    put("fairlead_queue_rows", num_rows, labels)
    put("fairlead_instance_restarts_total", m.restarts(), labels)
    put("fairlead_model_load_seconds", m.load_seconds, labels)
    page.histogram("fairlead_request_seconds", m.latency.counts, m.latency.sum, labels, m.exemplars.get("fairlead_request_seconds", ()))
    if m.engine is None:
        page.histogram("fairlead_queue_seconds", m.queued.counts, m.queued.sum, labels)
        page.histogram("fairlead_compute_seconds", m.compute.counts, m.compute.sum, labels)
        page.histogram("fairlead_batch_rows", m.batch_rows.counts, m.batch_rows.sum, labels)


def _add_triton(page: Page, m: ModelMetrics) -> None:
    """Its docs/user_guide/metrics.md, for dashboards that exist."""
    labels, put = m.labels, page.put
    of, at = m.around
    put("nv_inference_request_success", m.success.count, labels)
    for reason, num in (("REJECTED", m.refused), ("CANCELED", m.cancelled), ("BACKEND", m.fail.count)):
        put("nv_inference_request_failure", num, f'{of},reason="{reason}",{at}')
    put("nv_inference_count", m.rows, labels)
    put("nv_inference_exec_count", m.executions, labels)
    put("nv_inference_request_duration_us", (m.success.ns + m.fail.ns) // 1000, labels)
    put("nv_inference_queue_duration_us", m.queue_time.ns // 1000, labels)
    put("nv_inference_compute_input_duration_us", m.total.compute_input.ns // 1000, labels)
    put("nv_inference_compute_infer_duration_us", m.total.compute_infer.ns // 1000, labels)
    put("nv_inference_compute_output_duration_us", m.total.compute_output.ns // 1000, labels)
    put("nv_inference_pending_request_count", m.queue()[0], labels)


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
    return structs.replace(
        stats, num_running=0, num_waiting=0, num_blocks=0, num_free_blocks=0, num_adapters=0, adapter_bytes=0, recovering=False
    )


def _durations_json(told: Told) -> dict[str, int]:
    return {"count": sum(told[0]), "ns": int(told[1] * 1e9)}


ENGINE_HISTOGRAMS = {
    "fairlead_time_to_first_token_seconds": "time_to_first_token",
    "fairlead_inter_token_seconds": "inter_token",
    "fairlead_generation_queue_seconds": "queue_time",
    "fairlead_step_seconds": "step_time",
}
ENGINE_NUMBERS = {
    "fairlead_prompt_tokens_total": "num_prompt_tokens",
    "fairlead_generated_tokens_total": "num_generated_tokens",
    "fairlead_prefix_cache_queried_tokens_total": "num_prefix_queried_tokens",
    "fairlead_prefix_cache_hit_tokens_total": "num_prefix_hit_tokens",
    "fairlead_grammars_total": "num_grammars",
    "fairlead_grammar_hits_total": "num_grammar_hits",
    "fairlead_grammar_seconds_total": "grammar_seconds",
    "fairlead_drafted_tokens_total": "num_drafted_tokens",
    "fairlead_accepted_tokens_total": "num_accepted_tokens",
    "fairlead_preemptions_total": "num_preemptions",
    "fairlead_pictures_total": "num_pictures",
    "fairlead_denoising_steps_total": "num_denoising_steps",
    "fairlead_cached_denoising_steps_total": "num_cached_steps",
    "fairlead_engine_failed_steps_total": "num_failed_steps",
    "fairlead_quarantined_requests_total": "num_quarantined",
    "fairlead_lora_adapters": "num_adapters",
    "fairlead_lora_bytes": "adapter_bytes",
    "fairlead_lora_loads_total": "num_adapter_loads",
    "fairlead_lora_evictions_total": "num_adapter_evictions",
    "fairlead_kv_blocks": "num_blocks",
    "fairlead_kv_blocks_free": "num_free_blocks",
}


def _add_engine(page: Page, m: ModelMetrics, stats: EngineStats) -> None:
    labels, put = m.labels, page.put
    of, at = m.around
    for name, field in ENGINE_HISTOGRAMS.items():
        counts, total = getattr(stats, field)
        page.histogram(name, counts, total, labels, m.exemplars.get(name, ()))
    for name, field in ENGINE_NUMBERS.items():
        put(name, getattr(stats, field), labels)
    if stats.num_blocks:
        put("fairlead_kv_used_ratio", _kv_usage(stats), labels)
    put("fairlead_wakes_total", m.wakes, labels)
    if m.kv_bytes:
        put("fairlead_kv_bytes", m.kv_bytes, labels)
    for reason, num in stats.finished.items():
        put("fairlead_finished_sequences_total", num, f'{of},reason="{reason}",{at}')
    put("fairlead_sequences", stats.num_running, f'{of},state="running",{at}')
    put("fairlead_sequences", stats.num_waiting, f'{of},state="waiting",{at}')


def _kv_usage(stats: EngineStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


def _add_vllm(page: Page, labels: str, stats: EngineStats, latency: Told) -> None:
    """Its docs/usage/metrics.md, for dashboards that exist. They know no versions: a model's are added up."""
    for name, value in (
        ("vllm:num_requests_running", stats.num_running),
        ("vllm:num_requests_waiting", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", _kv_usage(stats)),
        ("vllm:gpu_cache_usage_perc", _kv_usage(stats)),
        ("vllm:prefix_cache_queries_total", stats.num_prefix_queried_tokens),
        ("vllm:prefix_cache_hits_total", stats.num_prefix_hit_tokens),
        ("vllm:spec_decode_num_draft_tokens_total", stats.num_drafted_tokens),
        ("vllm:spec_decode_num_accepted_tokens_total", stats.num_accepted_tokens),
        ("vllm:num_preemptions_total", stats.num_preemptions),
        ("vllm:prompt_tokens_total", stats.num_prompt_tokens),
        ("vllm:generation_tokens_total", stats.num_generated_tokens),
    ):
        page.put(name, value, labels)
    for name, (counts, total) in (
        ("vllm:time_to_first_token_seconds", stats.time_to_first_token),
        ("vllm:inter_token_latency_seconds", stats.inter_token),
        ("vllm:time_per_output_token_seconds", stats.inter_token),
        ("vllm:request_queue_time_seconds", stats.queue_time),
        ("vllm:e2e_request_latency_seconds", latency),
    ):
        page.histogram(name, counts, total, labels)
    for reason, num in stats.finished.items():
        page.put("vllm:request_success_total", num, f'finished_reason="{reason}",{labels}')
