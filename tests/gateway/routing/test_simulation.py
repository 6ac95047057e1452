"""What the choice of places is worth, as docs/routing.md says it: smaller runs of the simulation there."""

from fairlead.core.policy import Breaker
from tests.gateway.routing.simulation import NEVER, affinity, bad_place, herding, slow_place, strangers


def test_prefix_affinity_finds_far_more_prompts_computed_than_round_robin_or_least_work():
    found = {how: affinity(how, 10.0, num=1500) for how in ("round-robin", "least-work", "affinity")}
    assert found["affinity"]["hit_rate"] > found["least-work"]["hit_rate"] + 0.1
    assert found["affinity"]["hit_rate"] > found["round-robin"]["hit_rate"] + 0.1
    assert found["affinity"]["mean"] < 0.5 * found["least-work"]["mean"]
    assert found["affinity"]["busiest"] < 1.3, "and no place has much more than its share"


def test_where_what_is_known_is_late_a_temperature_keeps_gateways_from_running_to_the_same_place():
    cold, warm, blind = herding(0.0, 0.5, num=5000), herding(3.0, 0.5, num=5000), herding(None, 0.5, num=5000)
    assert warm["mean"] < 0.7 * cold["mean"] and warm["p99"] < 0.7 * cold["p99"]
    assert warm["mean"] < blind["mean"] < cold["mean"], "late news, followed blindly, are worse than none"


def test_gateways_that_know_only_their_own_requests_do_not_meet_at_the_first_place():
    first, random, dispatch = (strangers(choose, num=5000) for choose in ("first", "random", "dispatch"))
    assert dispatch["mean"] < random["mean"] < first["mean"]


def test_one_bad_place_of_three_costs_hardly_a_request():
    without, breaker, both = bad_place(NEVER, 0, rate=25.0), bad_place(Breaker(), 0, rate=25.0), bad_place(Breaker(), 1, rate=25.0)
    assert without["failed"] > 0.2, "what fails at once always seems idle"
    assert breaker["failed"] < 0.01 and both["failed"] == 0.0


def test_hedging_and_the_breaker_cut_the_tail_that_one_slow_place_makes():
    plain, hedged = slow_place(hedge_after=0.0, num=5000), slow_place(hedge_after=0.06, budget=0.1, num=5000)
    assert hedged["p99"] < 0.8 * plain["p99"] and hedged["sent"] <= 1.1
    breaker = slow_place(hedge_after=0.0, breaker=Breaker(), num=5000)
    both = slow_place(hedge_after=0.06, breaker=Breaker(), num=5000)
    assert breaker["p99"] < 0.8 * plain["p99"]
    assert both["p99"] < 0.2 * plain["p99"] and both["sent"] < 1.03, "the place that is outrun again and again is left out"
