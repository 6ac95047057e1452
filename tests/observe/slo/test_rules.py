"""Rules for Prometheus, held against Prometheus's own tool: that it reads them, and that they fire when they should."""

import re
from pathlib import Path

import pytest
import yaml

from fairlead.core.slo import AlertSettings, Objective
from fairlead.observe.slo.alerts import BURN, RULES
from fairlead.observe.slo.rules import rules_text
from tests.observe.prometheus import promtool

ROOT = Path(__file__).parents[3]
RUNBOOKS = AlertSettings().runbooks
OBJECTIVES = (
    Objective(name="api.v1"),
    Objective(name="fast", kind="latency", threshold=0.5, target=0.99, window_days=7),
    Objective(name="quiet", severities=("ticket",)),
)


def checked(*arguments):
    """What it says. It must find nothing wrong."""
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_reads_the_rules(tmp_path):
    path = tmp_path / "rules.yml"
    path.write_text(rules_text(OBJECTIVES, RUNBOOKS))
    num_rules = 3 * 5 + 3 + 3 + 1 + len(RULES)
    assert f"{num_rules} rules found" in checked("check", "rules", path)


def test_the_file_in_deploy_is_what_the_command_writes():
    path = ROOT / "deploy/prometheus/alerts.yml"
    assert path.read_text() == rules_text((), RUNBOOKS), "fairlead slo rules > deploy/prometheus/alerts.yml"
    checked("check", "rules", path)


def test_every_alert_links_to_its_runbook_and_says_how_bad_it_is():
    for group in yaml.safe_load(rules_text(OBJECTIVES, "https://wiki.example/runbooks/"))["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["runbook_url"] == f"https://wiki.example/runbooks/{rule['alert']}.md"
                assert rule["annotations"]["summary"]
                assert rule["labels"]["severity"] in ("page", "ticket")


def unit_test(series, alerts, at, minutes="1m"):
    """`alerts`: (name, severity) that fire at that time, or do not."""
    return {
        "interval": minutes,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": name, "exp_alerts": expected} for name, expected in alerts],
    }


def run_tests(folder, objectives, tests):
    (folder / "rules.yml").write_text(rules_text(objectives, RUNBOOKS))
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}))
    return checked("test", "rules", folder / "test.yml")


def events(good, bad, *, name="api.v1"):
    return {
        f'fairlead_slo_events_total{{slo="{name}",outcome="good",instance="a"}}': good,
        f'fairlead_slo_events_total{{slo="{name}",outcome="bad",instance="a"}}': bad,
    }


def burning(severity, span, bad, *, name="api.v1", budget="0.001", shown):
    return {
        "exp_labels": {"alertname": BURN, "severity": severity, "slo": name, "long": span},
        "exp_annotations": {
            "summary": f"{name}: {shown} of the requests of {span} were bad; the budget is for {budget}",
            "runbook_url": f"{RUNBOOKS}/{BURN}.md",
        },
    }


def test_an_outage_pages_in_prometheus_too(tmp_path):
    series = events("0+1000x120 120000+0x20", "0+0x119 0+1000x21")
    calm = (BURN, [])
    fires = unit_test(series, [calm], "1h50m")
    # of the last hour 10 minutes were bad: a seventh of the burn that is shown
    burns = unit_test(
        series,
        [(BURN, [burning("page", "1h", 1, shown="16.67%"), burning("page", "6h", 1, shown="7.692%")])],
        "2h10m",
    )
    run_tests(tmp_path, OBJECTIVES[:1], [fires, burns])


@pytest.mark.parametrize(
    "series",
    [
        events("0+9995x500", "0+5x500"),
        events("0+0.1x500", "0+0.005x500"),
        events("0+0x500", "0+0x500"),
    ],
    ids=["within-budget", "hardly-any", "nothing"],
)
def test_nobody_is_woken_for_nothing(tmp_path, series):
    run_tests(tmp_path, OBJECTIVES[:1], [unit_test(series, [(BURN, [])], "8h")])


