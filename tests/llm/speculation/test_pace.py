"""How long drafts are: worth their price, off where they are not, and never dear. Seconds are made up."""

import random

import pytest

from fairlead.llm.speculation.pace import Pace, Rate, length


@pytest.mark.parametrize(
    ("rate", "price", "expected"),
    [(0.9, 0.5, 6), (0.5, 0.5, 0), (0.5, 0.49, 1), (0.7, 0.1, 6), (0.99, 0.02, 8), (1.0, 0.9, 8), (0.3, 0.4, 0), (0.0, 0.02, 0)],
)
def test_a_draft_ends_where_its_next_token_is_not_worth_its_price(rate, price, expected):
    assert length(rate, price, 8) == expected
    assert expected in (0, 8) or rate**expected >= price > rate ** (expected + 1)


def test_a_draft_is_never_longer_than_there_is_room_for():
    assert [length(1.0, 0.1, room) for room in (-1, 0, 1, 3)] == [0, 0, 1, 3]


def test_a_rate_follows_what_becomes_of_drafts():
    rate = Rate(0.5, 1 / 64)
    for _ in range(50):
        rate.note(4, 4)
    assert rate.value > 0.99
    for _ in range(200):
        rate.note(0, 4)
    assert rate.value < 0.1
    for _ in range(400):
        rate.note(3, 8)
    assert rate.value == pytest.approx(0.75, abs=0.05), "three looked at and right, one looked at and wrong"


class Machine:
    """Steps of `num_seqs` sequences that take what they take, on a clock of their own."""

    def __init__(self, *, num_seqs: int, rate: float, step: float, token: float, start: float = 0.0, noise: float = 0.0) -> None:
        """Seconds: `step` of a plain one, `token` for each of a draft, `start` for a step with any; `noise`: the share of steps that
        something else holds up."""
        self.num_seqs, self.rate, self.step, self.token, self.start, self.noise = num_seqs, rate, step, token, start, noise
        self.numbers = random.Random(0)
        self.pace = Pace(8)
        self.rates = [Rate(0.7, 1 / 8) for _ in range(num_seqs)]
        self.turn = 0

    def run(self, num_steps: int) -> tuple[float, float]:
        """(how many times as fast as without drafts, mean length of the drafts)."""
        seconds, num_tokens, num_drafts = 0.0, 0, 0
        for _ in range(num_steps):
            took, tokens, drafts = self.one()
            seconds, num_tokens, num_drafts = seconds + took, num_tokens + tokens, num_drafts + drafts
        plain = self.step * (1.0 + 9.0 * self.noise)
        return num_tokens * plain / self.num_seqs / seconds, num_drafts / num_steps / self.num_seqs

    def one(self) -> tuple[float, int, int]:
        self.pace.begin(self.num_seqs)
        lengths = [self.pace.length(rate.value, 100) for rate in self.rates]
        num_tried = 0
        if self.pace.tries and 0 in lengths:
            self.turn += 1
            without = [n for n, one in enumerate(lengths) if not one]
            lengths[without[self.turn % len(without)]] = num_tried = 1
        num_tokens = 0
        for rate, num_drafts in zip(self.rates, lengths, strict=True):
            num_accepted = 0
            while num_accepted < num_drafts and self.numbers.random() < self.rate:
                num_accepted += 1
            if num_drafts:
                rate.note(num_accepted, num_drafts)
            num_tokens += num_accepted + 1
        drafted = sum(lengths)
        seconds = self.step + self.token * drafted + (self.start if drafted else 0.0)
        if self.numbers.random() < self.noise:
            seconds *= 10.0
        self.pace.end(num_tokens, drafted, seconds, num_tried=num_tried)
        return seconds, num_tokens, drafted


def test_drafts_that_are_right_and_cheap_are_long_and_pay():
    faster, mean = Machine(num_seqs=1, rate=0.95, step=1.0, token=0.05).run(500)
    assert faster > 3.0 and mean > 6.0


def test_drafts_that_are_never_right_cost_next_to_nothing():
    machine = Machine(num_seqs=1, rate=0.0, step=1.0, token=0.3)
    assert machine.run(200)[0] > 0.97
    faster, mean = machine.run(2000)
    assert faster > 0.985 and mean < 0.05


def test_drafts_that_are_too_dear_cost_next_to_nothing():
    # Given a batch in which a token more takes as long as a token
    machine = Machine(num_seqs=32, rate=0.8, step=32.0, token=1.0)
    assert machine.run(100)[0] > 0.97
    assert machine.run(1000)[0] > 0.98


def test_drafts_pay_in_a_large_batch_whose_tokens_are_cheap():
    assert Machine(num_seqs=32, rate=0.9, step=32.0, token=0.2).run(300)[0] > 1.5


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("token", [0.02, 0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("num_seqs", [1, 4, 32])
def test_whatever_they_cost_it_is_never_slower_for_long_and_near_the_best(num_seqs, rate, token):
    machine = Machine(num_seqs=num_seqs, rate=rate, step=float(num_seqs), token=token)
    machine.run(150)
    faster, _ = machine.run(1500)
    best = max(sum(rate**k for k in range(most + 1)) / (1.0 + most * token) for most in range(9))
    assert faster > 0.97
    assert faster > 0.85 * best


def test_a_machine_that_does_other_things_meanwhile_does_not_mislead_it():
    assert Machine(num_seqs=1, rate=0.9, step=1.0, token=0.1, noise=0.1).run(1000)[0] > 1.8
    assert Machine(num_seqs=1, rate=0.1, step=1.0, token=0.5, noise=0.1).run(1000)[0] > 0.9


def test_when_drafts_become_right_they_come_back():
    machine = Machine(num_seqs=1, rate=0.0, step=1.0, token=0.1)
    machine.run(500)
    machine.rate = 0.95
    machine.run(400)
    faster, mean = machine.run(200)
    assert faster > 2.0 and mean > 4.0


def test_what_it_takes_to_begin_is_part_of_the_price():
    # Given a draft model that must compute a long prompt before a few tokens
    pace = Pace(8)
    for number in range(400):
        pace.begin(1)
        num_drafts = pace.length(0.9, 100)
        pace.end(1 + num_drafts, num_drafts, 1.0 + 0.05 * num_drafts + (40.0 if num_drafts else 0.0), catch_up=40.0 if num_drafts else 0.0)
        if number > 300:
            assert num_drafts == 0
