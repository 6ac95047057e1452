"""The arithmetic of one rule for one subject, which `limits.lua` repeats for Redis.

A meter knows two amounts. `held` is reserved by requests under way, `spent` was used by requests that have ended. A
request is admitted while spent + held + what it needs fit into the rule's amount.

A limit per second, minute or hour is a bucket: `amount / window` flows off each second, out of `spent` first and then,
where nothing is spent, out of `held`, from all holds alike. What has flowed off a hold pays for what its request uses,
and only what has not is given back in the end. So a request that takes longer than the window does not block the
bucket, and nobody gives back what time gave back already. A budget (day, month) flows off never and is empty again when
the calendar's next period begins; so does `concurrent`, of which nothing is ever spent.
"""

import math
from datetime import UTC, datetime

from msgspec import Struct

from fairlead.core.policy import CALENDAR, WINDOWS, Amounts, Rule, Unit

NEVER = math.inf
DUST = 1e-9
"""Less than this is what rounding leaves."""
CLOCK_STEP = 1.0
"""Seconds: a clock that goes back further was set; by less, two callers read it in another order than they came."""
THINNEST = 1e-100
"""Share from which on a hold is no longer told apart from what is spent, long before a float cannot hold it."""


class Subject(Struct, frozen=True):
    """Whose rules: `tenant:acme`, `project:acme/web`, `key:ID`, `model:chat`."""

    name: str
    rules: tuple[Rule, ...]
    """The same tuple for every request, until the rules change: it is compared by identity first."""


class Face(Struct, frozen=True):
    """What never changes of what callers are told about a rule (draft-ietf-httpapi-ratelimit-headers-10)."""

    name: str
    policy: str
    limit: str
    factor: float
    """How many of the draft's unit are one of ours: quotas are whole numbers."""
    openai: tuple[str, str, str] | None
    """Names of the headers in which OpenAI tells limit, rest and reset of this unit."""


QUOTA_UNITS: dict[Unit | None, tuple[str, float]] = {
    None: ("concurrent-requests", 1),
    Unit.REQUESTS: ("requests", 1),
    Unit.TOKENS: ("fairlead-tokens", 1),
    Unit.INPUT_TOKENS: ("fairlead-input-tokens", 1),
    Unit.OUTPUT_TOKENS: ("fairlead-output-tokens", 1),
    Unit.ROWS: ("fairlead-rows", 1),
    Unit.MEGAPIXELS: ("fairlead-pixels", 1e6),
    Unit.COMPUTE_SECONDS: ("fairlead-compute-milliseconds", 1e3),
    Unit.MONEY: ("fairlead-money-millionths", 1e6),
}


OPENAI = {
    Unit.REQUESTS: ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    Unit.TOKENS: ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
}

GREATEST = 999_999_999_999_999
"""The greatest whole number that structured fields know."""


def face_of(subject: str, rule: Rule) -> Face:
    kind = subject.partition(":")[0]
    quota_unit, factor = QUOTA_UNITS[rule.unit]
    limit = str(round(min(rule.amount * factor, GREATEST)))
    policy = f'"{kind}-{rule.name}";q={limit}'
    if seconds := WINDOWS.get(rule.window):  # A month's length varies: it is left out, as the draft allows.
        policy += f";w={seconds:.0f}"
    if rule.unit is not Unit.REQUESTS:  # the draft's default
        policy += f';qu="{quota_unit}"'
    return Face(f'"{kind}-{rule.name}"', policy, limit, factor, None if rule.unit is None else OPENAI.get(rule.unit))


