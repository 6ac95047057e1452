"""What is counted comes out as Prometheus reads it."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from fairlead.core.generation import EngineStats
from fairlead.observe.metrics import Histogram, Metrics, ModelMetrics, add_stats, counted


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(triton_names=True)
    model = made.models["m", "1"] = ModelMetrics("m", "1", queue=lambda: (2, 5), restarts=lambda: 3)
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
    assert found["fairlead_batch_rows_sum", key] == 5


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
    return ModelMetrics("llm", "1", queue=lambda: (0, 0), restarts=lambda: 0, engine=lambda: stats)


def test_an_engines_counts_come_out_under_their_names():
    metrics = Metrics()
    metrics.models["llm", "1"] = engine(
        num_running=2, num_blocks=10, num_free_blocks=4, num_generated_tokens=7, finished={"stop": 3}, inter_token=([1, 2, *[0] * 16], 0.5)
    )
    found = samples(metrics)
    key = frozenset({("model", "llm"), ("version", "1")})
    assert found["fairlead_generated_tokens_total", key] == 7
    assert found["fairlead_kv_blocks_free", key] == 4
    assert found["fairlead_sequences", key | {("state", "running")}] == 2
    assert found["fairlead_finished_sequences_total", key | {("reason", "stop")}] == 3
    assert found["fairlead_inter_token_seconds_bucket", key | {("le", "0.0001")}] == 1
    assert found["fairlead_inter_token_seconds_count", key] == 3
    assert found["fairlead_inter_token_seconds_sum", key] == 0.5
    assert found["fairlead_step_seconds_count", key] == 0


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


def test_openmetrics_is_given_to_who_accepts_it(metrics):
    content_type, text = metrics.text("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert "fairlead_requests" in {family.name for family in parse_openmetrics(text.decode())}


def test_statistics_are_tritons(metrics):
    statistics = metrics.models["m", "1"].statistics()
    assert statistics["execution_count"] == 2
    assert statistics["inference_stats"]["compute_infer"] == {"count": 2, "ns": 30_000_000}
    assert [batch["batch_size"] for batch in statistics["batch_stats"]] == [1, 4]


def test_a_value_on_a_bound_falls_into_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 8.0
