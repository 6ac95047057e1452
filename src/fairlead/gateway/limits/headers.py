"""What callers are told about their limits: OpenAI's headers, the IETF's (draft-ietf-httpapi-ratelimit-headers-10), and why
a request was refused."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from fairlead.core.errors import LimitExceeded
from fairlead.core.policy import CALENDAR, Amounts, Unit
from fairlead.gateway.limits.meter import DUST, GREATEST, NEVER, Meter, Standing, at_once, rate_of, reset_of

SOON = 1.0
"""Seconds after which to try again where other requests must end first, which no clock tells."""
FAR = 86400.0
"""Seconds to wait before asking again for what the rules never allow: they may have been changed."""


def headers_of(meters: Iterable[Meter | Standing], now: float) -> dict[str, str]:
    """For each unit, those of the rule that leaves least."""
    tightest: dict[Unit | None, tuple[float, Meter | Standing]] = {}
    for meter in meters:
        unit, left = meter.unit, meter.rule.amount - meter.spent - meter.held
        found = tightest.get(unit)
        if found is None or left < found[0]:
            tightest[unit] = (left, meter)
    headers = {}
    policies = []
    limits = []
    for left, meter in tightest.values():
        face = meter.face
        rest = (left + DUST) * face.factor if left > 0.0 else 0.0
        remaining = int(rest) if rest < GREATEST else GREATEST
        rate = meter.rate
        reset = (meter.spent + meter.held) / rate if rate else reset_of(meter, now)
        policies.append(face.policy)
        limits.append(f"{face.name};r={remaining};t={ceil(reset - DUST)}" if reset else f"{face.name};r={remaining}")
        if face.openai is not None:
            name_limit, name_remaining, name_reset = face.openai
            headers[name_limit] = face.limit
            headers[name_remaining] = str(remaining)
            headers[name_reset] = go_duration(reset)
    if policies:
        headers["RateLimit-Policy"] = ", ".join(policies)
        headers["RateLimit"] = ", ".join(limits)
    return headers


def go_duration(seconds: float) -> str:
    """As Go prints it, rounded up to milliseconds: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = ceil(seconds * 1000 - 1e-6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    rest = f"{milliseconds / 1000:g}s"
    if not minutes:
        return rest
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}" if hours else f"{minutes}m{rest}"


def needed_of(standing: Standing, amounts: Amounts) -> float | None:
    """None: the rule does not concern a request of these amounts."""
    return at_once(amounts) if standing.rule.unit is None else amounts.get(standing.rule.unit)


def refusal(standings: Sequence[Standing], amounts: Amounts) -> LimitExceeded | None:
    """Why a request of these amounts is refused as things stand: of several rules, the one that takes longest. None: it is not."""
    refusals = [
        _refused(standing, needed)
        for standing in standings
        if (needed := needed_of(standing, amounts)) is not None
        and standing.spent + standing.held + needed > standing.rule.amount + DUST * max(1.0, standing.rule.amount)
    ]
    if not refusals:
        return None
    error = max(refusals, key=lambda error: error.retry_after)
    error.headers = headers_of(standings, standings[0].now) | dict(error.headers)
    return error


def _refused(standing: Standing, needed: float) -> LimitExceeded:
    rule, kind = standing.rule, standing.kind
    if rule.unit is None:
        if rule.amount < 1:
            return _never(f"the {kind} may have no requests under way", "limit-concurrent")
        message = f"the {kind} has {rule.amount:g} requests under way, as many as it may: try again when one has ended"
        return LimitExceeded(message, reason="limit-concurrent", retry_after=SOON)
    what = f"{rule.amount:g} {rule.unit.replace('_', ' ')} per {rule.window}"
    is_budget = rule.window in CALENDAR
    reason = f"{'budget' if is_budget else 'limit'}-{rule.unit.replace('_', '-')}"
    if needed > rule.amount:
        return _never(
            f"this request may need {needed:g} where the {kind} is allowed {what}: ask for less, or have the limit raised", reason
        )
    if not is_budget:
        wait = (standing.spent + standing.held + needed - rule.amount) / rate_of(rule)
        message = f"the {kind}'s limit of {what} is reached: try again in {duration(wait)}"
    elif standing.spent + needed <= rule.amount:
        wait = SOON
        message = f"what is left of the {kind}'s budget of {what} is held by requests under way: try again when one has ended"
    else:
        wait = standing.until - standing.now if standing.until != NEVER else FAR
        message = f"the {kind}'s budget of {what} is used up: it begins anew in {duration(wait)}"
    return LimitExceeded(message, reason=reason, retry_after=wait)


def _never(message: str, reason: str) -> LimitExceeded:
    error = LimitExceeded(message, reason=reason, retry_after=FAR)
    error.headers = NO_RETRY
    return error


NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
"""OpenAI's clients heed it."""


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{max(seconds, 0.1):.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
