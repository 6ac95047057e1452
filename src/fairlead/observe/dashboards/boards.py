"""Which dashboards there are, and what they show."""

from typing import Literal

from msgspec import Struct

from fairlead.observe.dashboards.queries import Query, batch_rows, errors, hourly, mean, now, plain, quantile, quantiles, rate, ratio

Look = Literal["timeseries", "stat", "gauge"]


class Panel(Struct, frozen=True, kw_only=True):
    title: str
    queries: tuple[Query, ...]
    look: Look = "timeseries"
    width: int = 8
    thresholds: tuple[float, ...] = ()
    """From where on it is yellow, and red; where the second is smaller, below."""
    stack: bool = False
    help: str = ""


class Row(Struct, frozen=True):
    title: str
    panels: tuple[Panel, ...]


class Dashboard(Struct, frozen=True, kw_only=True):
    name: str
    """Of its file."""
    title: str
    help: str
    variables: tuple[str, ...]
    rows: tuple[Row, ...]


_SERVER = Row(
    "Server",
    (
        Panel(title="CPU", queries=(rate("process_cpu_seconds_total", text="server", unit="none"), rate("fairlead_replica_cpu_seconds_total", "model", text="replicas of", unit="none")), help="Cores.", stack=True),
        Panel(title="Memory", queries=(now("process_resident_memory_bytes", text="server"), now("fairlead_replica_resident_memory_bytes", "model", text="replicas of")), stack=True),
        Panel(title="Event loop lag", queries=(*quantiles("fairlead_event_loop_lag_seconds"), now("fairlead_event_loop_lag_max_seconds", how="max", text="greatest")), thresholds=(0.05, 0.25)),
        Panel(title="Waiting for the interpreter", queries=quantiles("fairlead_gil_wait_seconds"), thresholds=(0.02, 0.1)),
        Panel(title="Collections of garbage", queries=(quantile(0.99, "fairlead_gc_pause_seconds", "generation"),)),
        Panel(title="Open files", queries=(now("process_open_fds", text="open"), now("process_max_fds", text="allowed"))),
    ),
)  # fmt: skip
_DEVICES = Row(
    "Devices",
    (
        Panel(title="Utilisation", queries=(now("fairlead_device_utilisation_ratio", "device", "name", how="max"),), width=6),
        Panel(title="Memory", queries=(now("fairlead_device_memory_used_bytes", "device", text="used of"), now("fairlead_device_memory_bytes", "device", text="all of")), width=6),
        Panel(title="Power", queries=(now("fairlead_device_power_watts", "device", "name", how="max"),), width=6),
        Panel(title="Temperature", queries=(now("fairlead_device_temperature_celsius", "device", "name", how="max"),), thresholds=(75, 85), width=6),
    ),
)  # fmt: skip
_JOBS = Row(
    "Jobs",
    (
        Panel(title="Unfinished jobs", queries=(now("fairlead_unfinished_jobs", "model", "status", how="max"),), stack=True),
        Panel(title="The oldest", queries=(now("fairlead_unfinished_jobs_oldest_seconds", "status", how="max"),), thresholds=(600, 3600)),
        Panel(title="Jobs that ended", queries=(rate("fairlead_jobs_total", "status", "reason"), rate("fairlead_job_retries_total", text="tried again"))),
        Panel(title="Webhooks to be called", queries=(now("fairlead_webhooks_pending", how="max", text="pending"),)),
        Panel(title="Calls to receivers", queries=(rate("fairlead_webhook_deliveries_total", "outcome"),)),
    ),
)  # fmt: skip

_OBJECTIVES = Row(
    "Objectives",
    (
        Panel(title="Left of the error budget", queries=(now("fairlead_slo_budget_ratio", "slo", how="min"),), look="gauge", thresholds=(0.5, 0.1)),
        Panel(title="How fast it burns", queries=(plain(now("fairlead_slo_burn_rate", "slo", "window", how="max")),), thresholds=(1, 6)),
        Panel(title="Alerts", queries=(now("fairlead_alerts", "alert", "slo", "severity"),), look="stat", thresholds=(1, 2)),
        Panel(title="Bad requests", queries=(rate("fairlead_slo_events_total", "slo", outcome="bad"),)),
        Panel(title="Traces kept", queries=(rate("fairlead_traces_total", "outcome"),)),
        Panel(title="Free on the data folder's disk", queries=(now("fairlead_disk_free_ratio", how="min"),), look="stat", thresholds=(0.2, 0.05)),
    ),
)  # fmt: skip

