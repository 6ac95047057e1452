"""What a request used, in every unit, and what that costs."""

from fairlead.core.generation import Usage
from fairlead.core.policy import Amounts, Price, Unit

FREE = Price()
# Looked up once: an enum's own look-up costs more than the rest of `amounts_of`, which every request calls twice.
REQUESTS, SECONDS = Unit.REQUESTS, Unit.COMPUTE_SECONDS
INPUT_TOKENS, OUTPUT_TOKENS, TOKENS = Unit.INPUT_TOKENS, Unit.OUTPUT_TOKENS, Unit.TOKENS
ROWS, MEGAPIXELS, MONEY = Unit.ROWS, Unit.MEGAPIXELS, Unit.MONEY


def cost(price: Price, amounts: Amounts, cached_tokens: float = 0.0) -> float:
    """Money. `cached_tokens` are those of the input tokens that the prefix cache held."""
    of = amounts.get
    input_tokens = of(INPUT_TOKENS, 0.0)
    per_input = price.per_million_input_tokens
    per_cached = per_input if price.per_million_cached_input_tokens is None else price.per_million_cached_input_tokens
    cached = min(cached_tokens, input_tokens)
    return (
        price.per_request * of(REQUESTS, 0.0)
        + ((input_tokens - cached) * per_input + cached * per_cached + of(OUTPUT_TOKENS, 0.0) * price.per_million_output_tokens) / 1e6
        + price.per_thousand_rows * of(ROWS, 0.0) / 1e3
        + price.per_megapixel * of(MEGAPIXELS, 0.0)
        + price.per_compute_second * of(SECONDS, 0.0)
    )


def amounts_of(
    price: Price = FREE,
    *,
    num_requests: int = 1,
    usage: Usage | None = None,
    rows: int = 0,
    compute_seconds: float = 0.0,
) -> Amounts:
    """Of one request, before (estimated) or after (real). Units that it has nothing to do with are not there, so that their
    rules do not concern it."""
    amounts: Amounts = {REQUESTS: float(num_requests), SECONDS: compute_seconds}
    if usage is not None and usage.megapixels:
        amounts[MEGAPIXELS] = usage.megapixels
    elif usage is not None:
        amounts[INPUT_TOKENS] = usage.prompt_tokens
        amounts[OUTPUT_TOKENS] = usage.completion_tokens
        amounts[TOKENS] = usage.prompt_tokens + usage.completion_tokens
    if rows:
        amounts[ROWS] = rows
    if price is not FREE and price != FREE:
        amounts[MONEY] = cost(price, amounts, usage.cached_tokens if usage is not None else 0)
    return amounts
