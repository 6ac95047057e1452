"""What is counted comes out as Prometheus reads it, in both formats."""

import asyncio
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from fairlead.core.generation import EngineStats
from fairlead.core.timeline import BatchNote, Event, Phases, Timeline
from fairlead.observe.metrics import SLICE_SECONDS, Histogram, Line, Metrics, ModelMetrics, add_stats, counted
from fairlead.observe.table import TABLE

OPENMETRICS = "application/openmetrics-text; version=1.0.0, text/plain; q=0.5"


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(triton_names=True)
    model = made.models["m", "1"] = ModelMetrics("m", "1", queue=lambda: (2, 5), restarts=lambda: 3, max_batch_size=8)
    model.batch(4, "full", gather=0.001, compute=0.010, split=0.002)
    model.batch(1, "idle", gather=0.0, compute=0.020, split=0.0)
    model.rows += 5
    model.success.add(0.5, 4)
    for seconds in (0.001, 0.002, 99.0):
        model.latency.observe(seconds)
    return made


def samples(metrics: Metrics) -> dict[tuple[str, frozenset], float]:
    text = metrics.text()[1].decode()
    return {(s.name, frozenset(s.labels.items())): s.value for family in parse(text) for s in family.samples}


def test_a_scrape_holds_every_number_under_its_labels(metrics):
    found = samples(metrics)
    key = frozenset({("model", "m"), ("version", "1")})
    assert found["fairlead_rows_total", key] == 5
    assert found["fairlead_queue_requests", key] == 2
    assert found["fairlead_queue_rows", key] == 5
    assert found["fairlead_instance_restarts_total", key] == 3
    assert found["fairlead_requests_total", key | {("outcome", "success")}] == 4
    assert found["fairlead_batches_total", key | {("close_reason", "full")}] == 1
    assert found["fairlead_request_seconds_count", key] == 3
    assert found["fairlead_request_seconds_bucket", key | {("le", "0.001")}] == 1
    assert found["fairlead_request_seconds_bucket", key | {("le", "30.0")}] == 2
    assert found["fairlead_request_seconds_bucket", key | {("le", "+Inf")}] == 3
    assert found["fairlead_batch_rows_sum", key] == 5
    assert found["fairlead_batch_capacity_rows_total", key] == 16  # two batches of a model that takes 8


def test_tritons_names_carry_the_same_numbers_in_its_units(metrics):
    found = samples(metrics)
    key = frozenset({("model", "m"), ("version", "1")})
    assert found["nv_inference_request_success", key] == 4
    assert found["nv_inference_count", key] == 5
    assert found["nv_inference_exec_count", key] == 2
    assert found["nv_inference_compute_infer_duration_us", key] == 30_000
    assert found["nv_inference_request_duration_us", key] == 500_000


def test_tritons_names_are_off_unless_asked_for():
    assert "nv_inference" not in Metrics().text()[1].decode()


def engine(**counts: object) -> ModelMetrics:
    stats = EngineStats(**counts)  # type: ignore[arg-type]
    return ModelMetrics("llm", "1", queue=lambda: (0, 0), restarts=lambda: 0, engine=lambda: stats, kv_bytes=1 << 20)


def test_an_engines_counts_come_out_under_their_names():
    metrics = Metrics()
    metrics.models["llm", "1"] = engine(
        num_running=2, num_blocks=10, num_free_blocks=4, num_generated_tokens=7, finished={"stop": 3}, inter_token=([1, 2, *[0] * 16], 0.5)
    )
    found = samples(metrics)
    key = frozenset({("model", "llm"), ("version", "1")})
    assert found["fairlead_generated_tokens_total", key] == 7
    assert found["fairlead_kv_blocks_free", key] == 4
    assert found["fairlead_kv_used_ratio", key] == 0.6
    assert found["fairlead_kv_bytes", key] == 1 << 20
    assert found["fairlead_sequences", key | {("state", "running")}] == 2
    assert found["fairlead_finished_sequences_total", key | {("reason", "stop")}] == 3
    assert found["fairlead_inter_token_seconds_bucket", key | {("le", "0.0001")}] == 1
    assert found["fairlead_inter_token_seconds_count", key] == 3
    assert found["fairlead_inter_token_seconds_sum", key] == 0.5
    assert found["fairlead_step_seconds_count", key] == 0
    assert ("fairlead_batch_rows_count", key) not in found  # an engine has no batcher


