"""What a request is to an objective, and which objectives there can be."""

import pytest

from fairlead.core.errors import ConfigError
from fairlead.core.generation import Usage
from fairlead.core.settings import parse_settings
from fairlead.core.slo import CALLERS, OURS, Objective, judge
from fairlead.core.timeline import Timeline
from fairlead.runtime.upstream.errors import UpstreamGone
from tests.test_docs import refusals

AVAILABLE = Objective(name="available")
FAST = Objective(name="fast", kind="latency", threshold=0.5)
FIRST = Objective(name="first", kind="time_to_first_token", threshold=0.25)
TOKENS = Objective(name="tokens", kind="inter_token", threshold=0.05)


def request(outcome="success", seconds=0.1, *, reason="", kind="infer", protocol="http", first=0.0, tokens=0, model="m", status=200):
    return Timeline(
        request_id="r",
        protocol=protocol,
        arrived=100.0,
        kind=kind,
        model=model,
        qos_class="standard",
        outcome=outcome,
        reason=reason,
        status=status,
        first_at=100.0 + first if first else 0.0,
        ended=100.0 + seconds,
        usage=Usage(completion_tokens=tokens) if tokens else None,
    )


@pytest.mark.parametrize(
    ("timeline", "judged"),
    [
        (request(), "good"),
        (request("failure"), "bad"),
        (request("cancelled"), None),
        (request("refused", reason="queue-full"), "bad"),
        (request("refused", reason="draining"), "bad"),
        (request("refused", reason="limit-tokens"), None),
        (request("refused", reason="limit-concurrent"), None),
        (request("refused", reason="budget-money"), None),
        (request("refused", reason="invalid-request"), None),
        (request("refused", reason="not-found"), None),
        (request("refused", reason="filtered"), None),
        (request("refused", reason="a-reason-of-tomorrow"), "bad"),
        (request("failure", reason="upstream-error", status=503), "bad"),
        (request("failure", reason="upstream-error", status=404), "bad"),
        (request("failure", reason="upstream-error", status=400), None),
        (request("failure", kind=""), None),
        (request("failure", protocol="job"), None),
    ],
)
def test_the_server_answers_for_what_it_could_not_do_and_callers_for_what_they_may_not(timeline, judged):
    assert judge(timeline, AVAILABLE) == judged


def test_speed_is_measured_of_answers_only():
    assert judge(request(seconds=0.5), FAST) == "good"
    assert judge(request(seconds=0.51), FAST) == "bad"
    assert [judge(request(outcome, 9.0, reason="queue-full"), FAST) for outcome in ("failure", "refused", "cancelled")] == [None] * 3


def test_the_first_token_counts_where_there_is_a_first_one():
    assert judge(request(first=0.25, seconds=9.0), FIRST) == "good"
    assert judge(request(first=0.3, seconds=9.0), FIRST) == "bad"
    assert judge(request(seconds=9.0), FIRST) is None


def test_the_time_between_tokens_is_the_mean_of_an_answer():
    assert judge(request(first=1.0, seconds=2.0, tokens=21), TOKENS) == "good"
    assert judge(request(first=1.0, seconds=2.0, tokens=20), TOKENS) == "bad"
    assert judge(request(first=1.0, seconds=2.0, tokens=1), TOKENS) is None
    assert judge(request(seconds=2.0, tokens=20), TOKENS) is None


def test_a_clock_that_went_back_makes_nobody_slow():
    assert judge(request(seconds=-5.0), FAST) == "good"


def test_every_reason_of_a_refusal_is_somebodys():
    """A new reason must be put on one side."""
    assert UpstreamGone.reason in OURS
    reasons = {reason for _, reason in refusals() if not reason.startswith(("limit-", "budget-"))} | {"limits-unreachable"}
    assert reasons == OURS | CALLERS
    assert not OURS & CALLERS


@pytest.mark.parametrize(
    ("objective", "model", "qos_class", "concerned"),
    [
        (Objective(name="a"), "anything", "batch", True),
        (Objective(name="a", model="*"), "anything", "", True),
        (Objective(name="a", model="llama-*"), "llama-8b", "", True),
        (Objective(name="a", model="llama-*"), "qwen", "", False),
        (Objective(name="a", model="m[1]"), "m[1]", "", True),
        (Objective(name="a", qos_class="interactive"), "m", "interactive", True),
        (Objective(name="a", qos_class="interactive"), "m", "batch", False),
    ],
)
def test_an_objective_is_of_a_model_or_of_some_and_of_a_class_or_of_all(objective, model, qos_class, concerned):
    assert objective.concerns(model, qos_class) is concerned


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("slos: [{name: a, kind: latency}]", "needs a `threshold`"),
        ("slos: [{name: a, threshold: 1}]", "not of availability"),
        ("slos: [{name: 'a b'}]", "name"),
        ("slos: [{name: a, target: 1}]", "target"),
        ("slos: [{name: a}, {name: a, target: 0.9}]", "two objectives of the name `a`"),
        ("slos: [{name: a, window_days: 1}]", "window_days"),
        ("alerts: {webhooks: [{url: 'https://a.example'}]}", "`secret` must be"),
        ("alerts: {webhooks: [{url: 'https://a.example', secret: whsec_c2hvcnQ=}]}", "`secret` must be"),
        ("alerts: {webhooks: [{url: 'https://a.example', format: pagerduty}]}", "routing key"),
        ("alerts: {webhooks: [{url: 'https://a.example', format: slack, secret: x}]}", "takes no `secret`"),
    ],
)
def test_what_cannot_be_meant_is_said_with_its_place(text, error):
    with pytest.raises(ConfigError) as raised:
        parse_settings(text, "fairlead.yaml")
    assert raised.value.message.startswith("fairlead.yaml:1: ")
    assert error in raised.value.message


def test_without_a_word_there_are_no_objectives():
    assert parse_settings("", "fairlead.yaml").slos == ()
