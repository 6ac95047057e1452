"""Tests that may be looked at all the time: their arithmetic against brute force, and what they promise, by seeded chance."""

import math
from fractions import Fraction
from itertools import accumulate

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.control.sequential import (
    MOST_GAIN,
    ODDS,
    Counts,
    CountTest,
    MeanTest,
    QuantileTest,
    Scores,
    log_ratios,
    quantile_interval,
    rate_interval,
    surely_above,
)
from fairlead.core.window import Histogram, bucket_of, edge_of


def chances(champion: int, candidate: int, bad: int, odds: Fraction) -> dict[int, Fraction]:
    """The candidate's part of the bad ends → its chance, at these odds: Fisher's noncentral hypergeometric, exactly."""
    weights = {
        part: math.comb(candidate, part) * math.comb(champion, bad - part) * odds**part
        for part in range(max(0, bad - champion), min(bad, candidate) + 1)
    }
    total = sum(weights.values())
    return {part: weight / total for part, weight in weights.items()}


sizes = st.tuples(st.integers(1, 25), st.integers(1, 25)).flatmap(lambda two: st.tuples(st.just(two), st.integers(0, sum(two))))


@settings(deadline=None, max_examples=50)
@given(sizes, st.sampled_from([0.0, 0.05, 0.5]))
def test_a_likelihood_ratio_is_that_of_the_exact_distributions(size, tolerance):
    (champion, candidate), bad = size
    tolerated = Fraction(1 + tolerance)
    expected = chances(champion, candidate, bad, tolerated)
    for index, odds in enumerate(ODDS):
        other = chances(champion, candidate, bad, tolerated * Fraction(odds))
        for part, chance in expected.items():
            counts = Counts(champion, bad - part, candidate, part)
            assert log_ratios(counts, 1 + tolerance)[index] == pytest.approx(math.log(other[part] / chance), abs=1e-8)


@settings(deadline=None, max_examples=50)
@given(sizes, st.sampled_from([0.3, 0.8, 1.0]))
def test_a_candidate_that_is_no_worse_is_not_expected_to_gain_evidence_against_it(size, odds):
    (champion, candidate), bad = size
    expected = np.zeros(len(ODDS))
    for part, chance in chances(champion, candidate, bad, Fraction(odds)).items():
        expected += float(chance) * np.exp(np.minimum(log_ratios(Counts(champion, bad - part, candidate, part), 1.0), MOST_GAIN))
    assert (expected <= 1 + 1e-9).all()


def told(test: CountTest, *spans: Counts, qos_class: str = "standard") -> CountTest:
    for span in spans:
        test = test.observed({qos_class: span}).compared()
    return test


def drawn(rng: np.random.Generator, num: int, share: float, rate: float, times: float = 1.0) -> Counts:
    candidate = int(rng.binomial(num, share))
    champion = num - candidate
    return Counts(champion, int(rng.binomial(champion, rate)), candidate, int(rng.binomial(candidate, rate * times)))


def test_twice_as_many_errors_are_found_and_stay_found():
    rng = np.random.default_rng(1)
    test = told(CountTest(alpha=0.05), *(drawn(rng, 1000, 0.5, 0.01, times=2.0) for _ in range(40)))
    assert test.worse and test.evidence == 1.0
    champion, candidate = test.intervals(0.05)
    assert champion.high is not None and candidate.low is not None and champion.high < candidate.low


def test_what_is_tolerated_is_not_worse():
    rng = np.random.default_rng(2)
    spans = [drawn(rng, 1000, 0.5, 0.02, times=1.5) for _ in range(100)]
    assert told(CountTest(alpha=0.05), *spans).worse
    assert not told(CountTest(alpha=0.05, tolerance=0.6), *spans).worse