OVERVIEW = Dashboard(
    name="overview",
    title="Fairlead: overview",
    help="Traffic, latency, errors and saturation of all models, and how the server and its devices are.",
    variables=("model", "version"),
    rows=(
        Row(
            "Traffic",
            (
                Panel(title="Requests", queries=(rate("fairlead_requests_total"),), look="stat", width=6),
                Panel(title="Failed", queries=(errors(),), look="stat", width=6, thresholds=(0.01, 0.05)),
                Panel(title="p99", queries=(quantile(0.99, "fairlead_request_seconds"),), look="stat", width=6),
                Panel(title="Replicas that are not ready", queries=(now("fairlead_replicas", text="not ready", state="starting|failed"),), look="stat", width=6, thresholds=(1, 2)),
                Panel(title="Requests by model", queries=(rate("fairlead_requests_total", "model"),), stack=True),
                Panel(title="Requests by their end", queries=(rate("fairlead_requests_total", "outcome"),), stack=True),
                Panel(title="Failed by model", queries=(errors("model"),), thresholds=(0.01, 0.05)),
                Panel(title="From arrival to answer", queries=quantiles("fairlead_request_seconds")),
                Panel(title="p99 by model", queries=(quantile(0.99, "fairlead_request_seconds", "model"),)),
                Panel(title="Answers by protocol and status", queries=(rate("fairlead_responses_total", "protocol", "status"),)),
            ),
        ),
        Row(
            "Saturation",
            (
                Panel(title="Requests waiting", queries=(now("fairlead_queue_requests", "model", text="batcher of"), now("fairlead_gateway_waiting_requests", "model", text="line of")), stack=True),
                Panel(title="In flight, of models with a line", queries=(now("fairlead_gateway_in_flight_requests", "model"),)),
                Panel(title="Refused", queries=(rate("fairlead_gateway_refused_total", "reason"),), stack=True),
                Panel(title="Replicas", queries=(now("fairlead_replicas", "state"),), stack=True),
                Panel(title="Replicas started again", queries=(rate("fairlead_instance_restarts_total", "model", "version"),)),
                Panel(title="Sent once more, or elsewhere", queries=(rate("fairlead_gateway_retries_total", "reason", text="retry:"), rate("fairlead_gateway_fallbacks_total", "fallback", text="fallback:"), rate("fairlead_gateway_hedges_total", "outcome", text="hedge:"))),
                Panel(title="Seconds to load a version", queries=(now("fairlead_model_load_seconds", "model", "version", how="max"),)),
                Panel(title="Loads", queries=(rate("fairlead_model_loads_total", "model", "outcome"),)),
                Panel(title="Seconds in the gateway's line", queries=quantiles("fairlead_gateway_wait_seconds")),
            ),
        ),
        _OBJECTIVES,
        _SERVER,
        _DEVICES,
        _JOBS,
    ),
)  # fmt: skip

LLM = Dashboard(
    name="llm",
    title="Fairlead: language models",
    help="Tokens, latencies that readers feel, KV memory and what the engine's steps do.",
    variables=("model", "version"),
    rows=(
        Row(
            "What readers feel",
            (
                Panel(title="Time to the first token", queries=quantiles("fairlead_time_to_first_token_seconds"), thresholds=(1, 5)),
                Panel(title="Between two tokens", queries=quantiles("fairlead_inter_token_seconds"), thresholds=(0.1, 0.5)),
                Panel(title="From arrival to the end", queries=quantiles("fairlead_request_seconds")),
                Panel(title="Time to the first token, p99 by model", queries=(quantile(0.99, "fairlead_time_to_first_token_seconds", "model", "version"),)),
                Panel(title="Between two tokens, p99 by model", queries=(quantile(0.99, "fairlead_inter_token_seconds", "model", "version"),)),
                Panel(title="From arrival to the first step", queries=quantiles("fairlead_generation_queue_seconds")),
            ),
        ),
        Row(
            "Work",
            (
                Panel(title="Tokens", queries=(rate("fairlead_prompt_tokens_total", text="prompt"), rate("fairlead_generated_tokens_total", text="generated")), stack=True),
                Panel(title="Tokens generated by model", queries=(rate("fairlead_generated_tokens_total", "model", "version"),)),
                Panel(title="Sequences", queries=(now("fairlead_sequences", "state"),), stack=True),
                Panel(title="Sequences by their end", queries=(rate("fairlead_finished_sequences_total", "reason"),), stack=True),
                Panel(title="A step of the engine", queries=quantiles("fairlead_step_seconds")),
                Panel(title="Steps that failed", queries=(rate("fairlead_engine_failed_steps_total", "model", text="step of"), rate("fairlead_quarantined_requests_total", "model", text="request to"))),
            ),
        ),
        Row(
            "KV memory",
            (
                Panel(title="Used", queries=(now("fairlead_kv_used_ratio", "model", "version", how="max"),), look="gauge", thresholds=(0.8, 0.95)),
                Panel(title="Blocks", queries=(now("fairlead_kv_blocks", "model", text="all of"), now("fairlead_kv_blocks_free", "model", text="free of"))),
                Panel(title="Memory", queries=(now("fairlead_kv_bytes", "model", "version"),), stack=True),
                Panel(title="Of the prompts, found in the prefix cache", queries=(ratio(rate("fairlead_prefix_cache_hit_tokens_total", "model"), rate("fairlead_prefix_cache_queried_tokens_total", "model"), "{{model}}"),)),
                Panel(title="Of the drafts' tokens, chosen by the model", queries=(ratio(rate("fairlead_accepted_tokens_total", "model"), rate("fairlead_drafted_tokens_total", "model"), "{{model}}"),)),
                Panel(title="Preempted", queries=(rate("fairlead_preemptions_total", "model", "version"),)),
                Panel(title="Waiting in the gateway's line", queries=(now("fairlead_gateway_waiting_requests", "model", "priority"),), stack=True),
            ),
        ),
    ),
)  # fmt: skip

