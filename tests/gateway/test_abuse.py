"""Abuse: a simulator of tenants on a virtual clock, ordinary ones that are left alone and attackers that are found."""

import gc
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from math import sin, tau
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core.errors import LimitExceeded
from fairlead.core.policy import AbuseSettings
from fairlead.gateway.abuse import Abuse, Action, Seen, sketch
from fairlead.observe.counts import Counts

HOUR, DAY = 3600.0, 86400.0
WORDS = ["".join(Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=2 + seed % 9)) for seed in range(2000)]
TEMPLATES = (
    "Classify the following message of a customer as complaint, praise or question, and answer with one word. {}",
    "Summarise in two sentences: {}",
    "You are a careful translator. Translate into French and keep the names as they are: {}",
)
SCRAPE = "Tell me everything you know about product number {} of the catalogue, with its price and what it is made of."


def prose(rng: Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


class Ordinary:
    """A tenant of `mean_rate` requests a second: busy by day, with bursts, mistakes, a few machines, long and short prompts."""

    def __init__(self, seed: int, mean_rate: float, name: str = "acme") -> None:
        self.rng = Random(seed)
        self.name = name
        self.mean_rate = mean_rate
        self.swing, self.bursts = 0.8, 20.0
        """By day and night, and a day."""
        self.phase = self.rng.random() * DAY
        self.templated = self.rng.random()
        self.addresses = [f"10.0.0.{n}" for n in range(self.rng.randint(1, 12))]
        self.texts = [self.text() for _ in range(1000)]

    def text(self) -> str:
        rng = self.rng
        told = prose(rng, max(1, int(rng.lognormvariate(3, 0.8))))
        return rng.choice(TEMPLATES).format(told) if rng.random() < self.templated else told

    def seen(self, **changed) -> Seen:
        rng = self.rng
        lot = rng.random()
        told = {
            "key": f"key{rng.randrange(3)}",
            "address": rng.choice(self.addresses),
            "status": 422 if lot < 0.03 else 429 if lot < 0.05 else 400 if lot < 0.055 else 200,
            "filtered": 0.05 < lot < 0.055,
            "tokens": min(32_000, int(rng.lognormvariate(5.5, 1.2))),
            "text": rng.choice(self.texts),
        }
        return Seen(self.name, **told | changed)

    def times(self, begin: float, end: float) -> Iterator[float]:
        """Poisson; a ninth of the peak at the bottom of the day; twenty times a day three times as many for some minutes."""
        now, burst_end = begin, 0.0
        while True:
            rate = self.mean_rate * (1 + self.swing * sin((now + self.phase) * tau / DAY)) * (3.0 if now < burst_end else 1.0)
            now += self.rng.expovariate(rate)
            if now >= end:
                return
            if self.rng.random() < self.bursts / DAY / rate:
                burst_end = now + self.rng.uniform(60, 300)
            yield now


def told(abuse: Abuse, seen: Seen, now: float) -> Action | None:
    """As the gateway does: what went well may be enough to count."""
    if seen.status < 400 and not seen.filtered and abuse.counts(seen.tenant, seen.key, seen.address, seen.tokens, now):
        return None
    return abuse.note(seen, now)


def run(abuse: Abuse, tenant: Ordinary, begin: float, end: float) -> list[Action]:
    return [action for now in tenant.times(begin, end) if (action := told(abuse, tenant.seen(), now))]


def abuse_of(action: str = "block", **settings) -> Abuse:
    return Abuse(AbuseSettings(action=action, **settings), Counts())


def known(action: str = "block", hours: float = 2.0) -> tuple[Abuse, Ordinary, float]:
    """A tenant that asked steadily for some hours, and now."""
    abuse, tenant = abuse_of(action), Ordinary(7, 1.0)
    tenant.templated = tenant.swing = tenant.bursts = 0.0
    tenant.texts = [tenant.text() for _ in range(1000)]
    assert run(abuse, tenant, 0.0, hours * HOUR) == []
    return abuse, tenant, hours * HOUR


def caught(abuse: Abuse, attack: Iterator[tuple[float, Seen]], within: int) -> tuple[Action, int]:
    """The action, and after how many of the attacker's requests it came."""
    for number, (now, seen) in enumerate(attack, 1):
        assert number <= within, abuse.points(seen.tenant)
        if action := told(abuse, seen, now):
            return action, number
    raise AssertionError("the attack ended")


# Counting


@pytest.mark.parametrize("spacing", [0.001, 0.004, 0.019])
def test_a_fast_tenant_is_known_as_well_by_a_sample_of_its_requests(spacing):
    rng, noted, counted = Random(3), abuse_of(), abuse_of()
    num_noted = 0
    for number in range(20_000):
        seen = Seen("acme", "key", "10.0.0.1", 400 if rng.random() < 0.02 else 200, tokens=rng.randrange(400))
        noted.note(seen, number * spacing)
        if seen.status >= 400 or not counted.counts("acme", "key", "10.0.0.1", seen.tokens, number * spacing):
            num_noted += 1
            counted.note(seen, number * spacing)
    assert counted.points("acme") == pytest.approx(noted.points("acme"), rel=0.02, abs=0.02)
    (one,), (other,) = noted._tenants.values(), counted._tenants.values()
    for name in ("num_requests", "requests", "tokens", "requests_usual", "tokens_usual", "failed", "failed_usual"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=0.02), name
    assert num_noted < 20_000 * max(2 * spacing / 0.02, 0.1)


def test_nothing_is_only_counted_that_tells_something_new():
    abuse = abuse_of()
    assert not abuse.counts("acme", "key", "10.0.0.1", 5, 1.0), "nobody knows it yet"
    abuse.note(Seen("acme", "key", "10.0.0.1"), 1.0)
    assert not abuse.counts("acme", "other", "10.0.0.1", 5, 1.001), "another key"
    assert not abuse.counts("acme", "key", "10.0.0.2", 5, 1.001), "another address"
    assert not abuse.counts("acme", "key", "10.0.0.1", 5, 1.03), "a while later"
    assert abuse.counts("acme", "key", "10.0.0.1", 5, 1.001)


# Those who do nothing


@pytest.mark.parametrize(("seed", "mean_rate", "days"), [(1, 0.05, 3), (2, 0.3, 1), (3, 0.3, 1), (4, 1.0, 0.5), (5, 3.0, 0.1)])
def test_an_ordinary_tenant_is_left_alone_through_days_nights_and_bursts(seed, mean_rate, days):
    abuse, tenant = abuse_of(), Ordinary(seed, mean_rate)
    assert run(abuse, tenant, 0.0, days * DAY) == []


def test_a_new_tenant_may_begin_with_a_load_test_of_one_prompt_from_many_machines():
    # Nothing is known of it: only what is wrong of itself counts
    abuse = abuse_of()
    rng = Random(1)
    for request in range(20_000):
        seen = Seen("new", f"key{request % 3}", f"10.0.{request % 200}.1", tokens=4000, text=SCRAPE.format(rng.randrange(10**5)))
        assert told(abuse, seen, request / 200) is None


def test_a_tenant_may_always_use_templates_many_addresses_and_be_refused_by_its_limits():
    abuse = abuse_of()
    rng = Random(2)
    for request in range(12_000):
        status = 429 if rng.random() < 0.7 else 200
        seen = Seen("fleet", "key", f"10.0.{rng.randrange(200)}.1", status, text=SCRAPE.format(rng.randrange(10**5)))
        assert told(abuse, seen, request * 0.5) is None


def test_a_tenant_that_grows_is_in_time_what_it_usually_is():
    # Given a tenant that from one hour to the next has twenty times as many requests
    abuse, _, now = known("observe", hours=2)
    actions = []
    for request in range(int(0.5 * HOUR * 20)):
        action = told(abuse, Seen("acme"), now + request / 20)
        actions += [action] if action else []
    # Then it is reported, but not for long
    assert actions and all(action.reasons["rate"] >= 8 for action in actions)
    assert actions[-1].since < now + 0.25 * HOUR


# Those who do


def test_twenty_times_the_requests_are_found_within_a_thousand():
    abuse, tenant, now = known()
    action, number = caught(abuse, ((now + n / 20, tenant.seen()) for n in range(2000)), within=1000)
    assert action.action == "block" and next(iter(action.reasons)) == "rate" and action.until == action.since + 300
    assert number > 100  # not by the first burst


def test_scraping_by_near_duplicates_is_found_within_300_requests():
    # Given a scraper that is no faster than the tenant usually is
    abuse, tenant, now = known()
    rng = Random(3)
    attack = ((now + n, tenant.seen(text=SCRAPE.format(rng.randrange(10**6)))) for n in range(1000))
    action, _ = caught(abuse, attack, within=300)
    assert next(iter(action.reasons)) == "repeated"


def test_a_stolen_key_is_found_before_its_fiftieth_address():
    # Given a key used from up to twelve machines before, and 50 new ones among their requests
    abuse, tenant, now = known()
    tenant.addresses = ["10.0.0.1", "10.0.0.2"]
    assert run(abuse, tenant, now, now + 4 * HOUR) == []
    attack = ((now + 4 * HOUR + n, tenant.seen(key="key1", address=f"203.0.113.{n}")) for n in range(50))
    action, number = caught(abuse, attack, within=50)
    assert next(iter(action.reasons)) == "addresses" and number > 20


def test_many_addresses_of_one_ipv6_network_are_one():
    abuse = abuse_of()
    for n in range(3000):
        assert abuse.note(Seen("a", "key", f"2001:db8:0:1:{n:x}::{n:x}" if n > 1500 else "2001:db8:0:1::1"), n) is None


def test_questions_that_filters_block_are_found_within_50_requests_of_a_new_tenant_too():
    abuse = abuse_of()
    attack = ((n * 60.0, Seen("new", "key", "10.0.0.1", 400, filtered=True)) for n in range(100))
    action, _ = caught(abuse, attack, within=50)
    assert list(action.reasons) == ["filtered"]


def test_a_client_that_only_makes_mistakes_is_found_within_150_requests():
    abuse = abuse_of()
    attack = ((n * 1.0, Seen("new", "key", "10.0.0.1", 404)) for n in range(400))
    action, _ = caught(abuse, attack, within=150)
    assert list(action.reasons) == ["failed"]


def test_burning_tokens_at_the_usual_rate_of_requests_is_found_within_60():
    abuse, tenant, now = known()
    action, _ = caught(abuse, ((now + n, tenant.seen(tokens=30_000)) for n in range(200)), within=60)
    assert next(iter(action.reasons)) == "tokens" and "rate" not in action.reasons


def test_small_signs_add_up():
    # Given a tenant six times as fast as usual, of whose requests four in ten are blocked by filters
    for filtered, found in ((0.0, False), (0.4, True)):
        abuse, tenant, now = known()
        rng = Random(4)
        actions = [
            action
            for n in range(2000)
            if (action := told(abuse, tenant.seen(filtered=rng.random() < filtered, text="", tokens=100), now + n / 7))
        ]
        assert bool(actions) == found


# What is done about it


def attacked(abuse: Abuse, now: float, tenant: str = "bad") -> Action:
    return caught(abuse, ((now, Seen(tenant, "key", "10.0.0.1", 400, filtered=True)) for _ in range(100)), within=100)[0]


def test_a_blocked_tenant_is_refused_alone_and_comes_back():
    abuse = abuse_of(seconds=120)
    action = attacked(abuse, 1000.0)
    refused = abuse.decide("bad", 1030.0)
    assert isinstance(refused, LimitExceeded) and refused.reason == "abuse" and refused.retry_after == 90.0
    assert abuse.decide("good", 1030.0) is None
    assert abuse.actions(1030.0) == [action] and abuse.actions(1120.0) == []
    # When its time is over
    assert abuse.decide("bad", 1120.0) is None
    # Then a single further offence is not enough: it is judged anew
    assert abuse.note(Seen("bad", status=400, filtered=True), 1121.0) is None
    assert attacked(abuse, 1122.0).since == 1122.0


def test_what_was_under_way_when_the_block_began_does_not_count_after_it():
    abuse = abuse_of()
    attacked(abuse, 0.0)
    for _ in range(100):
        assert abuse.note(Seen("bad", status=400, filtered=True), 1.0) is None
    assert abuse.note(Seen("bad", status=400, filtered=True), 301.0) is None


def test_a_throttled_tenant_gets_its_share_evenly():
    abuse = abuse_of("throttle", throttle_to=0.2)
    attacked(abuse, 0.0)
    let_in = [n for n in range(1000) if abuse.decide("bad", 1.0) is None]
    assert len(let_in) == 200 and all(b - a in (4, 5, 6) for a, b in pairwise(let_in))
    assert abuse.decide("bad", 300.0) is None


def test_observing_refuses_nobody_and_tells_once_in_its_time():
    abuse = abuse_of("observe")
    told = [action for n in range(3000) if (action := abuse.note(Seen("bad", "key", status=400, filtered=True), n * 0.2))]
    assert [action.action for action in told] == ["observe", "observe"] and told[1].since >= told[0].until
    assert abuse.decide("bad", 100.0) is None


def test_off_sees_nothing():
    abuse = abuse_of("off")
    assert all(abuse.note(Seen("bad", status=400, filtered=True), 0.0) is None for _ in range(100)) and len(abuse) == 0


def test_anyone_on_an_open_server_is_only_observed():
    abuse = abuse_of("block")
    seen = Seen("default", "", "10.0.0.1", 400, filtered=True)
    action, _ = caught(abuse, ((0.0, seen) for _ in range(100)), within=100)
    assert action.action == "observe" and abuse.decide("default", 1.0) is None
    # A tenant that is really called so shows a key
    assert attacked(abuse_of("block"), 0.0, "default").action == "block"


def test_an_operator_can_lift_an_action_and_change_its_kind():
    abuse = abuse_of("block")
    attacked(abuse, 0.0)
    assert abuse.lift("bad") and not abuse.lift("bad")
    assert abuse.decide("bad", 1.0) is None and abuse.points("bad")["filtered"] == 0.0
    attacked(abuse, 2.0)
    abuse.configure(AbuseSettings(action="block", threshold=4.0))
    assert abuse.decide("bad", 3.0) is not None
    abuse.configure(AbuseSettings(action="observe"))
    assert abuse.decide("bad", 3.0) is None and abuse.actions(3.0) == []


def test_every_action_is_counted_by_its_main_reason():
    counts = Counts()
    abuse = Abuse(AbuseSettings(action="block"), counts)
    attacked(abuse, 0.0)
    assert counts.get("fairlead_gateway_abuse_actions_total", "block", "filtered") == 1


def test_memory_is_bounded_with_100_000_tenants():
    abuse = Abuse(AbuseSettings(action="block"), Counts(), max_tenants=2000)

    def come(first: int, last: int) -> None:
        for n in range(first, last):
            abuse.note(Seen(f"t{n}", f"k{n}", f"10.0.{n % 250}.{n % 7}", tokens=10, text=TEMPLATES[n % 3]), n * 0.001)

    come(0, 96_000)
    gc.collect()
    tracemalloc.start()
    try:
        come(96_000, 100_000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(abuse) == 2000
    assert grown < 2000 * 3072  # all that is kept was made since, and is less than 3 KiB a tenant


def test_tenants_under_an_action_are_bounded_and_not_forgotten_with_the_others():
    abuse = Abuse(AbuseSettings(action="block", seconds=10), Counts(), max_tenants=50)
    for n in range(60):
        attacked(abuse, n / 100, f"bad{n}")
    assert len(abuse.actions(0.6)) == 50 and abuse.decide("bad59", 0.6) is not None
    # Those whose traffic is forgotten stay blocked
    for n in range(60):
        abuse.note(Seen(f"good{n}"), 0.6)
    assert abuse.decide("bad59", 0.6) is not None and abuse.points("bad59") == {}
    attacked(abuse, 20.0)
    assert [action.tenant for action in abuse.actions(20.0)] == ["bad"]


# Texts


def share(a: str, b: str) -> float:
    return len(set(sketch(a)) & set(sketch(b))) / len(sketch(b))


def test_a_sketch_tells_near_duplicates_from_texts_that_differ():
    rng = Random(5)
    for _ in range(50):
        told = prose(rng, 200)
        assert share(told, told) == 1.0
        assert share(told, told.replace(told.split()[50], "otherwise", 1)) > 0.7
        assert share(SCRAPE.format(rng.randrange(10**6)), SCRAPE.format(rng.randrange(10**6))) >= 0.5
        assert share(told, prose(rng, 200)) < 0.4


@given(st.text(max_size=3000))
def test_any_text_has_a_sketch(text):
    shingles = sketch(text)
    assert len(shingles) <= 16 and all(0 <= shingle < 2**32 for shingle in shingles)
    assert sketch(text) == shingles
    abuse = abuse_of()
    abuse.note(Seen("a", text=text), 0.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "default"]),
            st.floats(0, 1e6),
            st.sampled_from([200, 400, 404, 429, 500]),
            st.booleans(),
            st.integers(0, 10**7),
            st.sampled_from(["", "::1", "10.0.0.1", "not an address ä"]),
        ),
        max_size=60,
    )
)
def test_any_order_of_times_and_outcomes_is_borne(events):
    # Clocks go back, requests end in another order than they began
    abuse = abuse_of(threshold=1.0, seconds=5.0)
    for tenant, now, status, filtered, tokens, address in events:
        abuse.note(Seen(tenant, "key", address, status, filtered, tokens), now)
        abuse.decide(tenant, now)
        assert all(points >= 0 for points in abuse.points(tenant).values())
