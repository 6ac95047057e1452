"""Counters of the gateway: a name, some labels of bounded values, a number.

One row of COUNTS for each; docs/operations.md lists the same (a test compares them).
"""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily

COUNTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fairlead_gateway_reused_total": ("answers that needed no computing (hit, semantic, joined, stale)", ("model", "outcome")),
    "fairlead_gateway_degraded_total": ("requests that were given less while the wait was long", ("model", "class")),
    "fairlead_gateway_flagged_total": ("texts that a filter flagged and let pass", ("model", "rule")),
    "fairlead_gateway_filtered_total": (
        "requests that a filter blocked, and answers in which one found something",
        ("model", "rule", "where"),
    ),
    "fairlead_gateway_refused_total": ("requests refused by the gateway", ("model", "reason")),
    "fairlead_gateway_abuse_actions_total": (
        "tenants whose traffic looked abnormal, by what was done and the main reason",
        ("action", "reason"),
    ),
    "fairlead_auth_failures_total": ("requests whose credentials were refused", ("kind",)),
    "fairlead_auth_refresh_failures_total": ("failures to read keys and tenants (store), or an issuer's keys (issuer)", ("source",)),
    "fairlead_usage_records_total": (
        "records of requests and audit entries: written, dropped (too many waited), refused (by the store)",
        ("outcome",),
    ),
    "fairlead_usage_failed_writes_total": ("times that the store did not take records and was asked again later", ()),
    "fairlead_gateway_retries_total": ("requests sent to another place, or once more, before the first byte", ("model", "reason")),
    "fairlead_gateway_fallbacks_total": ("requests handed to a fallback model", ("model", "fallback")),
    "fairlead_gateway_hedges_total": ("requests sent to a second place too, whose answer was first (won) or not", ("model", "outcome")),
    "fairlead_gateway_breaker_opened_total": ("times that a place was left out", ("model", "place", "reason")),
    "fairlead_shadow_copies_total": (
        "requests of which a shadow was to get a copy: answered, failed, and not compared (busy, full, large, missing, elsewhere, refused, unread)",
        ("model", "outcome"),
    ),
    "fairlead_rollouts_total": ("rollouts that ended, and how (complete, aborted), where this server decided", ("model", "outcome")),
    "fairlead_control_store_failures_total": ("ticks of control in which the store did not answer", ()),
    "fairlead_jobs_total": ("jobs that ended, by how and why", ("model", "status", "reason")),
    "fairlead_job_retries_total": ("tries of jobs that went wrong and were put off to another one", ("model",)),
    "fairlead_jobs_lost_total": ("jobs that were another runner's before they ended here", ()),
    "fairlead_webhook_deliveries_total": ("calls to receivers of webhooks (delivered, retried, failed)", ("outcome",)),
    "fairlead_limits_redis_outages_total": ("times that Redis, where limits are shared, stopped answering", ()),
    "fairlead_limits_local_holds_total": ("requests whose limits were counted in this process while Redis did not answer", ()),
    "fairlead_limits_lost_settles_total": ("ends of requests that Redis was never told, because too many waited or it refused them", ()),
    "fairlead_cache_redis_failures_total": ("times that the response cache in Redis did not answer in time, or wrongly", ("what",)),
}
"""Name → (what is counted, labels)."""


class Counts:
    """Added to in the event loop only."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, name: str, *labels: str, by: int = 1) -> None:
        self._counts[name, *labels] += by

    def get(self, name: str, *labels: str) -> int:
        return self._counts[name, *labels]

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, (what, labels) in COUNTS.items():
            family = CounterMetricFamily(name.removesuffix("_total"), what, labels=labels)
            for (counted, *values), number in self._counts.items():
                if counted == name:
                    family.add_metric(values, number)
            yield family