class Standing(Struct, frozen=True):
    """How one rule of one subject stands at one moment."""

    subject: str
    rule: Rule
    spent: float
    held: float
    until: float
    """When a budget's period ends; NEVER for the others."""
    now: float

    @property
    def kind(self) -> str:
        """`tenant`, `project`, `key` or `model`."""
        return self.subject.partition(":")[0]

    @property
    def unit(self) -> Unit | None:
        return self.rule.unit

    @property
    def remaining(self) -> float:
        return max(0.0, self.rule.amount - self.spent - self.held)

    @property
    def reset(self) -> float:
        """Seconds until all of it is there again if nothing else comes; 0 for `concurrent`, where no clock decides."""
        return reset_of(self, self.now)

    @property
    def rate(self) -> float:
        return rate_of(self.rule)

    @property
    def face(self) -> Face:
        return face_of(self.subject, self.rule)


def reset_of(meter: "Meter | Standing", now: float) -> float:
    if rate := meter.rate:
        return (meter.spent + meter.held) / rate
    return 0.0 if meter.until == NEVER else max(0.0, meter.until - now)


def rate_of(rule: Rule) -> float:
    """What flows off each second; 0 for budgets and `concurrent`."""
    return 0.0 if rule.window in CALENDAR or not rule.window else rule.amount / WINDOWS[rule.window]


def at_once(amounts: Amounts) -> float:
    """How many requests under way it is: of the prompts that came in one request, only the first is one."""
    return 0.0 if amounts.get(Unit.REQUESTS) == 0.0 else 1.0


def period_end(window: str, now: float) -> float:
    """When the day or month of `now` ends, in UTC."""
    if window == "day":
        return (now // 86400 + 1) * 86400
    date = datetime.fromtimestamp(now, UTC)
    year, month = divmod(date.year * 12 + date.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


class Meter:
    __slots__ = ("at", "face", "full", "held", "rate", "rule", "share", "spent", "subject", "unit", "until", "wave")

    def __init__(self, subject: str, rule: Rule, now: float) -> None:
        self.subject = subject
        self.rule = rule
        self.unit = rule.unit
        self.rate = 0.0
        self.spent = 0.0
        self.held = 0.0
        self.share = 1.0
        """Of what was held when the wave began, how much of each has not flowed off."""
        self.wave = now
        """When `held` was last empty: of holds from before, nothing is left."""
        self.at = now
        """Up to when a bucket has flowed."""
        self.until = period_end(rule.window, now) if rule.window in CALENDAR else NEVER
        self.allow(rule)

    def allow(self, rule: Rule) -> None:
        """The rule has another amount from now on. A bucket that shrinks is full at most; a budget's spending stays."""
        if rule.amount < self.rule.amount and self.rate:
            self.spent = min(self.spent, rule.amount)
        self.rule = rule
        self.face = face_of(self.subject, rule)
        self.rate = rate_of(rule)
        self.full = rule.amount + DUST * max(1.0, rule.amount)

    def flow(self, now: float) -> None:
        if self.rate:
            passed = now - self.at
            if passed <= 0.0:
                if passed < -CLOCK_STEP:
                    self.at = now
                return
            self.at = now
            if not (self.spent or self.held):
                return
            amount = passed * self.rate
            if amount <= self.spent:
                self.spent -= amount
                return
            amount -= self.spent
            self.spent = 0.0
            if self.held:
                self._flow_off_holds(amount, now)
        elif now >= self.until:
            self.spent = 0.0
            self.until = period_end(self.rule.window, now)

    def _flow_off_holds(self, amount: float, now: float) -> None:
        rest = self.held - amount
        self.share *= rest / self.held
        if rest > DUST and self.share > THINNEST:
            self.held = rest
        else:
            self.spent = max(0.0, rest)
            self.held = 0.0
            self.share = 1.0
            self.wave = now

    def end(self, needed: float, share: float, wave: float, used: float | None, now: float) -> None:
        """A hold of `needed`, made at this `share` and `wave`, ends: `used` is spent, or nothing at all (None)."""
        self.flow(now)
        left = needed * (self.share / share) if wave == self.wave else 0.0
        rest = self.held - left
        self.held = rest if rest > DUST else 0.0
        if used is not None and used > needed - left:
            self.spent += used - (needed - left)

    def standing(self, now: float) -> Standing:
        return Standing(self.subject, self.rule, self.spent, self.held, self.until, now)