TENSORS = Dashboard(
    name="tensors",
    title="Fairlead: tensors",
    help="Batches of rows: where a request's time goes, and how full batches are.",
    variables=("model", "version"),
    rows=(
        Row(
            "Time",
            (
                Panel(title="From arrival to answer", queries=quantiles("fairlead_request_seconds")),
                Panel(title="From arrival to dispatch", queries=quantiles("fairlead_queue_seconds")),
                Panel(title="The model's time for one batch", queries=quantiles("fairlead_compute_seconds")),
                Panel(title="p99 by version", queries=(quantile(0.99, "fairlead_request_seconds", "model", "version"),)),
                Panel(title="Queue, p99 by version", queries=(quantile(0.99, "fairlead_queue_seconds", "model", "version"),)),
                Panel(title="Compute, p99 by version", queries=(quantile(0.99, "fairlead_compute_seconds", "model", "version"),)),
            ),
        ),
        Row(
            "Batches",
            (
                Panel(title="Rows", queries=(rate("fairlead_rows_total", "model", "version"),), stack=True),
                Panel(title="Rows of a batch", queries=(mean("fairlead_batch_rows", "model", "version", text=""),)),
                Panel(
                    title="How full batches are",
                    queries=(ratio(batch_rows("model"), rate("fairlead_batch_capacity_rows_total", "model"), "{{model}}"),),
                ),
                Panel(title="Why batches closed", queries=(rate("fairlead_batches_total", "close_reason"),), stack=True),
                Panel(title="Requests waiting", queries=(now("fairlead_queue_requests", "model", "version"),), stack=True),
                Panel(title="Rows waiting", queries=(now("fairlead_queue_rows", "model", "version"),), stack=True),
            ),
        ),
        Row(
            "Replicas",
            (
                Panel(title="CPU by replica", queries=(rate("fairlead_replica_cpu_seconds_total", "model", "version", "replica", unit="none"),), help="Cores."),
                Panel(title="Memory by replica", queries=(now("fairlead_replica_resident_memory_bytes", "model", "version", "replica"),)),
                Panel(title="Started again", queries=(rate("fairlead_instance_restarts_total", "model", "version"),)),
            ),
        ),
    ),
)  # fmt: skip

IMAGES = Dashboard(
    name="images",
    title="Fairlead: images",
    help="Pictures, their denoising steps, and the jobs that ask for them.",
    variables=("model", "version"),
    rows=(
        Row(
            "Pictures",
            (
                Panel(title="Pictures", queries=(rate("fairlead_pictures_total", "model", "version"),), stack=True),
                Panel(title="Denoising steps", queries=(rate("fairlead_denoising_steps_total", "model", "version"),), stack=True),
                Panel(title="Steps that the first-block cache answered", queries=(ratio(rate("fairlead_cached_denoising_steps_total", "model"), rate("fairlead_denoising_steps_total", "model"), "{{model}}"),)),
                Panel(title="From arrival to the picture", queries=quantiles("fairlead_request_seconds")),
                Panel(title="From arrival to the first step", queries=quantiles("fairlead_generation_queue_seconds")),
                Panel(title="A step of the engine", queries=quantiles("fairlead_step_seconds")),
                Panel(title="Pictures now", queries=(now("fairlead_sequences", "model", "state"),), stack=True),
                Panel(title="Waiting in the gateway's line", queries=(now("fairlead_gateway_waiting_requests", "model", "priority"),), stack=True),
                Panel(title="Steps that failed", queries=(rate("fairlead_engine_failed_steps_total", "model"),)),
            ),
        ),
        _JOBS,
    ),
)  # fmt: skip