def test_looking_after_every_span_gives_no_more_false_alarms_than_alpha():
    alarms = 0
    for seed in range(300):
        rng, test = np.random.default_rng(seed), CountTest(alpha=0.1)
        for number in range(60):
            if number in (20, 40):
                test = test.restarted()
            # the rate goes up and down all the time, and so does the traffic
            rate = 0.03 * (1 + 0.9 * math.sin(number / 5))
            test = told(test, drawn(rng, int(rng.integers(20, 400)), (0.05, 0.25, 0.5)[number // 20], rate))
            if test.worse:
                alarms += 1
                break
    assert alarms <= 30


def test_a_class_that_fails_more_does_not_speak_against_the_version_that_got_more_of_it():
    """By chance the candidate got mostly batch requests, of which a third fails with either version."""
    rng, together, apart = np.random.default_rng(3), CountTest(alpha=0.05), CountTest(alpha=0.05)
    for _ in range(30):
        interactive, batch = drawn(rng, 500, 0.1, 0.001), drawn(rng, 100, 0.8, 0.33)
        apart = apart.observed({"interactive": interactive, "batch": batch}).compared()
        together = told(together, interactive + batch)
    assert together.worse and not apart.worse


def test_an_hour_in_which_everything_fails_does_not_speak_against_a_candidate_that_has_just_got_more_traffic():
    rng = np.random.default_rng(4)
    calm = [drawn(rng, 1000, 0.01, 0.001) for _ in range(20)]
    storm = [drawn(rng, 1000, 0.5, 0.3) for _ in range(20)]
    test = told(CountTest(alpha=0.05), *calm, *storm)
    champion, candidate = test.intervals(0.05)
    assert candidate.value is not None and champion.value is not None and candidate.value > 5 * champion.value / 4
    assert not test.worse


def test_few_requests_are_put_together_until_both_versions_had_some():
    test = told(CountTest(alpha=0.05), Counts(9, 1, 0, 0), Counts(9, 0, 0, 0))
    assert test.evidence < 1e-9 and test.waiting == {"standard": Counts(18, 1, 0, 0)} and not test.known
    test = told(test, Counts(1, 0, 1, 1))
    assert test.waiting == {} and test.known and test.log_evidence > 0


def test_one_span_alone_is_not_believed_however_bad_it_is():
    awful = Counts(1000, 0, 1000, 1000)
    test = told(CountTest(alpha=0.05), awful)
    assert not test.worse
    assert told(test, *[awful] * 6).worse


def test_a_candidate_that_did_well_for_long_is_found_out_when_it_fails_later():
    rng = np.random.default_rng(5)
    good = [drawn(rng, 1000, 0.5, 0.02, times=0.7) for _ in range(200)]
    bad = [drawn(rng, 1000, 0.5, 0.02, times=2.0) for _ in range(20)]
    assert not told(CountTest(alpha=0.05), *good, *bad).worse
    assert told(told(CountTest(alpha=0.05), *good).restarted(), *bad).worse


def test_to_begin_anew_before_anything_came_costs_nothing():
    assert CountTest(alpha=0.05).restarted() == CountTest(alpha=0.05)


def histogram(rng: np.random.Generator, num: int, *, median: float = 0.02, sigma: float = 0.5) -> Histogram:
    counted: Histogram = {}
    for seconds in rng.lognormal(math.log(median), sigma, num):
        bucket = bucket_of(float(seconds))
        counted[bucket] = counted.get(bucket, 0) + 1
    return counted


def quantile_test(rng: np.random.Generator, slower: float, *, tolerance: float = 0.05, q: float = 0.99) -> QuantileTest:
    test = QuantileTest.new(alpha=0.05, q=q, tolerance=tolerance).learned(histogram(rng, 1000))
    for _ in range(30):
        spans = {"standard": (histogram(rng, 400), histogram(rng, 400, median=0.02 * slower))}
        test = test.observed(spans).compared()
    return test


def test_a_p99_that_is_38_percent_up_is_found():
    test = quantile_test(np.random.default_rng(6), 1.38)
    assert test.worse
    champion, candidate = test.intervals(0.05)
    true = 0.02 * math.exp(0.5 * 2.326)
    assert champion.low is not None and champion.high is not None and champion.low < true < champion.high
    assert candidate.low is not None and candidate.high is not None and candidate.low < true * 1.38 < candidate.high


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_a_latency_within_the_tolerance_is_not_worse(q):
    assert not quantile_test(np.random.default_rng(7), 1.05, tolerance=0.08, q=q).worse


def test_the_line_is_drawn_from_the_champion_alone_and_before_anything_is_compared():
    rng = np.random.default_rng(8)
    test = QuantileTest.new(alpha=0.05, q=0.99, tolerance=0.0).learned(histogram(rng, 499))
    assert test.line == -1
    test = test.observed({"standard": (histogram(rng, 1), histogram(rng, 100, median=1.0))}).compared()
    assert test.line > 0 and not test.known  # these were used up by drawing it
    test = test.observed({"standard": (histogram(rng, 100), histogram(rng, 100, median=1.0))}).compared()
    assert test.known


def test_each_step_draws_the_line_anew_where_the_champion_has_answered_enough_since():
    rng = np.random.default_rng(9)
    test = QuantileTest.new(alpha=0.05, q=0.9, tolerance=0.0).learned(histogram(rng, 100))
    before = test.line
    assert test.observed({"": (histogram(rng, 99, median=0.2), {})}).restarted().line == before
    assert test.observed({"": (histogram(rng, 100, median=0.2), {})}).restarted().line > before + 100


def mean_test(champion: float, candidate: float, *, num: int, batches: int, **fields: object) -> MeanTest:
    rng, test = np.random.default_rng(10), MeanTest(**{"alpha": 0.05, "tolerance": 0.02, **fields})  # type: ignore[arg-type]
    right = rng.random((batches, num, 2)) < (champion, candidate)
    totals = right.sum(axis=1).cumsum(axis=0)
    for number, (one, two) in enumerate(totals.tolist()):
        test = test.observed(Scores((number + 1) * num, one, one), Scores((number + 1) * num, two, two))
    return test


def test_a_score_that_is_lower_by_a_tenth_is_found_and_one_within_the_tolerance_is_not():
    assert mean_test(0.9, 0.8, num=20, batches=100).worse
    test = mean_test(0.9, 0.89, num=20, batches=100)
    assert not test.worse and test.known and test.evidence < 1


def test_of_a_score_that_is_better_when_low_the_mirror_image_holds():
    assert mean_test(0.1, 0.25, num=20, batches=100, higher_is_better=False).worse
    assert not mean_test(0.25, 0.1, num=20, batches=100, higher_is_better=False).worse


def test_labels_that_come_all_at_once_count_too():
    assert mean_test(0.9, 0.7, num=3000, batches=1).worse


def test_scores_have_a_range_of_their_own():
    """Stars from 1 to 5: mean 4.2 and 3.4, in steps of a hundred reviews."""
    test = MeanTest(alpha=0.05, tolerance=0.1, low=1.0, high=5.0)
    for number in range(1, 31):
        num = 100 * number
        test = test.observed(Scores(num, 4.2 * num, (4.2**2 + 0.5) * num), Scores(num, 3.4 * num, (3.4**2 + 0.5) * num))
    assert test.worse
    champion, candidate = test.intervals(0.05)
    assert champion.low is not None and champion.high is not None and champion.low < 4.2 < champion.high
    assert candidate.value == pytest.approx(3.4) and candidate.high is not None and candidate.high < champion.low


def test_the_bounds_of_a_mean_hold_at_all_times_at_once():
    missed = 0
    for seed in range(200):
        rng, test = np.random.default_rng(seed), MeanTest(alpha=0.1)
        for total in accumulate(rng.binomial(10, 0.9, 60).tolist()):
            num = test.champion.num + 10
            test = test.observed(Scores(num, total, total), Scores())
            champion, _ = test.intervals(0.1)
            assert champion.low is not None and champion.high is not None
            if not champion.low <= 0.9 <= champion.high:
                missed += 1
                break
    assert missed <= 20


def test_the_interval_of_a_rate_holds_at_all_times_at_once():
    missed = 0
    for seed in range(200):
        bad = of = 0
        for new in np.random.default_rng(seed).binomial(25, 0.04, 80).tolist():
            bad, of = bad + new, of + 25
            interval = rate_interval(bad, of, 0.1)
            assert interval.low is not None and interval.high is not None
            if not interval.low <= 0.04 <= interval.high:
                missed += 1
                break
    assert 0 < missed <= 20


def test_the_interval_of_a_rate_at_its_ends():
    assert rate_interval(0, 0, 0.05).value is None
    never, always = rate_interval(0, 200, 0.05), rate_interval(200, 200, 0.05)
    assert never.low == 0.0 and never.high is not None and 0.01 < never.high < 0.05
    assert always.high == 1.0 and always.low == pytest.approx(1 - never.high)


def test_the_interval_of_a_quantile():
    rng = np.random.default_rng(11)
    few, many = (quantile_interval(histogram(rng, num), 0.99, 0.05) for num in (50, 20_000))
    assert few.low is not None and few.high is None  # nobody can say how slow the slowest are
    true = 0.02 * math.exp(0.5 * 2.326)
    assert many.low is not None and many.high is not None and true / 1.2 < many.low < true < many.high < true * 1.2
    assert quantile_interval({}, 0.5, 0.05).value is None
    one = quantile_interval({bucket_of(0.5): 1000}, 0.5, 0.05)
    assert one.low is not None and one.high is not None and one.low < 0.5 <= one.high == edge_of(bucket_of(0.5))


def test_what_could_not_be_by_chance():
    assert surely_above(20, 20, 0.05, 14.0) and surely_above(12, 20, 0.02, 14.0)
    assert not surely_above(10, 20, 0.2, 14.0)
    assert surely_above(50, 100, 0.2, 14.0)
    assert not surely_above(1, 20, 0.2, 14.0)


@pytest.mark.parametrize(
    "test",
    [
        told(CountTest(alpha=0.05), Counts(50, 3, 50, 4), Counts(1, 0, 0, 0)).restarted(),
        quantile_test(np.random.default_rng(12), 1.0),
        mean_test(0.9, 0.8, num=20, batches=3),
    ],
    ids=["counts", "quantile", "mean"],
)
def test_a_test_survives_json(test):
    encoded = msgspec.json.encode(test)
    assert msgspec.json.decode(encoded, type=type(test)) == test
