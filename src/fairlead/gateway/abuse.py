"""Abuse: how far a tenant's traffic is from what is ordinary, and what is done about it.

A pure state machine: `note` is told of every finished request, `decide` says of the next one whether it may come in. A tenant is a
few decayed numbers, the latest shingles of its prompts and one bit set of addresses for each of its busiest keys; no requests are kept.
docs/abuse.md explains the score.
"""

from array import array
from collections import OrderedDict
from math import exp2, expm1, log
from typing import Literal
from zlib import crc32

import numpy as np
from msgspec import Struct

from fairlead.core.caller import ANONYMOUS_TENANT
from fairlead.core.errors import LimitExceeded
from fairlead.core.policy import AbuseSettings
from fairlead.observe.counts import Counts

MAX_TENANTS = 10_000
"""Known at once; the one that was quiet for longest is forgotten."""
MAX_KEYS = 16
"""Of one tenant, whose addresses are watched; as above."""

LEARN_SECONDS = 3600.0
LEARN_REQUESTS = 300
"""A tenant is compared with itself once it was known for so long and for so many requests."""

FAST, SLOW = 30.0, 7 * 86_400.0
"""Half-lives in seconds of `now` and of `usually`."""
MIN_REQUEST_RATE, MIN_TOKEN_RATE = 1.0, 1000.0
"""Per second: whatever is usual, less than this is."""
ORDINARY_RATIO = 4.0
"""Of `now` to `usually`."""

SHARE_OF_LATEST = 1 / 64
SHARE_OF_LATEST_TEXTS = 1 / 128
USUAL_SHARE = 1 / 4096
"""What the latest request weighs in each share."""
FILTERED, FAILED, REPEATED = 0.1, 0.4, 0.2
"""Shares up to which nothing is said; of the last two, above the tenant's usual."""
POINTS_OF_SHARE = 20.0
NOT_THE_CALLERS = frozenset({408, 409, 425, 429, 499})
"""Statuses below 500 that do not tell of a wrong request."""

ADDRESS_SECONDS = 600.0
ADDRESS_BITS = 256
USUAL_ADDRESSES = 1 / 8
"""What the latest ten minutes weigh."""
MIN_ADDRESSES = 3.0
ORDINARY_ADDRESSES = 4.0
"""Ratio to the usual number."""

TEXT_SECONDS = 0.02
"""Between two texts of one tenant that are looked at."""
LOOK_SECONDS = 0.02
"""Between two requests of one tenant that are looked at, where nothing is wrong with those between: they are only counted."""
SKETCH_CHARS = 2048
"""The last of a text."""
SKETCH_SHINGLES = 16
MIN_SHINGLES = 8
"""A text with fewer says nothing."""
RECENT_SHINGLES = 256
"""Those of about 16 texts."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_FAST, _SLOW = log(2) / FAST, log(2) / SLOW


class Seen(Struct, frozen=True, gc=False):
    """One finished request, also one that a limit or a filter refused; not one that `decide` did."""

    tenant: str
    key: str = ""
    address: str = ""
    status: int = 200
    """As HTTP would say it."""
    filtered: bool = False
    """A filter blocked the question or its answer."""
    tokens: int = 0
    """Of question and answer; 0 for tensors."""
    text: str = ""
    """What the tenant's user asked; "" for tensors. Best without what all its requests share, as a system prompt."""


class Action(Struct, frozen=True):
    """What is done about a tenant: a row of the audit log."""

    tenant: str
    action: Literal["observe", "throttle", "block"]
    score: float
    reasons: dict[str, float]
    """Part of the score → points, the greatest first."""
    since: float
    until: float


