"""Every metric that `/metrics` shows: a row each. docs/metrics.md lists the same, and the dashboards take their units from here.

A label's values are bounded: names that anybody may make up (of models, tenants, routes) are never label values by themselves.
"""

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
"""Of vLLM's histograms of a request's tokens."""

Kind = Literal["counter", "gauge", "histogram"]

GROUPS = {
    "versions": "Versions of models",
    "engines": "Language and image models",
    "gateway": "The gateway",
    "cache": "The response cache",
    "limits": "Limits",
    "tenants": "Tenants and cost",
    "jobs": "Jobs and webhooks",
    "batches": "Batches of the OpenAI API",
    "rollouts": "Rollouts",
    "slo": "Objectives and alerts",
    "replicas": "Replica processes",
    "server": "The server's own process",
    "devices": "Devices",
    "triton": "Triton's names",
    "vllm": "vLLM's names",
}
"""Group → its title in docs/metrics.md."""


class Metric(Struct, frozen=True, kw_only=True):
    name: str
    """As the text format has it: a counter's ends with `_total`."""
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    bound: str = "1"
    """Of its series, without a histogram's buckets."""
    group: str = ""
    counted: bool = False
    """By `observe.counts.Counts`, in the event loop."""
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets."""

    @property
    def family(self) -> str:
        """As OpenMetrics has it."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


MODEL = ("model", "version")
V = "loaded versions"
M = "models"


def _gauge(name: str, unit: str, help: str, labels: tuple[str, ...] = (), bound: str = "1") -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, help=help, labels=labels, bound=bound)


def _counter(name: str, unit: str, help: str, labels: tuple[str, ...] = (), bound: str = "1") -> Metric:
    return Metric(name=name, kind="counter", unit=unit, help=help, labels=labels, bound=bound)


def _count(name: str, unit: str, help: str, labels: tuple[str, ...] = (), bound: str = "1") -> Metric:
    """What `Counts` counts."""
    return Metric(name=name, kind="counter", unit=unit, help=help, labels=labels, bound=bound, counted=True)


def _histogram(
    name: str, unit: str, help: str, labels: tuple[str, ...] = (), bound: str = "1", bounds: tuple[float, ...] = SECONDS
) -> Metric:
    return Metric(name=name, kind="histogram", unit=unit, help=help, labels=labels, bound=bound, bounds=bounds)