GROWS, STANDS = "0+1x60", "3+0x60"
CASES = {
    "FairleadDown": ({'up{job="fairlead",instance="a"}': "0x60"}, {'up{job="fairlead",instance="a"}': "1x60"}),
    "FairleadReplicaCrashLoop": (
        {'fairlead_instance_restarts_total{model="m",version="1"}': GROWS},
        {'fairlead_instance_restarts_total{model="m",version="1"}': "2+0x60"},
    ),
    "FairleadModelNotLoaded": (
        {'fairlead_model_loads_total{model="m",outcome="failure"}': "_x25 1x35"},
        {
            'fairlead_model_loads_total{model="m",outcome="failure"}': STANDS,
            'fairlead_model_loads_total{model="m",outcome="success"}': GROWS,
        },
    ),
    "FairleadStoreUnreachable": (
        {'fairlead_control_store_failures_total{instance="a"}': GROWS},
        {'fairlead_control_store_failures_total{instance="a"}': STANDS, 'fairlead_auth_refresh_failures_total{source="issuer"}': GROWS},
    ),
    "FairleadUsageLost": (
        {'fairlead_usage_records_total{outcome="dropped"}': GROWS},
        {'fairlead_usage_records_total{outcome="written"}': GROWS},
    ),
    "FairleadKvExhausted": (
        {
            'fairlead_kv_blocks_free{instance="a",model="m",version="1"}': "1x60",
            'fairlead_kv_blocks{instance="a",model="m",version="1"}': "100x60",
            'fairlead_sequences{instance="a",model="m",version="1",state="waiting"}': "4x60",
        },
        {
            'fairlead_kv_blocks_free{instance="a",model="m",version="1"}': "1x60",
            'fairlead_kv_blocks{instance="a",model="m",version="1"}': "100x60",
            'fairlead_sequences{instance="a",model="m",version="1",state="waiting"}': "0x60",
        },
    ),
    "FairleadPreemptionStorm": (
        {'fairlead_preemptions_total{model="m",version="1"}': "0+120x60"},
        {'fairlead_preemptions_total{model="m",version="1"}': "0+10x60"},
    ),
    "FairleadShedding": (
        {
            'fairlead_gateway_refused_total{model="m",reason="queue-full"}': "0+10x60",
            'fairlead_requests_total{model="m",version="1",outcome="success"}': "0+100x60",
        },
        {
            'fairlead_gateway_refused_total{model="m",reason="queue-full"}': "0+2x60",
            'fairlead_gateway_refused_total{model="m",reason="limit-tokens"}': "0+500x60",
            'fairlead_requests_total{model="m",version="1",outcome="success"}': "0+100x60",
        },
    ),
    "FairleadDiskFull": ({'fairlead_disk_free_ratio{instance="a"}': "0.04x60"}, {'fairlead_disk_free_ratio{instance="a"}': "0.06x60"}),
    "FairleadPlaceLeftOut": (
        {'fairlead_gateway_breaker_opened_total{model="m",place="p",reason="failures"}': "_x25 1x35"},
        {'fairlead_gateway_breaker_opened_total{model="m",place="p",reason="failures"}': STANDS},
    ),
    "FairleadRedisGone": (
        {'fairlead_limits_redis_outages_total{instance="a"}': GROWS},
        {'fairlead_limits_redis_outages_total{instance="a"}': STANDS},
    ),
    "FairleadEventLoopBlocked": (
        {'fairlead_event_loop_lag_max_seconds{instance="a"}': "0.8x60"},
        {'fairlead_event_loop_lag_max_seconds{instance="a"}': "0.05x60"},
    ),
    "FairleadTelemetryDropped": (
        {'fairlead_traces_total{outcome="dropped"}': GROWS},
        {'fairlead_traces_total{outcome="exported"}': GROWS, 'fairlead_traces_total{outcome="rate"}': GROWS},
    ),
    "FairleadAlertsUndelivered": (
        {'fairlead_alert_calls_total{outcome="failed"}': GROWS},
        {'fairlead_alert_calls_total{outcome="retried"}': GROWS},
    ),
    "FairleadJobsFailing": (
        {
            'fairlead_jobs_total{model="m",status="failed",reason="model-error"}': "0+3x60",
            'fairlead_jobs_total{model="m",status="complete",reason=""}': "0+3x60",
        },
        {
            'fairlead_jobs_total{model="m",status="failed",reason="model-error"}': "0+1x60",
            'fairlead_jobs_total{model="m",status="complete",reason=""}': "0+30x60",
        },
    ),
    "FairleadJobsStuck": (
        {'fairlead_unfinished_jobs_oldest_seconds{status="queued"}': "4000+60x60"},
        {
            'fairlead_unfinished_jobs_oldest_seconds{status="queued"}': "100x60",
            'fairlead_unfinished_jobs_oldest_seconds{status="active"}': "9000x60",
        },
    ),
    "FairleadRolloutAborted": (
        {'fairlead_rollouts_total{model="m",outcome="aborted"}': "_x25 1x35"},
        {'fairlead_rollouts_total{model="m",outcome="complete"}': GROWS},
    ),
}
"""Alert → (series with which it fires after half an hour, series with which it does not)."""


def test_every_rule_has_a_case():
    assert CASES.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_when_it_should_and_only_then(tmp_path, name):
    """What exactly it says is read from what the tool shows, where nothing is expected."""
    fires, calm = CASES[name]
    run_tests(tmp_path, (), [unit_test(calm, [(rule.name, []) for rule in RULES], "32m")])
    with pytest.raises(AssertionError) as raised:
        run_tests(tmp_path, (), [unit_test(fires, [(name, [])], "32m")])
    shown = str(raised.value)
    assert f'alertname="{name}"' in shown
    [severity] = {rule.severity for rule in RULES if rule.name == name}
    assert f'severity="{severity}"' in shown
    assert not re.search(r"\$labels|no value|error executing", shown)