TENANTS = Dashboard(
    name="tenants",
    title="Fairlead: tenants and cost",
    help="Who uses how much, what it costs, and what limits refuse.",
    variables=("tenant", "model"),
    rows=(
        Row(
            "Tenants",
            (
                Panel(title="Requests", queries=(rate("fairlead_tenant_requests_total", "tenant"),), stack=True),
                Panel(title="Not answered", queries=(rate("fairlead_tenant_requests_total", "tenant", "outcome", outcome="failure|refused"),)),
                Panel(title="Tokens", queries=(rate("fairlead_tenant_tokens_total", "tenant", "direction"),), stack=True),
                Panel(title="Cost of an hour, by tenant", queries=(hourly(rate("fairlead_tenant_cost_total", "tenant")),), stack=True),
                Panel(title="Cost of an hour, by model", queries=(hourly(rate("fairlead_cost_total", "model")),), stack=True),
                Panel(title="Cost of an hour", queries=(hourly(rate("fairlead_cost_total")),), look="stat"),
            ),
        ),
        Row(
            "Limits",
            (
                Panel(title="Refused by limits and budgets", queries=(rate("fairlead_limits_rejected_total", "kind", "unit"),), stack=True),
                Panel(title="Left of the tightest", queries=(now("fairlead_limits_remaining_ratio", "kind", "unit", how="min"),), thresholds=(0.2, 0.05)),
                Panel(title="Held by requests under way", queries=(now("fairlead_limits_held", "subject", "unit"),)),
                Panel(title="Refused, by why", queries=(rate("fairlead_gateway_refused_total", "model", "reason"),), stack=True),
                Panel(title="Credentials refused", queries=(rate("fairlead_auth_failures_total", "kind"),)),
                Panel(title="Abuse", queries=(rate("fairlead_gateway_abuse_actions_total", "action", "reason"),)),
            ),
        ),
        Row(
            "The response cache, and the books",
            (
                Panel(title="Answers that needed no computing", queries=(rate("fairlead_gateway_reused_total", "model", "outcome"), rate("fairlead_response_cache_misses_total", "model", text="missed:"))),
                Panel(title="Stored answers", queries=(now("fairlead_response_cache_bytes", text="used"), now("fairlead_response_cache_capacity_bytes", text="allowed"))),
                Panel(title="Records of usage", queries=(rate("fairlead_usage_records_total", "outcome"), rate("fairlead_usage_failed_writes_total", text="writes that failed"))),
            ),
        ),
    ),
)  # fmt: skip

ROLLOUT = Dashboard(
    name="rollout",
    title="Fairlead: rollout",
    help="A candidate beside its champion: traffic, evidence, and the two compared.",
    variables=("model", "version"),
    rows=(
        Row(
            "The rollout",
            (
                Panel(title="Phase", queries=(now("fairlead_rollout_phase", "model", "version", "phase", how="max"),), look="stat", width=6),
                Panel(title="Share of the candidate", queries=(now("fairlead_rollout_share_ratio", "model", "version", how="max"),), width=6),
                Panel(title="Step", queries=(now("fairlead_rollout_step", "model", how="max", text="at, of"), now("fairlead_rollout_steps", "model", how="max", text="all, of")), width=6),
                Panel(title="Evidence that it is worse", queries=(now("fairlead_rollout_evidence", "model", "metric", how="max"),), width=6, thresholds=(0.5, 0.9)),
                Panel(title="Traffic wanted", queries=(now("fairlead_traffic_share_ratio", "model", "version", how="max"),), stack=True),
                Panel(title="Traffic there is", queries=(rate("fairlead_requests_total", "model", "version"),), stack=True),
                Panel(title="Rollouts that ended", queries=(rate("fairlead_rollouts_total", "model", "outcome"),)),
            ),
        ),
        Row(
            "Versions compared",
            (
                Panel(title="Failed", queries=(errors("model", "version"),), thresholds=(0.01, 0.05)),
                Panel(title="From arrival to answer, p99", queries=(quantile(0.99, "fairlead_request_seconds", "model", "version"),)),
                Panel(title="Time to the first token, p99", queries=(quantile(0.99, "fairlead_time_to_first_token_seconds", "model", "version"),)),
                Panel(title="Copies for a shadow", queries=(rate("fairlead_shadow_copies_total", "model", "outcome"),), stack=True),
                Panel(title="Replicas started again", queries=(rate("fairlead_instance_restarts_total", "model", "version"),)),
                Panel(title="Memory of replicas", queries=(now("fairlead_replica_resident_memory_bytes", "model", "version"),)),
            ),
        ),
    ),
)  # fmt: skip

DASHBOARDS = (OVERVIEW, LLM, TENSORS, IMAGES, TENANTS, ROLLOUT)