def test_vllms_names_know_no_versions():
    metrics = Metrics(vllm_names=True)
    counts = {"num_blocks": 10, "num_prefix_hit_tokens": 5, "finished": {"stop": 1}, "queue_time": ([1, *[0] * 17], 0.25)}
    for version, free in (("1", 10), ("2", 0)):
        metrics.models["llm", version] = model = engine(**counts, num_free_blocks=free)
        model.latency.observe(0.002)
    found = samples(metrics)
    key = frozenset({("model_name", "llm")})
    assert found["vllm:kv_cache_usage_perc", key] == found["vllm:gpu_cache_usage_perc", key] == 0.5
    assert found["vllm:prefix_cache_hits_total", key] == 10
    assert found["vllm:request_success_total", key | {("finished_reason", "stop")}] == 2
    assert found["vllm:request_queue_time_seconds_sum", key] == 0.5
    assert found["vllm:e2e_request_latency_seconds_count", key] == 2
    assert "vllm" not in Metrics().text()[1].decode()


def test_what_two_lives_counted_is_added_up():
    one = EngineStats(num_running=1, num_steps=2, finished={"stop": 1}, step_time=([1, 2], 0.5), recovering=True)
    two = EngineStats(num_steps=3, finished={"stop": 1, "length": 4})
    both = EngineStats(num_running=1, num_steps=5, finished={"stop": 2, "length": 4}, step_time=([1, 2], 0.5), recovering=True)
    assert add_stats(one, two) == add_stats(two, one) == both
    assert counted(both) == EngineStats(num_steps=5, finished={"stop": 2, "length": 4}, step_time=([1, 2], 0.5))


def test_statistics_are_tritons(metrics):
    statistics = metrics.models["m", "1"].statistics()
    assert statistics["execution_count"] == 2
    assert statistics["inference_stats"]["compute_infer"] == {"count": 2, "ns": 30_000_000}
    assert [batch["batch_size"] for batch in statistics["batch_stats"]] == [1, 4]


def test_a_value_on_a_bound_falls_into_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == 8.0


def test_what_lines_and_counters_say_is_shown(metrics):
    metrics.counts.add("fairlead_gateway_refused_total", "m", "queue-full", by=2)
    metrics.lines = lambda: [Line("m", {0: 3, 10: 1}, 5)]
    metrics.responses["http", 200] += 7
    found = samples(metrics)
    assert found["fairlead_gateway_refused_total", frozenset({("model", "m"), ("reason", "queue-full")})] == 2
    assert found["fairlead_gateway_waiting_requests", frozenset({("model", "m"), ("priority", "10")})] == 1
    assert found["fairlead_responses_total", frozenset({("protocol", "http"), ("status", "200")})] == 7


def test_a_source_that_fails_takes_nothing_else_with_it(metrics):
    def broken():
        yield "fairlead_response_cache_entries", (), 3
        raise RuntimeError("gone")

    metrics.sources += [broken, lambda: [("fairlead_response_cache_bytes", (), 5.5)]]
    found = samples(metrics)
    assert found["fairlead_response_cache_entries", frozenset()] == 3
    assert found["fairlead_response_cache_bytes", frozenset()] == 5.5


# OpenMetrics


def openmetrics(metrics: Metrics) -> dict:
    content_type, text = metrics.text(OPENMETRICS)
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    return {family.name: family for family in parse_openmetrics(text.decode())}


def test_openmetrics_is_given_to_who_accepts_it_with_units(metrics):
    families = openmetrics(metrics)
    assert (families["fairlead_requests"].type, families["fairlead_requests"].unit) == ("counter", "requests")
    assert families["fairlead_request_seconds"].unit == "seconds"
    assert families["process_resident_memory_bytes"].unit == "bytes"
    assert families["fairlead_kv_blocks_free"].unit == ""  # a name that does not end with its unit may have none


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text; version=2.0.0, text/plain", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ],
)
def test_the_format_goes_by_what_the_scraper_accepts(accept, content_type):
    assert Metrics().text(accept)[0] == content_type


def test_every_row_of_the_table_is_shown_and_nothing_else():
    everything = Metrics(triton_names=True, vllm_names=True)
    assert set(openmetrics(everything)) == {metric.family for metric in TABLE.values()}
    plain = {family.name: family.type for family in parse(everything.text()[1].decode())}
    # its parser leaves out a counter's `_total`
    assert plain == {metric.family: metric.kind for metric in TABLE.values()}


@pytest.mark.parametrize(
    "name", ['say "hi"', "back\\slash", "two\nlines", "über/模型 🚀", "tab\there", "{a=b}", "nul\0", "half\ud800", "del\x7f"]
)
def test_odd_characters_in_a_models_name_come_back_as_they_were(name):
    metrics = Metrics(triton_names=True, vllm_names=True)
    stats = EngineStats(finished={"stop": 1})
    metrics.models[name, "1"] = ModelMetrics(name, "1", queue=lambda: (0, 0), restarts=lambda: 0, engine=lambda: stats)
    metrics.counts.add("fairlead_gateway_refused_total", name, "queue-full")
    expected = "".join("\N{REPLACEMENT CHARACTER}" if c in "\t\0\ud800\x7f" else c for c in name)
    for families in (openmetrics(metrics).values(), parse(metrics.text()[1].decode())):
        names = {label: value for f in families for s in f.samples for label, value in s.labels.items() if label in ("model", "model_name")}
        assert names == {"model": expected, "model_name": expected}


