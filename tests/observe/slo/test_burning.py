"""Budgets that burn, told in hours of a clock that is turned by hand."""

import pytest

from fairlead.core.slo import DAY, AlertSettings, Objective
from fairlead.observe.counts import Counts
from fairlead.observe.slo.alerts import BURN
from fairlead.observe.slo.burn import Events, rows_of, span_name, spans_of
from fairlead.observe.slo.ring import Ring
from fairlead.observe.slo.slos import Slos

MINUTE, HOUR = 60.0, 3600.0
API = Objective(name="api", target=0.999)


class Service:
    """Requests come every minute, and somebody looks."""

    def __init__(self, objective=API, **settings):
        self.now, self.wall = 1_000_000.0, 1_790_000_000.0
        self.told = []
        self.counts = Counts()
        self.slos = Slos(
            [objective],
            AlertSettings(**settings),
            self.counts,
            server="one",
            signals=self.nothing,
            now=lambda: self.now,
            wall=lambda: self.wall,
        )
        self.slos.told.append(self.told.extend)
        self.name = objective.name

    async def nothing(self):
        return {}

    def go_on(self, seconds, *, good=0, bad=0, every=MINUTE):
        """`good` and `bad`: in each minute."""
        passed = 0.0
        while passed < seconds:
            self.now += every
            self.wall += every
            passed += every
            self.slos.ledger.record(self.name, good, bad, self.now, self.wall)
            self.slos.look({})

    def states(self):
        return [(each.severity, each.state) for each in self.told]

    def standing(self):
        return {each.severity: each.state for each in self.slos.board.alerts()}

    @property
    def left(self):
        [shown] = self.slos.shown()
        return shown.reading.budget_left


def test_a_service_that_keeps_its_promise_wakes_nobody():
    service = Service()
    service.go_on(30 * DAY, good=9995, bad=5, every=10 * MINUTE)
    assert service.told == []
    assert service.left == pytest.approx(0.5, abs=0.01)


def test_an_outage_pages_within_minutes_and_is_over_soon_after():
    service = Service()
    service.go_on(6 * HOUR, good=1000)
    service.go_on(4 * MINUTE, bad=1000)
    assert service.states() == [("page", "firing")]
    [alert] = service.told
    assert (alert.name, alert.subject) == (BURN, "api")
    assert "over 1h" in alert.summary
    service.go_on(2 * HOUR, good=1000)
    assert ("page", "resolved") in service.states()
    assert service.states().count(("page", "firing")) == 1
    assert service.slos.board.past[0].began < service.slos.board.past[0].since


def test_two_percent_of_the_budget_in_an_hour_pages_and_a_little_less_does_not():
    for burn, paged in ((14.6, True), (5.5, False)):
        service = Service()
        service.go_on(7 * HOUR, good=10_000)
        bad = round(10_000 * 0.001 * burn)
        service.go_on(61 * MINUTE, good=10_000 - bad, bad=bad)
        assert (("page", "firing") in service.states()) is paged, burn


def test_what_burns_six_times_as_fast_pages_after_hours():
    service = Service()
    service.go_on(6 * HOUR, good=9925, bad=75)
    assert service.states()[0] == ("page", "firing")
    assert "over 6h" in service.told[0].summary


def test_what_burns_a_little_too_fast_is_a_ticket_for_tomorrow():
    service = Service()
    service.go_on(3 * DAY, good=10_000 - 15, bad=15, every=10 * MINUTE)
    assert service.states() == [("ticket", "firing")]


def test_one_bad_request_of_a_hundred_in_a_night_wakes_nobody():
    service = Service()
    service.go_on(8 * HOUR, good=1, every=5 * MINUTE)
    service.slos.ledger.record("api", 0, 1, service.now, service.wall)
    service.go_on(2 * HOUR, good=1, every=5 * MINUTE)
    assert service.told == []


def test_a_few_requests_that_all_fail_are_too_few():
    service = Service()
    service.go_on(HOUR, bad=1)
    assert service.standing() == {}
    service.go_on(HOUR, bad=2)
    assert service.standing()["page"] == "firing"