def sketch(text: str) -> list[int]:
    """The least hashes of all runs of eight bytes: of two texts, the share in common is about that of all their runs."""
    data = text[-SKETCH_CHARS:].lower().encode("utf-8", "surrogatepass")
    num = len(data) - 7
    if num < MIN_SHINGLES:
        return []
    hashes = np.ndarray((num,), np.uint64, data, strides=(1,)) * _ODD
    hashes ^= hashes >> _HALF
    hashes = (hashes * _ODD) >> _HALF
    if num > 4 * SKETCH_SHINGLES:  # sorting all of them would cost twice as much
        hashes = hashes[hashes < (3 * SKETCH_SHINGLES << 32) // num]
    return sorted(set(hashes.tolist()))[:SKETCH_SHINGLES]


class _Addresses:
    """How many addresses one key was used from in the ten minutes that run, and usually."""

    __slots__ = ("bits", "ends", "latest", "period", "ratio", "usual")

    def __init__(self, period: int) -> None:
        self.period = period
        self.ends = (period + 1) * ADDRESS_SECONDS
        self.usual = -1.0
        """-1: not known yet."""
        self.forget_lately()

    def forget_lately(self) -> None:
        self.bits = 0
        self.latest = ""
        self.ratio = 0.0
        """Of the number to the usual one; 0 while that is not known."""

    def learn(self, address: str, period: int) -> None:
        if period == self.period and address == self.latest:
            return
        self.latest = address
        if period != self.period:
            if self.bits:
                number = self.number()
                self.usual = number if self.usual < 0 else self.usual + (number - self.usual) * USUAL_ADDRESSES
            self.period, self.bits, self.ends = period, 0, (period + 1) * ADDRESS_SECONDS
        if ":" in address:
            address = ":".join(address.split(":")[:4])  # one host has any number of addresses in its /64
        self.bits |= 1 << crc32(address.encode("ascii", "replace")) % ADDRESS_BITS
        self.ratio = 0.0 if self.usual < 0 else self.number() / max(self.usual, MIN_ADDRESSES)

    def number(self) -> float:
        """Linear counting: what so many bits say, some of which were set twice."""
        return -ADDRESS_BITS * log(1 - min(self.bits.bit_count(), ADDRESS_BITS - 1) / ADDRESS_BITS)


class _Tenant:
    """What is remembered of one tenant."""

    __slots__ = (
        "addresses",
        "begun",
        "failed",
        "failed_usual",
        "filtered",
        "keys",
        "num_counted",
        "num_requests",
        "recent",
        "repeated",
        "repeated_usual",
        "repeated_weight",
        "requests",
        "requests_usual",
        "seconds",
        "text_at",
        "tokens",
        "tokens_counted",
        "tokens_usual",
        "updated",
    )

    def __init__(self, now: float) -> None:
        self.begun = self.updated = now
        self.num_requests = 0
        self.seconds = self.requests_usual = self.tokens_usual = 0.0
        """Decayed by SLOW, the seconds too: so their ratios are right from the start."""
        self.failed_usual = self.repeated_usual = self.repeated_weight = 0.0
        self.recent: array[int] | None = None
        self.text_at = -TEXT_SECONDS
        """When one of its texts was looked at last."""
        self.keys: OrderedDict[str, _Addresses] = OrderedDict()
        self.forget_lately()

    def forget_lately(self) -> None:
        """All that speaks against it; what is usual stays."""
        self.requests = self.tokens = 0.0
        self.num_counted = self.tokens_counted = 0
        """Not in the numbers above and below yet."""
        self.filtered = self.failed = self.repeated = 0.0
        self.addresses = 0.0
        """The ratio of the key used last."""
        for key in self.keys.values():
            key.forget_lately()

    def counts(self, key: str, address: str, tokens: int, now: float) -> bool:
        """Whether it was enough to count this request, with which nothing is wrong."""
        if not 0.0 <= now - self.updated < LOOK_SECONDS:
            return False
        if key and address:
            known = self.keys.get(key)
            if known is None or address != known.latest or now >= known.ends:
                return False
        self.num_counted += 1
        self.tokens_counted += tokens
        return True

    def learn_counted(self) -> None:
        """As if they had come when one was looked at last."""
        number, tokens = self.num_counted, self.tokens_counted
        self.num_counted = self.tokens_counted = 0
        self.num_requests += number
        self.requests += number
        self.requests_usual += number
        self.tokens += tokens
        self.tokens_usual += tokens
        still = (1.0 - SHARE_OF_LATEST) ** number
        self.filtered *= still
        self.failed *= still
        self.failed_usual *= (1.0 - USUAL_SHARE) ** number

    def learn(self, seen: Seen, now: float) -> None:
        if self.num_counted:
            self.learn_counted()
        elapsed = max(0.0, now - self.updated)
        self.updated = now
        self.num_requests += 1
        faded = -expm1(-elapsed * _SLOW)
        fast, slow = exp2(-elapsed / FAST), 1.0 - faded
        self.requests = self.requests * fast + 1.0
        self.tokens = self.tokens * fast + seen.tokens
        self.seconds = self.seconds * slow + faded / _SLOW
        self.requests_usual = self.requests_usual * slow + 1.0
        self.tokens_usual = self.tokens_usual * slow + seen.tokens
        failed = 400 <= seen.status < 500 and seen.status not in NOT_THE_CALLERS and not seen.filtered
        self.filtered += (seen.filtered - self.filtered) * SHARE_OF_LATEST
        self.failed += (failed - self.failed) * SHARE_OF_LATEST
        self.failed_usual += (failed - self.failed_usual) * USUAL_SHARE
        if seen.text:
            self.text_at = now
            self._learn_text(seen.text)
        if seen.key and seen.address:
            self._learn_address(seen.key, seen.address, now)

    def _learn_text(self, text: str) -> None:
        shingles = sketch(text)
        if not shingles:
            return
        recent = self.recent
        if recent is None:
            recent = self.recent = array("I", bytes(4 * RECENT_SHINGLES))
        num_found = 0
        for shingle in shingles:
            at = shingle % RECENT_SHINGLES
            if recent[at] == shingle:
                num_found += 1
            else:
                recent[at] = shingle
        found = num_found / len(shingles)
        self.repeated += (found - self.repeated) * SHARE_OF_LATEST_TEXTS
        self.repeated_usual += (found - self.repeated_usual) * USUAL_SHARE
        self.repeated_weight += (1.0 - self.repeated_weight) * USUAL_SHARE

    def _learn_address(self, key: str, address: str, now: float) -> None:
        period = int(now // ADDRESS_SECONDS)
        known = self.keys.get(key)
        if known is None:
            known = self.keys[key] = _Addresses(period)
            if len(self.keys) > MAX_KEYS:
                self.keys.popitem(last=False)
        else:
            self.keys.move_to_end(key)
        known.learn(address, period)
        self.addresses = known.ratio

    def points(self) -> dict[str, float]:
        """The parts of the score; all are 0 in ordinary traffic."""
        if self.num_counted:
            self.learn_counted()
        rate = tokens = repeated = 0.0
        if self.num_requests >= LEARN_REQUESTS and self.updated - self.begun >= LEARN_SECONDS:
            rate = self.requests * _FAST / max(self.requests_usual / self.seconds, MIN_REQUEST_RATE) - ORDINARY_RATIO
            tokens = self.tokens * _FAST / max(self.tokens_usual / self.seconds, MIN_TOKEN_RATE) - ORDINARY_RATIO
            if self.repeated_weight:
                repeated = POINTS_OF_SHARE * (self.repeated - self.repeated_usual / self.repeated_weight - REPEATED)
        if rate > tokens:  # more requests are more tokens: that counts once
            tokens = 0.0
        else:
            rate = 0.0
        filtered, failed = self.filtered - FILTERED, self.failed - self.failed_usual - FAILED
        addresses = self.addresses - ORDINARY_ADDRESSES
        # written out, for every request asks: a call of `max` costs as much as all the arithmetic
        return {
            "rate": rate if rate > 0.0 else 0.0,
            "tokens": tokens if tokens > 0.0 else 0.0,
            "filtered": POINTS_OF_SHARE * filtered if filtered > 0.0 else 0.0,
            "failed": POINTS_OF_SHARE * failed if failed > 0.0 else 0.0,
            "repeated": repeated if repeated > 0.0 else 0.0,
            "addresses": addresses if addresses > 0.0 else 0.0,
        }


class Abuse:
    """All times are of one clock, which the caller chooses."""

    def __init__(self, settings: AbuseSettings, counts: Counts, max_tenants: int = MAX_TENANTS) -> None:
        self.settings = settings
        self.max_tenants = max_tenants
        self._counts = counts
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._in_force: dict[str, Action] = {}
        self._credit: dict[str, float] = {}
        """Throttled tenant → share of a request that it has saved up."""

    def configure(self, settings: AbuseSettings) -> None:
        """With another kind of action, those in force end."""
        if settings.action != self.settings.action:
            for tenant in list(self._in_force):
                self._end(tenant)
        self.settings = settings

    def decide(self, tenant: str, now: float) -> LimitExceeded | None:
        """Whether a request is refused, and with what."""
        if not self._in_force or (action := self._in_force.get(tenant)) is None or action.action == "observe":
            return None
        if now >= action.until:
            self._end(tenant)
            return None
        if action.action == "throttle":
            self._credit[tenant] = credit = self._credit.get(tenant, 0.0) + self.settings.throttle_to
            if credit >= 1.0:
                self._credit[tenant] = credit - 1.0
                return None
        seconds = action.until - now
        return LimitExceeded(
            f"requests of tenant `{tenant}` are {'refused' if action.action == 'block' else 'throttled'} for another {seconds:.0f} s, because they look abnormal; ask the operator of this server if they are not",
            reason="abuse",
            retry_after=seconds if action.action == "block" else 1.0,
        )

    def wants_text(self, tenant: str, now: float) -> bool:
        """Whether the text of a tenant's next request is worth telling: sketching costs more than all else here, and a
        sample of a fast tenant's says as much."""
        known = self._tenants.get(tenant)
        return known is None or now - known.text_at >= TEXT_SECONDS

    def counts(self, tenant: str, key: str, address: str, tokens: int, now: float) -> bool:
        """Whether it was enough to count a request that went well; else `note` must be told of it. Of a fast tenant's, a few are."""
        known = self._tenants.get(tenant)
        return known is not None and known.counts(key, address, tokens, now)

    def note(self, seen: Seen, now: float) -> Action | None:
        """An action that begins with this request, of whatever kind the settings allow at most."""
        settings = self.settings
        if settings.action == "off":
            return None
        tenant = self._tenant(seen.tenant, now)
        in_force = self._in_force.get(seen.tenant)
        if in_force is not None and now >= in_force.until:
            self._end(seen.tenant)
            in_force = None
        tenant.learn(seen, now)
        if in_force is not None:
            return None
        points = tenant.points()
        score = sum(points.values())
        if score < settings.threshold:
            return None
        reasons = {name: round(part, 2) for name, part in sorted(points.items(), key=lambda item: -item[1]) if part > 0}
        anonymous = seen.tenant == ANONYMOUS_TENANT and not seen.key
        action = Action(
            seen.tenant, "observe" if anonymous else settings.action, round(score, 2), reasons, since=now, until=now + settings.seconds
        )
        self._begin(action, now)
        return action

    def points(self, tenant: str) -> dict[str, float]:
        """The parts of a tenant's score as of its latest request; {} for one that is not known."""
        known = self._tenants.get(tenant)
        return {} if known is None else known.points()

    def actions(self, now: float) -> list[Action]:
        """In force."""
        return [action for action in self._in_force.values() if now < action.until]

    def lift(self, tenant: str) -> bool:
        """End what is in force against a tenant; False where there is nothing."""
        return self._end(tenant)

    def __len__(self) -> int:
        return len(self._tenants)

    def _tenant(self, name: str, now: float) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(now)
            if len(self._tenants) > self.max_tenants:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(name)
        return tenant

    def _begin(self, action: Action, now: float) -> None:
        if len(self._in_force) >= self.max_tenants:
            for each in [each.tenant for each in self._in_force.values() if each.until <= now] or [next(iter(self._in_force))]:
                self._end(each)
        self._in_force[action.tenant] = action
        self._counts.add("fairlead_gateway_abuse_actions_total", action.action, next(iter(action.reasons)))

    def _end(self, tenant: str) -> bool:
        """And judge anew what comes next."""
        self._credit.pop(tenant, None)
        if self._in_force.pop(tenant, None) is None:
            return False
        if tenant in self._tenants:
            self._tenants[tenant].forget_lately()
        return True
