"""The alerts beside those of objectives, as one server sees them."""

import re

import pytest

from fairlead.observe.slo.alerts import BURN, MAX_SUBJECTS, RULES, Above, Below, Growth, Share, Watcher
from fairlead.observe.slo.board import MAX_ALERTS, Board, Sighting
from fairlead.observe.slo.standing import Standing, step
from fairlead.observe.table import TABLE


class Watch:
    """A server whose numbers are what the test says."""

    def __init__(self):
        self.watcher, self.board, self.now, self.told = Watcher(), Board("one"), 0.0, []

    def look(self, seconds=10.0, **signals):
        self.now += seconds
        self.told += self.board.look(self.watcher.look(signals, self.now), self.now, 1e9 + self.now)
        return {(each.name, each.subject): each.state for each in self.board.alerts()}


def test_replicas_that_die_again_and_again_page_and_once_is_nothing():
    watch = Watch()
    watch.look(restarts={"m@1": 7.0, "n@1": 0.0})
    assert watch.look(restarts={"m@1": 8.0, "n@1": 0.0}) == {}
    assert watch.look(restarts={"m@1": 10.0, "n@1": 0.0}) == {("FairleadReplicaCrashLoop", "m@1"): "firing"}
    [alert] = watch.told
    assert (alert.severity, alert.summary) == ("page", "replicas of m@1 died 3 times in 15 minutes")
    for _ in range(130):
        standing = watch.look(restarts={"m@1": 10.0, "n@1": 0.0})
    assert standing == {}
    assert [each.state for each in watch.told] == ["firing", "resolved"]


def test_a_counter_that_is_there_for_the_first_time_has_grown():
    watch = Watch()
    watch.look(usage_lost={})
    assert watch.look(usage_lost={"": 3.0}) == {("FairleadUsageLost", ""): "firing"}
    assert watch.told[0].summary == "3 records of requests or of the audit log were lost"


def test_what_a_server_counted_before_anybody_looked_is_not_news():
    watch = Watch()
    assert watch.look(usage_lost={"": 3.0}) == {}
    assert watch.look(usage_lost={"": 3.0}) == {}


def test_a_counter_that_begins_again_is_no_growth():
    watch = Watch()
    watch.look(restarts={"m@1": 9.0})
    assert watch.look(restarts={"m@1": 0.0}) == {}


def test_a_store_that_is_away_for_two_minutes_pages():
    watch = Watch()
    watch.look(store_failures={"": 0.0})
    for number in range(1, 13):  # it is asked once a minute
        assert watch.look(store_failures={"": 1.0 + number // 6}) == {("FairleadStoreUnreachable", ""): "pending"}
    for number in range(13, 18):
        standing = watch.look(store_failures={"": 1.0 + number // 6})
    assert standing == {("FairleadStoreUnreachable", ""): "firing"}


def test_a_store_that_failed_once_wakes_nobody():
    watch = Watch()
    watch.look(store_failures={"": 0.0})
    for _ in range(60):
        watch.look(store_failures={"": 1.0})
    assert watch.told == []


def test_a_share_counts_from_so_many_requests_on():
    watch = Watch()
    watch.look(shed={"m": 0.0}, asked={"m": 0.0})
    assert watch.look(shed={"m": 50.0}, asked={"m": 60.0}) == {}
    for number in range(1, 15):
        standing = watch.look(shed={"m": 50.0 + number}, asked={"m": 200.0 + number})
    assert standing == {("FairleadShedding", "m"): "firing"}
    assert watch.told[0].summary.startswith("more than 5% of the requests for m")


def test_a_model_that_is_not_loaded_is_a_ticket_until_it_is():
    watch = Watch()
    assert watch.look(not_loaded={"m@2": 1.0}) == {("FairleadModelNotLoaded", "m@2"): "firing"}
    assert watch.look(400.0, not_loaded={}) == {}
    assert [each.state for each in watch.told] == ["firing", "resolved"]


def test_a_full_disk_pages_with_what_is_left():
    watch = Watch()
    for _ in range(20):
        watch.look(disk_free={"": 0.031})
    assert watch.told[0].summary == "the disk of the data folder is nearly full: 3.1% free"


def test_a_clock_that_leaps_ahead_fires_nothing():
    watch = Watch()
    watch.look(restarts={"m@1": 1.0}, store_failures={"": 1.0})
    assert watch.look(1e7, restarts={"m@1": 1.0}, store_failures={"": 1.0}) == {}
    assert watch.look(-1e7, restarts={"m@1": 1.0}, store_failures={"": 1.0}) == {}


def test_what_finds_room_among_too_many_has_not_grown():
    watch = Watch()
    many = {f"m{number:04}@1": 5.0 for number in range(MAX_SUBJECTS + 1)}
    watch.look(restarts=many)
    del many["m0000@1"]
    assert watch.look(restarts=many) == {}


def test_a_million_subjects_are_bounded():
    watch = Watch()
    watch.look(not_loaded={f"m{number}": 1.0 for number in range(5000)})
    assert 0 < len(watch.board.alerts()) <= MAX_ALERTS


# One alert


def test_pending_firing_resolved():
    standing = Standing()

    def then(active, now, holds=False):
        nonlocal standing
        standing = step(standing, active=active, holds=holds, pending=60.0, calm=300.0, now=now)
        return standing.state

    assert [then(True, 0.0), then(True, 59.0), then(False, 60.0)] == ["pending", "pending", "inactive"]
    assert [then(True, 100.0), then(True, 160.0)] == ["pending", "firing"]
    assert [then(False, 170.0), then(False, 400.0), then(True, 410.0)] == ["firing", "firing", "firing"]
    assert [then(False, 600.0, holds=True), then(False, 890.0), then(False, 900.0)] == ["firing", "firing", "inactive"]


def test_time_that_goes_back_changes_nothing():
    standing = Standing("firing", since=100.0, seen=1000.0)
    assert step(standing, active=False, holds=False, pending=0.0, calm=300.0, now=-1e9) == standing
    assert step(Standing("pending", 100.0, 100.0), active=True, holds=False, pending=60.0, calm=0.0, now=0.0).state == "pending"


def test_an_alert_keeps_its_id_until_it_is_over_and_the_next_one_has_another():
    board = Board("one")

    def look(active, now):
        return board.look([Sighting("A", "page", "m", "m is ill", active, pending=10.0, calm=10.0)], now, 1e9 + now)

    look(True, 0.0)
    [pending] = board.alerts()
    [firing] = look(True, 20.0)
    [resolved] = look(False, 60.0)
    assert pending.id == firing.id == resolved.id
    assert (resolved.state, resolved.began, resolved.since, resolved.summary) == ("resolved", 1e9 + 20.0, 1e9 + 60.0, "m is ill")
    look(True, 100.0)
    assert board.alerts()[0].id != firing.id


# The table


def test_every_rule_has_a_name_of_its_own_and_asks_for_metrics_that_there_are():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) and BURN not in names
    for rule in RULES:
        assert re.fullmatch(r"Fairlead[A-Z]\w+", rule.name)
        metrics = set(re.findall(r"\bfairlead_\w+", rule.expr))
        assert metrics <= TABLE.keys(), metrics - TABLE.keys()
        for label in re.findall(r"(\w+)=~?\"", rule.expr):
            assert label == "job" or any(label in TABLE[metric].labels for metric in metrics), (rule.name, label)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_a_rule_says_names_what_it_is_about(rule):
    assert ("{subject}" in rule.summary) == bool(rule.labels and rule.labels != ("instance",)) or rule.name == "FairleadDown"
    assert isinstance(rule.watch, Growth | Above | Below | Share | None)