def test_an_alert_at_its_threshold_does_not_flap():
    service = Service()
    service.go_on(7 * HOUR, good=10_000)
    for _ in range(60):
        service.go_on(5 * MINUTE, good=10_000, bad=160)
        service.go_on(5 * MINUTE, good=10_000, bad=128)
    assert service.states().count(("page", "firing")) == 1
    assert ("page", "resolved") not in service.states()


def test_a_blip_of_seconds_is_pending_and_then_forgotten():
    service = Service()
    service.go_on(2 * HOUR, good=10, every=10.0)
    service.go_on(10.0, bad=100, every=10.0)
    assert service.standing()["page"] == "pending"
    service.go_on(40.0, good=5000, every=10.0)
    assert service.told == []
    assert "page" not in service.standing()


def test_an_objective_may_be_for_tickets_only():
    service = Service(Objective(name="quiet", severities=("ticket",)))
    service.go_on(HOUR, bad=1000)
    assert set(service.states()) == {("ticket", "firing")}


def test_windows_are_in_proportion_to_the_objectives_own():
    assert [span_name(span) for span in spans_of(API)] == ["5m", "30m", "1h", "6h", "3d"]
    week = Objective(name="week", window_days=7)
    assert [span_name(span) for span in spans_of(week)] == ["1m10s", "7m", "14m", "1h24m", "16h48m"]
    assert [row.factor for row in rows_of(week)] == [14.4, 6.0, 1.0]
    service = Service(week)
    service.go_on(5 * MINUTE, bad=100, every=5.0)
    assert ("page", "firing") in service.states()


# Clocks


@pytest.mark.parametrize("jump", [-400 * DAY, -HOUR, HOUR, 400 * DAY, 1e10])
def test_when_somebody_sets_the_time_nothing_is_lost_and_nothing_fires(jump):
    service = Service()
    service.go_on(2 * DAY, good=9995, bad=5, every=10 * MINUTE)
    left, [shown] = service.left, service.slos.shown()
    service.wall += jump
    service.go_on(HOUR, good=9995, bad=5)
    service.wall -= jump
    service.go_on(HOUR, good=9995, bad=5)
    assert service.told == []
    [later] = service.slos.shown()
    assert later.reading.events.total >= shown.reading.events.total
    assert service.left == pytest.approx(left, abs=0.02)


def test_when_somebody_sets_the_time_an_alert_goes_on():
    service = Service()
    service.go_on(10 * MINUTE, bad=1000)
    began = [each.began for each in service.slos.board.alerts() if each.severity == "page"]
    service.wall -= 10 * DAY
    service.go_on(10 * MINUTE, bad=1000)
    assert service.states().count(("page", "firing")) == 1
    assert [each.began for each in service.slos.board.alerts() if each.severity == "page"] == began


def test_a_process_that_slept_for_days_begins_with_what_comes_then():
    service = Service()
    service.go_on(HOUR, good=1000)
    service.now += 40 * DAY
    service.slos.look({})
    assert service.told == []
    service.go_on(MINUTE, good=1000)
    [shown] = service.slos.shown()
    assert shown.reading.events == Events(1000, 0)


def test_a_ring_forgets_what_is_old_bucket_by_bucket_and_takes_what_comes_late():
    ring = Ring(60.0, 10)
    for minute in range(20):
        ring.add(1, 0, minute * 60.0)
    assert ring.within(60.0, 19 * 60.0) == Events(1, 0)
    assert ring.within(300.0, 19 * 60.0) == Events(5, 0)
    assert ring.within(1e9, 19 * 60.0) == Events(10, 0)
    ring.add(0, 3, 5 * 60.0)
    assert ring.within(60.0, 19 * 60.0) == Events(1, 3)
    assert ring.within(120.0, 20 * 60.0) == Events(1, 3)
    assert ring.within(1e9, 1e12) == Events(0, 0)
