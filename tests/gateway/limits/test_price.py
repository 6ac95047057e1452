"""What requests cost."""

import pytest

from fairlead.core.generation import Usage
from fairlead.core.policy import Price, Unit
from fairlead.gateway.limits.price import FREE, amounts_of, cost

CHAT = Price(per_request=0.001, per_million_input_tokens=2.0, per_million_cached_input_tokens=0.5, per_million_output_tokens=8.0)


def test_a_chat_costs_its_tokens_and_cached_ones_less():
    amounts = amounts_of(CHAT, usage=Usage(prompt_tokens=10_000, completion_tokens=500, cached_tokens=8_000), compute_seconds=1.5)
    assert amounts == {
        Unit.REQUESTS: 1.0,
        Unit.INPUT_TOKENS: 10_000,
        Unit.OUTPUT_TOKENS: 500,
        Unit.TOKENS: 10_500,
        Unit.COMPUTE_SECONDS: 1.5,
        Unit.MONEY: pytest.approx(0.001 + 2_000 * 2e-6 + 8_000 * 0.5e-6 + 500 * 8e-6),
    }


def test_cached_tokens_cost_as_others_unless_the_price_says_more():
    plain = Price(per_million_input_tokens=2.0)
    assert cost(plain, {Unit.INPUT_TOKENS: 1e6}, cached_tokens=1e6) == 2.0
    assert cost(CHAT, {Unit.INPUT_TOKENS: 10}, cached_tokens=1e6) == pytest.approx(10 * 0.5e-6)


def test_rows_pixels_and_time_cost_what_the_price_says():
    price = Price(per_thousand_rows=0.5, per_megapixel=0.01, per_compute_second=0.002)
    amounts = amounts_of(price, usage=Usage(megapixels=2.0), rows=400, compute_seconds=10.0)
    assert amounts[Unit.MONEY] == pytest.approx(0.2 + 0.02 + 0.02)
    assert Unit.TOKENS not in amounts


def test_what_is_free_has_no_money_to_hold():
    assert amounts_of(rows=3) == {Unit.REQUESTS: 1.0, Unit.ROWS: 3, Unit.COMPUTE_SECONDS: 0.0}
    assert Unit.MONEY not in amounts_of(Price(), rows=3)
    assert cost(FREE, {Unit.REQUESTS: 1.0, Unit.TOKENS: 1e9}) == 0