# Exemplars


def timeline(
    seconds: float, *events: Event, first: float = 0.0, trace: str = "a" * 32, outcome: str = "success", model: str = "m"
) -> Timeline:
    made = Timeline(request_id="r", protocol="http", arrived=10.0, traceparent=f"00-{trace}-{'b' * 16}-01", kind="infer", model=model)
    made.version, made.outcome, made.ended = "1", outcome, 10.0 + seconds
    made.first_at = 10.0 + first if first else 0.0
    made.events = list(events)
    return made


def exemplars(metrics: Metrics, name: str) -> dict[str, tuple[str, float]]:
    return {
        sample.labels["le"]: (sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for sample in openmetrics(metrics)[name].samples
        if sample.exemplar is not None
    }


def test_a_kept_trace_stands_for_its_bucket_and_the_newest_for_all_of_them(metrics):
    before = time.time()
    metrics.exemplify(timeline(0.0015, trace="1" * 32))
    metrics.exemplify(timeline(0.0018, trace="2" * 32))
    metrics.exemplify(timeline(99.0, trace="3" * 32))
    assert exemplars(metrics, "fairlead_request_seconds") == {"0.0025": ("2" * 32, pytest.approx(0.0018)), "+Inf": ("3" * 32, 99.0)}
    (told,) = [s.exemplar for s in openmetrics(metrics)["fairlead_request_seconds"].samples if s.exemplar and s.labels["le"] == "+Inf"]
    assert before - 0.001 <= float(told.timestamp) <= time.time()
    assert "trace_id" not in metrics.text()[1].decode()  # the text format knows none


def test_no_bucket_shows_a_request_that_it_does_not_count(metrics):
    metrics.exemplify(timeline(0.3))  # the histogram has none there: the version's clock began later than the door's
    assert exemplars(metrics, "fairlead_request_seconds") == {}


def test_failures_and_models_that_are_gone_stand_for_nothing(metrics):
    metrics.exemplify(timeline(0.0015, outcome="failure"))
    metrics.exemplify(timeline(0.0015, model="gone"))
    assert exemplars(metrics, "fairlead_request_seconds") == {}


def test_an_exemplar_goes_to_the_version_that_answered_though_another_model_was_asked(metrics):
    metrics.exemplify(timeline(0.0015, (10.001, "batched", BatchNote("m", "1", 1, "idle", 1, 1, 0, 10.001)), model="first-choice"))
    assert list(exemplars(metrics, "fairlead_request_seconds")) == ["0.0025"]


def test_a_first_token_has_its_own_exemplar():
    metrics = Metrics()
    counts = [0] * 18
    counts[10] = 4  # up to 0.25 s
    metrics.models["llm", "1"] = engine(time_to_first_token=(counts, 0.8))
    metrics.exemplify(timeline(2.0, (10.2, "engine", Phases("llm", "1", 0, [])), first=0.2, model="llm"))
    assert exemplars(metrics, "fairlead_time_to_first_token_seconds") == {"0.25": ("a" * 32, pytest.approx(0.2))}


# Many models


async def test_requests_are_served_while_many_models_are_scraped():
    metrics = Metrics()
    for number in range(400):
        metrics.models[f"m{number}", "1"] = ModelMetrics(f"m{number}", "1", queue=lambda: (0, 0), restarts=lambda: 0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    began = time.perf_counter()
    _, text = await metrics.scrape()
    took = time.perf_counter() - began
    task.cancel()
    assert text.count(b"fairlead_rows_total{") == 400
    assert turns >= min(took / SLICE_SECONDS / 20, 5)  # it came up again and again
    assert text == metrics.text()[1].replace(
        b"fairlead_scrape_seconds " + repr(metrics.scrape_seconds).encode(), b"fairlead_scrape_seconds 0.0"
    )


async def test_a_version_that_goes_while_it_is_scraped_hurts_nobody():
    metrics = Metrics()
    for number in range(100):
        metrics.models[f"m{number}", "1"] = ModelMetrics(f"m{number}", "1", queue=lambda: (0, 0), restarts=lambda: 0)
    scraping = asyncio.ensure_future(metrics.scrape(OPENMETRICS))
    await asyncio.sleep(0)
    metrics.models.clear()
    _, text = await scraping
    assert list(parse_openmetrics(text.decode()))
