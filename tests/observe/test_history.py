"""The last hour in numbers: what is counted, how it is shown, and what bounds it. The clock is the test's."""

import math
import random

import pytest

from fairlead.core.generation import Usage
from fairlead.core.timeline import Timeline
from fairlead.observe.history import BIN_SECONDS, MAX_MODELS, NUM_POINTS, POINT_BINS, WINDOW_BINS, Gauge, History, Read, bucket, quantiles

WINDOW = WINDOW_BINS * BIN_SECONDS


class House:
    """A history, and the server that it asks."""

    def __init__(self) -> None:
        self.gauges: dict[str, Gauge] = {}
        self.server = Gauge()
        self.history = History(lambda: Read(self.server, self.gauges), known=lambda name: name != "stranger")
        self.now = 1_000_000.0

    def ended(self, model: str = "fraud", seconds: float = 0.01, outcome: str = "success", reason: str = "", **more: object) -> None:
        timeline = Timeline("id", "http", 0.0, kind="infer", model=model, outcome=outcome, reason=reason, ended=seconds, **more)  # type: ignore[arg-type]
        self.history([timeline])

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += BIN_SECONDS
            self.history.tick(self.now)


def test_rates_are_of_the_last_seconds_and_go_back_to_nothing():
    house = House()
    for _ in range(100):
        house.ended()
    house.ended(outcome="failure", reason="model-error")
    house.ended(outcome="refused", reason="limit-requests")
    house.tick(WINDOW_BINS)
    totals = house.history.totals()
    assert (totals["requests"], totals["errors"], totals["refused"]) == (102 / WINDOW, 1 / WINDOW, 1 / WINDOW)
    assert {each["reason"]: each["hour"] for each in house.history.reasons()} == {"model-error": 1, "limit-requests": 1}
    house.tick(WINDOW_BINS)
    assert house.history.totals()["requests"] == 0 and house.history.totals()["p99"] is None


def test_quantiles_are_right_to_within_five_percent():
    random.seed(7)
    values = sorted(random.lognormvariate(-4, 1) for _ in range(5000))
    counts: dict[int, int] = {}
    for value in values:
        counts[bucket(value)] = counts.get(bucket(value), 0) + 1
    for quantile, found in zip((0.5, 0.95, 0.99), quantiles(counts, (0.5, 0.95, 0.99)), strict=True):
        assert found == pytest.approx(values[math.ceil(quantile * 5000) - 1], rel=0.05)
    assert quantiles({}, (0.5,)) == [None]
    assert bucket(0.0) == bucket(-1.0) == 0 and bucket(1e9) == bucket(1e12)


def test_an_hour_is_kept_and_no_more():
    house = House()
    for _ in range(NUM_POINTS + 10):
        house.ended()
        house.tick(POINT_BINS)
    hour = house.history.series()
    assert len(hour["at"]) == NUM_POINTS and hour["at"] == sorted(hour["at"]) and hour["at"][-1] == house.now
    assert all(len(values) == NUM_POINTS for values in hour["series"].values())
    house.ended(outcome="failure", reason="replica-died")
    house.tick(POINT_BINS * (NUM_POINTS + 1))
    assert house.history.reasons() == [] and house.history.series()["series"]["requests"][0] == 0


def test_models_are_told_apart_and_the_busiest_come_first():
    house = House()
    for _ in range(WINDOW_BINS):
        house.ended("quiet", 0.5)
        for _ in range(5):
            house.ended("busy", 0.002)
        house.tick()
    busiest = house.history.busiest(10)
    assert [each["model"] for each in busiest] == ["busy", "quiet"]
    assert busiest[0]["p50"] == pytest.approx(0.002, rel=0.05) and busiest[1]["p50"] == pytest.approx(0.5, rel=0.05)
    assert [each["model"] for each in house.history.busiest(1)] == ["busy"]
    house.tick(WINDOW_BINS * 2)  # a quiet server goes on showing what it served last
    assert {each["model"] for each in house.history.busiest(10)} == {"busy", "quiet"}


def test_strangers_names_and_too_many_models_take_no_room():
    house = House()
    house.ended("stranger", outcome="refused", reason="not-found")
    for n in range(MAX_MODELS * 3):
        house.ended(f"model-{n}")
    house.tick(POINT_BINS)
    assert house.history.totals()["requests"] > 0 and "stranger" not in {each["model"] for each in house.history.busiest(10_000)}
    assert len(house.history._models) == MAX_MODELS
    assert house.history.series(f"model-{MAX_MODELS * 3 - 1}")["series"]["requests"] and house.history.series("model-0")["at"] == []


def test_reasons_are_bounded():
    house = House()
    for n in range(1000):
        house.ended(outcome="failure", reason=f"reason-{n}")
    house.tick(POINT_BINS)
    assert len(house.history.reasons()) <= 65 and sum(each["hour"] for each in house.history.reasons()) == 1000


def test_an_engine_tells_its_tokens_as_it_makes_them_and_they_count_once():
    house = House()
    house.gauges = {"chat": Gauge(in_flight=3, tokens=100, kv=0.25)}
    house.tick()
    house.gauges = {"chat": Gauge(in_flight=3, tokens=160, kv=0.5)}
    house.ended("chat", 9.0, usage=Usage(prompt_tokens=5, completion_tokens=60))
    house.tick(1)
    totals, chat = house.history.totals(), house.history.model("chat")
    assert totals["tokens"] == chat["tokens"] == pytest.approx(60 / (2 * BIN_SECONDS))
    assert (totals["in_flight"], chat["in_flight"], chat["kv"]) == (3, 3, 0.5)
    house.gauges = {"chat": Gauge(in_flight=0, tokens=7)}  # it was loaded anew
    house.tick(WINDOW_BINS)
    assert house.history.totals()["tokens"] == 0


def test_tokens_of_models_elsewhere_count_when_their_requests_end():
    house = House()
    house.ended("far", usage=Usage(prompt_tokens=5, completion_tokens=20), cost=0.5)
    house.tick()
    assert house.history.totals()["tokens"] == 20 / BIN_SECONDS and house.history.totals()["cost"] == 0.5 / BIN_SECONDS


def test_where_nobody_counts_those_under_way_their_time_does():
    house = House()
    for _ in range(10):
        house.ended(seconds=0.5)
    house.tick(WINDOW_BINS)
    assert house.history.totals()["in_flight"] == pytest.approx(5.0 / WINDOW)


def test_what_was_no_request_of_a_model_is_none():
    house = House()
    house.history([Timeline("id", "http", 0.0, path="/healthz", outcome="success", ended=0.1)])
    house.tick()
    assert house.history.totals()["requests"] == 0


def test_a_clock_that_jumps_is_shown_and_spoils_nothing():
    house = House()
    house.ended()
    house.tick(POINT_BINS)
    house.now -= 86400
    house.ended()
    house.tick(POINT_BINS)
    assert len(house.history.series()["at"]) == 2 and house.history.totals()["requests"] > 0
