"""What callers are told about their limits."""

from datetime import UTC, datetime

import pytest
from http_sf import parse

from fairlead.core.policy import GatewaySettings, LimitSettings, Unit, rules_of
from fairlead.gateway.limits import limiter_of
from fairlead.gateway.limits.headers import duration, go_duration
from fairlead.gateway.limits.ledger import Limiter
from fairlead.gateway.limits.meter import Subject, period_end
from fairlead.gateway.limits.redis import SharedLimiter
from fairlead.observe.counts import Counts

NOW = datetime(2026, 3, 31, 23, 0, tzinfo=UTC).timestamp()
CHAT = {Unit.REQUESTS: 1.0, Unit.TOKENS: 300.0, Unit.MONEY: 0.25}


def parsed(value: str) -> dict[str, dict[str, object]]:
    """As RFC 9651 reads a list of strings with parameters."""
    return dict(parse(value.encode(), tltype="list"))


def test_both_families_of_headers_name_the_rule_that_leaves_least_of_each_unit():
    limiter = Limiter()
    hold = limiter.hold(
        (
            Subject("tenant:acme", rules_of({"requests_per_minute": 600, "tokens_per_minute": 90000, "money_per_month": 12.5})),
            Subject("key:k1", rules_of({"requests_per_minute": 60, "tokens_per_day": 1000, "concurrent": 4})),
            Subject("model:chat", rules_of({"requests_per_second": 1000})),
        ),
        CHAT,
        NOW,
    )
    headers = hold.headers
    assert {name: value for name, value in headers.items() if name.startswith("x-")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "700",
        "x-ratelimit-reset-tokens": "1h0m0s",
    }
    assert parsed(headers["RateLimit-Policy"]) == {
        "key-requests_per_minute": {"q": 60, "w": 60},
        "key-tokens_per_day": {"q": 1000, "w": 86400, "qu": "fairlead-tokens"},
        "tenant-money_per_month": {"q": 12_500_000, "qu": "fairlead-money-millionths"},
        "key-concurrent": {"q": 4, "qu": "concurrent-requests"},
    }
    assert parsed(headers["RateLimit"]) == {
        "key-requests_per_minute": {"r": 59, "t": 1},
        "key-tokens_per_day": {"r": 700, "t": 3600},
        "tenant-money_per_month": {"r": 12_250_000, "t": 3600},
        "key-concurrent": {"r": 3},
    }


def test_an_overdrawn_rule_has_nothing_remaining():
    limiter = Limiter()
    acme = (Subject("tenant:acme", rules_of({"tokens_per_minute": 600})),)
    hold = limiter.hold(acme, CHAT, NOW)
    hold.settle({Unit.TOKENS: 900.0}, NOW)
    assert hold.headers["RateLimit"] == '"tenant-tokens_per_minute";r=0;t=90'
    assert hold.headers["x-ratelimit-reset-tokens"] == "1m30s"


def test_amounts_that_no_header_can_say_are_said_as_the_greatest_that_it_can():
    limiter = Limiter()
    hold = limiter.hold((Subject("tenant:acme", rules_of({"tokens_per_minute": float("inf"), "money_per_day": 1e12})),), CHAT, NOW)
    hold.settle(CHAT, NOW + 1)
    assert [fields["r"] for fields in parsed(hold.headers["RateLimit"]).values()] == [999_999_999_999_999] * 2
    assert [fields["q"] for fields in parsed(hold.headers["RateLimit-Policy"]).values()] == [999_999_999_999_999] * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90061.25, "25h1m1.25s"),
    ],
)
def test_durations_are_gos_and_never_too_short(seconds, text):
    assert go_duration(seconds) == text


def test_durations_for_people():
    assert [duration(each) for each in (0.01, 1, 61.26, 300, 7200, 86400 * 3)] == ["0.1 s", "1.0 s", "61.3 s", "5 min", "2 h", "72 h"]


def test_periods_end_with_the_calendar_in_utc():
    assert period_end("day", NOW) == NOW + 3600
    assert period_end("month", NOW) == NOW + 3600
    assert datetime.fromtimestamp(period_end("month", NOW + 3600), UTC) == datetime(2026, 5, 1, tzinfo=UTC)
    assert datetime.fromtimestamp(period_end("month", NOW + 86400 * 260), UTC) == datetime(2027, 1, 1, tzinfo=UTC)


def test_the_settings_say_where_limits_are_counted():
    assert isinstance(limiter_of(GatewaySettings(), Counts()), Limiter)
    in_redis = GatewaySettings(redis_url="redis://127.0.0.1:1", limits=LimitSettings(redis=True, redis_gone="refuse"))
    assert isinstance(limiter_of(in_redis, Counts()), SharedLimiter)