_BY_GROUP: dict[str, tuple[Metric, ...]] = {
    "versions": (
        _counter("fairlead_requests_total", "requests", "Requests by how they ended: outcome is success, failure, cancelled or refused", (*MODEL, "outcome"), f"{V} x 4"),
        _counter("fairlead_rows_total", "rows", "Rows answered", MODEL, V),
        _histogram("fairlead_request_seconds", "seconds", "From arrival to answer", MODEL, V),
        _histogram("fairlead_queue_seconds", "seconds", "From arrival to dispatch", MODEL, V),
        _histogram("fairlead_compute_seconds", "seconds", "The model's time for one batch", MODEL, V),
        _histogram("fairlead_batch_rows", "rows", "Rows of one batch", MODEL, V, ROWS),
        _counter("fairlead_batches_total", "batches", "Batches by why they closed", (*MODEL, "close_reason"), f"{V} x 8"),
        _counter("fairlead_batch_capacity_rows_total", "rows", "Rows that these batches had room for: of models that batch", MODEL, V),
        _gauge("fairlead_queue_requests", "requests", "Requests waiting now", MODEL, V),
        _gauge("fairlead_queue_rows", "rows", "Rows waiting now", MODEL, V),
        _counter("fairlead_instance_restarts_total", "restarts", "Replica processes that died and were started again", MODEL, V),
        _gauge("fairlead_replicas", "replicas", "Replicas now: state is ready, starting, failed or asleep", (*MODEL, "state"), f"{V} x 4"),
        _gauge("fairlead_model_load_seconds", "seconds", "How long it took to load, with its warm-up", MODEL, V),
        _counter("fairlead_model_loads_total", "loads", "Versions loaded, or not: outcome is success or failure", ("model", "outcome"), f"{M} x 2"),
        _counter("fairlead_responses_total", "requests", "Requests by their protocol's status", ("protocol", "status"), "about 40"),
    ),
    "engines": (
        _histogram("fairlead_time_to_first_token_seconds", "seconds", "From arrival to the first token", MODEL, V),
        _histogram("fairlead_inter_token_seconds", "seconds", "Between two tokens of one answer", MODEL, V),
        _histogram("fairlead_generation_queue_seconds", "seconds", "From arrival to the first step", MODEL, V),
        _histogram("fairlead_step_seconds", "seconds", "One step of the engine", MODEL, V),
        _counter("fairlead_prompt_tokens_total", "tokens", "Tokens of prompts", MODEL, V),
        _counter("fairlead_generated_tokens_total", "tokens", "Tokens generated", MODEL, V),
        _counter("fairlead_prefix_cache_queried_tokens_total", "tokens", "Tokens of prompts looked up in the prefix cache", MODEL, V),
        _counter("fairlead_prefix_cache_hit_tokens_total", "tokens", "Tokens of prompts found in the prefix cache", MODEL, V),
        _counter("fairlead_drafted_tokens_total", "tokens", "Tokens that speculation proposed and the model looked at", MODEL, V),
        _counter("fairlead_accepted_tokens_total", "tokens", "Of those, the ones that the model chose", MODEL, V),
        _counter("fairlead_preemptions_total", "sequences", "Sequences that gave their blocks back and started again", MODEL, V),
        _counter("fairlead_finished_sequences_total", "sequences", "Sequences by why they ended: reason is stop, length, abort or error", (*MODEL, "reason"), f"{V} x 4"),
        _counter("fairlead_pictures_total", "pictures", "Pictures that were finished", MODEL, V),
        _counter("fairlead_denoising_steps_total", "steps", "Denoising steps, of every picture in each step", MODEL, V),
        _counter("fairlead_cached_denoising_steps_total", "steps", "Denoising steps that the first-block cache answered", MODEL, V),
        _counter("fairlead_engine_failed_steps_total", "steps", "Steps of the engine that failed", MODEL, V),
        _counter("fairlead_quarantined_requests_total", "requests", "Requests that failed a step on their own", MODEL, V),
        _counter("fairlead_grammars_total", "grammars", "Grammars of structured output that were compiled, or refused", MODEL, V),
        _counter("fairlead_grammar_hits_total", "grammars", "Grammars that were asked for again, and known", MODEL, V),
        _counter("fairlead_grammar_seconds_total", "seconds", "Time that compiling grammars took", MODEL, V),
        _gauge("fairlead_lora_adapters", "adapters", "LoRA adapters that are loaded", MODEL, V),
        _gauge("fairlead_lora_bytes", "bytes", "Memory that LoRA adapters take", MODEL, V),
        _counter("fairlead_lora_loads_total", "loads", "Times that a LoRA adapter was loaded", MODEL, V),
        _counter("fairlead_lora_evictions_total", "evictions", "LoRA adapters that made room for others", MODEL, V),
        _gauge("fairlead_kv_blocks", "blocks", "Blocks of KV memory", MODEL, V),
        _gauge("fairlead_kv_blocks_free", "blocks", "Blocks that are free, or hold nothing but prefix cache", MODEL, V),
        _gauge("fairlead_kv_bytes", "bytes", "KV memory; none while it sleeps", MODEL, V),
        _gauge("fairlead_kv_budget_bytes", "bytes", "KV memory for all engines of the device together, where a budget is known", ("device",), "devices"),
        _counter("fairlead_wakes_total", "wakes", "Times that it was loaded again after sleep", MODEL, V),
        _gauge("fairlead_kv_used_ratio", "ratio", "The part of the blocks that is not free", MODEL, V),
        _gauge("fairlead_sequences", "sequences", "Sequences now: state is running or waiting", (*MODEL, "state"), f"{V} x 2"),
    ),
    "gateway": (
        _count("fairlead_gateway_refused_total", "requests", "Requests refused after the caller was known, by why; model is empty for names that nobody serves, and for files and batches", ("model", "reason"), f"{M} x about 40"),
        _count("fairlead_auth_failures_total", "requests", "Requests whose credentials were refused", ("kind",), "about 20"),
        _count("fairlead_auth_refresh_failures_total", "failures", "Failures to read keys and tenants (store), or an issuer's keys (issuer)", ("source",), "2"),
        _gauge("fairlead_gateway_waiting_requests", "requests", "Requests in the gateway's lines now", ("model", "priority"), f"{M} x classes"),
        _gauge("fairlead_gateway_in_flight_requests", "requests", "Requests now, of models that have such a line", ("model",), M),
        _histogram("fairlead_gateway_wait_seconds", "seconds", "In the gateway's line, of requests that stood in one", ("model",), M),
        _count("fairlead_gateway_degraded_total", "requests", "Requests that were given less while the wait was long", ("model", "class"), f"{M} x classes"),
        _count("fairlead_gateway_flagged_total", "texts", "Texts that a filter flagged and let pass", ("model", "rule"), f"{M} x rules"),
        _count("fairlead_gateway_filtered_total", "requests", "Requests that a filter blocked, and answers in which one found something: where is request or answer", ("model", "rule", "where"), f"{M} x rules x 2"),
        _count("fairlead_gateway_abuse_actions_total", "tenants", "Tenants whose traffic looked abnormal: action is observe, throttle or block, reason the part of the score with the most points", ("action", "reason"), "about 20"),
        _count("fairlead_gateway_retries_total", "requests", "Requests sent to another place, or once more, before the first byte", ("model", "reason"), f"{M} x 4"),
        _count("fairlead_gateway_fallbacks_total", "requests", "Requests handed to a fallback model", ("model", "fallback"), "fallbacks configured"),
        _count("fairlead_gateway_hedges_total", "requests", "Requests sent to a second place too: outcome is won, lost or failed", ("model", "outcome"), f"{M} x 3"),
        _count("fairlead_gateway_breaker_opened_total", "times", "Times that a place was left out: reason is failures, error-rate, latency or trial", ("model", "place", "reason"), "places x 4"),
    ),
    "cache": (
        _count("fairlead_gateway_reused_total", "requests", "Answers that needed no computing: outcome is hit, semantic, joined or stale", ("model", "outcome"), f"{M} x 4"),
        _count("fairlead_response_cache_misses_total", "requests", "Requests whose answer could have been stored, and was not", ("model",), M),
        _counter("fairlead_response_cache_evicted_total", "answers", "Stored answers that made room for others"),
        _gauge("fairlead_response_cache_entries", "answers", "Answers stored now"),
        _gauge("fairlead_response_cache_bytes", "bytes", "What they take"),
        _gauge("fairlead_response_cache_capacity_bytes", "bytes", "What they may take"),
        _count("fairlead_cache_redis_failures_total", "failures", "Times that the response cache in Redis did not answer in time, or wrongly", ("what",), "3"),
    ),
    "limits": (
        _counter("fairlead_limits_rejected_total", "requests", "Requests that a limit (kind limit) or a budget (kind budget) refused", ("kind", "unit"), "2 x units"),
        _gauge("fairlead_limits_held", "units", "What requests under way have reserved of the limits of tenants, projects, keys or models (subject), where limits are counted in this process", ("subject", "unit"), "4 x units"),
        _gauge("fairlead_limits_remaining_ratio", "ratio", "What is left of the tightest limit, or budget, where limits are counted in this process", ("kind", "unit"), "2 x units"),
        _count("fairlead_limits_redis_outages_total", "times", "Times that Redis, where limits are shared, stopped answering"),
        _count("fairlead_limits_local_holds_total", "requests", "Requests whose limits were counted in this process while Redis did not answer"),
        _count("fairlead_limits_lost_settles_total", "requests", "Ends of requests that Redis was never told, because too many waited or it refused them"),
    ),
    "tenants": (
        _counter("fairlead_tenant_requests_total", "requests", "Requests by tenant and how they ended: outcome is success, failure, cancelled or refused", ("tenant", "outcome"), "`metrics.max_tenants` x 4"),
        _counter("fairlead_tenant_tokens_total", "tokens", "Tokens by tenant: direction is input or output", ("tenant", "direction"), "`metrics.max_tenants` x 2"),
        _counter("fairlead_tenant_cost_total", "cost", "What its requests cost, by the models' prices", ("tenant",), "`metrics.max_tenants`"),
        _counter("fairlead_cost_total", "cost", "What requests cost, by the models' prices", ("model",), M),
        _count("fairlead_usage_records_total", "records", "Records of requests and audit entries: outcome is written, dropped (too many waited) or refused (by the store)", ("outcome",), "3"),
        _count("fairlead_usage_failed_writes_total", "times", "Times that the store did not take records and was asked again later"),
    ),
    "jobs": (
        _gauge("fairlead_unfinished_jobs", "jobs", "Jobs now: status is queued, active or aborting; all servers of the store tell the same", ("model", "status"), f"{M} x 3"),
        _gauge("fairlead_unfinished_jobs_oldest_seconds", "seconds", "Since the oldest of them was submitted", ("status",), "3"),
        _gauge("fairlead_webhooks_pending", "calls", "Calls to receivers of webhooks that are still to be made; all servers of the store tell the same"),
        _count("fairlead_jobs_total", "jobs", "Jobs that ended, by how and why", ("model", "status", "reason"), f"{M} x about 12"),
        _count("fairlead_job_retries_total", "tries", "Tries of jobs that went wrong and were put off to another one", ("model",), M),
        _count("fairlead_jobs_lost_total", "jobs", "Jobs that were another runner's before they ended here: their leases had run out"),
        _count("fairlead_webhook_deliveries_total", "calls", "Calls to receivers of webhooks: outcome is delivered, retried or failed", ("outcome",), "3"),
    ),
    "batches": (
        _count("fairlead_api_batches_total", "batches", "Batches of the OpenAI API that ended on this server: status is completed, failed, expired or cancelled", ("status",), "4"),
        _count("fairlead_api_batch_lines_total", "requests", "Their requests: outcome is answered, refused, or postponed (a limit or a full line: it is asked again)", ("outcome",), "3"),
    ),
    "rollouts": (
        _gauge("fairlead_traffic_share_ratio", "ratio", "The part of a model's requests that a version gets, of models that the registry deploys", MODEL, "deployed versions"),
        _gauge("fairlead_rollout_phase", "1", "1 for the phase that a rollout under way is in, where this server decides; version is the candidate's", (*MODEL, "phase"), "rollouts under way"),
        _gauge("fairlead_rollout_step", "steps", "The step that it is at, from 1", MODEL, "rollouts under way"),
        _gauge("fairlead_rollout_steps", "steps", "Of how many", MODEL, "rollouts under way"),
        _gauge("fairlead_rollout_share_ratio", "ratio", "The part of the requests that this step gives the candidate (of a shadow: copies to it)", MODEL, "rollouts under way"),
        _gauge("fairlead_rollout_evidence", "ratio", "That the candidate is worse, by metric: 0 is none, 1 is enough to go back", (*MODEL, "metric"), "rollouts under way x metrics"),
        _count("fairlead_rollouts_total", "rollouts", "Rollouts that ended, where this server decided: outcome is complete or aborted", ("model", "outcome"), f"{M} x 2"),
        _count("fairlead_shadow_copies_total", "requests", "Requests of which a shadow was to get a copy: answered, failed, and not compared (busy, full, large, missing, elsewhere, refused, unread)", ("model", "outcome"), f"{M} x 9"),
        _count("fairlead_control_store_failures_total", "ticks", "Ticks of control in which the store did not answer"),
    ),
    "slo": (
        _count("fairlead_slo_events_total", "requests", "Requests that count for an objective: outcome is good or bad", ("slo", "outcome"), "objectives x 2"),
        _gauge("fairlead_slo_target_ratio", "ratio", "The part of the requests that must be good", ("slo",), "objectives"),
        _gauge("fairlead_slo_budget_ratio", "ratio", "The part of the error budget that is left; less than 0 where more than all was used", ("slo",), "objectives"),
        _gauge("fairlead_slo_burn_rate", "ratio", "How many times as fast as it may the budget burnt: window is a span such as 1h", ("slo", "window"), "objectives x 5"),
        _count("fairlead_slo_store_failures_total", "times", "Times that the store did not take, or tell, what objectives counted"),
        _gauge("fairlead_alerts", "alerts", "Alerts that fire now, as this server sees it", ("alert", "slo", "severity"), "alerts x objectives"),
        _count("fairlead_alert_calls_total", "calls", "Calls that tell of alerts: outcome is delivered, retried, failed or dropped (too many waited)", ("outcome",), "4"),
        _gauge("fairlead_disk_free_ratio", "ratio", "The part of the data folder's disk that is free"),
    ),
    "replicas": (
        _counter("fairlead_replica_cpu_seconds_total", "seconds", "CPU time of a replica's process, of all its lives together", (*MODEL, "replica"), f"{V} x instances"),
        _gauge("fairlead_replica_resident_memory_bytes", "bytes", "Resident memory of a replica's process", (*MODEL, "replica"), f"{V} x instances"),
    ),
    "server": (
        _counter("process_cpu_seconds_total", "seconds", "CPU time of this server's own process"),
        _gauge("process_resident_memory_bytes", "bytes", "Resident memory of this server's own process"),
        _gauge("process_virtual_memory_bytes", "bytes", "Virtual memory of this server's own process"),
        _gauge("process_start_time_seconds", "seconds", "When it started, since 1970"),
        _gauge("process_open_fds", "files", "Open file descriptors"),
        _gauge("process_max_fds", "files", "So many may be open"),
        _gauge("python_info", "1", "The interpreter", ("version", "implementation", "major", "minor", "patchlevel")),
        _gauge("fairlead_build_info", "1", "This server's version", ("version",)),
        _histogram("fairlead_event_loop_lag_seconds", "seconds", "How late the event loop came to a timer: everybody waits so long"),
        _gauge("fairlead_event_loop_lag_max_seconds", "seconds", "The latest of the last half to whole minute"),
        _histogram("fairlead_gil_wait_seconds", "seconds", "How late a thread got the interpreter back after a short sleep"),
        _histogram("fairlead_gc_pause_seconds", "seconds", "Collections of garbage, in which nothing else runs", ("generation",), "3"),
        _count("fairlead_traces_total", "requests", "Requests whose traces were to be kept: outcome is exported, failed (the collector did not take them), dropped (too many waited) or rate (too many a second)", ("outcome",), "4"),
        _gauge("fairlead_scrape_seconds", "seconds", "The last scrape took so long, in slices between which requests are served"),
    ),
    "devices": (
        _gauge("fairlead_device_utilisation_ratio", "ratio", "The part of the time in which a kernel ran", ("device", "name"), "devices"),
        _gauge("fairlead_device_memory_used_bytes", "bytes", "Its memory that is used, by whomever", ("device", "name"), "devices"),
        _gauge("fairlead_device_memory_bytes", "bytes", "Its memory", ("device", "name"), "devices"),
        _gauge("fairlead_device_power_watts", "watts", "What it draws", ("device", "name"), "devices"),
        _gauge("fairlead_device_temperature_celsius", "celsius", "How hot it is", ("device", "name"), "devices"),
    ),
    "triton": (
        # Triton's counters have no `_total`: a gauge keeps the exact name
        _gauge("nv_inference_request_success", "requests", "As fairlead_requests_total", MODEL, V),
        _gauge("nv_inference_request_failure", "requests", "As fairlead_requests_total: reason is REJECTED, CANCELED or BACKEND", (*MODEL, "reason"), f"{V} x 3"),
        _gauge("nv_inference_count", "rows", "As fairlead_rows_total", MODEL, V),
        _gauge("nv_inference_exec_count", "batches", "As fairlead_batches_total", MODEL, V),
        _gauge("nv_inference_request_duration_us", "microseconds", "From arrival to answer, of all requests together", MODEL, V),
        _gauge("nv_inference_queue_duration_us", "microseconds", "From arrival to dispatch, of all requests together", MODEL, V),
        _gauge("nv_inference_compute_input_duration_us", "microseconds", "To put batches together", MODEL, V),
        _gauge("nv_inference_compute_infer_duration_us", "microseconds", "The model's time for all batches", MODEL, V),
        _gauge("nv_inference_compute_output_duration_us", "microseconds", "To take answers apart", MODEL, V),
        _gauge("nv_inference_pending_request_count", "requests", "As fairlead_queue_requests", MODEL, V),
    ),
    "vllm": (
        _gauge("vllm:num_requests_running", "sequences", "Sequences in the running batch", ("model_name",), M),
        _gauge("vllm:num_requests_waiting", "sequences", "Sequences that wait", ("model_name",), M),
        _gauge("vllm:kv_cache_usage_perc", "ratio", "As fairlead_kv_used_ratio", ("model_name",), M),
        _gauge("vllm:gpu_cache_usage_perc", "ratio", "Its older name, which dashboards still ask for", ("model_name",), M),
        _counter("vllm:prefix_cache_queries_total", "tokens", "As fairlead_prefix_cache_queried_tokens_total", ("model_name",), M),
        _counter("vllm:prefix_cache_hits_total", "tokens", "As fairlead_prefix_cache_hit_tokens_total", ("model_name",), M),
        _counter("vllm:spec_decode_num_draft_tokens_total", "tokens", "As fairlead_drafted_tokens_total", ("model_name",), M),
        _counter("vllm:spec_decode_num_accepted_tokens_total", "tokens", "As fairlead_accepted_tokens_total", ("model_name",), M),
        _counter("vllm:num_preemptions_total", "sequences", "As fairlead_preemptions_total", ("model_name",), M),
        _counter("vllm:prompt_tokens_total", "tokens", "As fairlead_prompt_tokens_total", ("model_name",), M),
        _counter("vllm:generation_tokens_total", "tokens", "As fairlead_generated_tokens_total", ("model_name",), M),
        _counter("vllm:request_success_total", "sequences", "As fairlead_finished_sequences_total", ("model_name", "finished_reason"), f"{M} x 4"),
        _histogram("vllm:time_to_first_token_seconds", "seconds", "From arrival to the first token", ("model_name",), M),
        _histogram("vllm:inter_token_latency_seconds", "seconds", "Between two tokens of one answer", ("model_name",), M),
        _histogram("vllm:time_per_output_token_seconds", "seconds", "Its older name", ("model_name",), M),
        _histogram("vllm:request_queue_time_seconds", "seconds", "From arrival to the first step", ("model_name",), M),
        _histogram("vllm:e2e_request_latency_seconds", "seconds", "From arrival to answer", ("model_name",), M),
        _histogram("vllm:request_prefill_time_seconds", "seconds", "From the first step to the first token", ("model_name",), M),
        _histogram("vllm:request_decode_time_seconds", "seconds", "From the first token to the last", ("model_name",), M),
        _histogram("vllm:request_inference_time_seconds", "seconds", "Both together", ("model_name",), M),
        _histogram("vllm:request_prompt_tokens", "tokens", "Of one prompt", ("model_name",), M, TOKENS),
        _histogram("vllm:request_generation_tokens", "tokens", "Of one answer", ("model_name",), M, TOKENS),
    ),
}  # fmt: skip


def _table() -> dict[str, Metric]:
    return {each.name: replace(each, group=group) for group, metrics in _BY_GROUP.items() for each in metrics}


TABLE = _table()
"""By name, in the order in which they are shown."""
