"""Limits of one gateway, in its memory: hold before, settle after.

Whatever the order of events, for every rule:

1. When a request is admitted, spent + held fit into the rule's amount, its own hold included.
2. Later they exceed it at most by what requests that were then under way used beyond what they held; until that has
   flowed off, or the period has ended, nobody is admitted.
3. What is used in any stretch of time (each request counted when it was admitted, what it used beyond its hold when it
   ended) is at most the amount, plus what flowed off in that time, plus what was used beyond holds.
4. A hold that is released leaves no more, and unless others were under way no less, than if it had never been.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from fairlead.core.errors import LimitExceeded
from fairlead.core.policy import Amounts, Rule, Unit
from fairlead.gateway.limits.headers import headers_of, refusal
from fairlead.gateway.limits.meter import NEVER, Meter, Standing, Subject, at_once, period_end

MANY = 1024
"""Remembered budgets, from which on those of ended periods are looked for and forgotten."""


class Hold:
    """What one request has reserved: nothing, unless a subclass says more. The first settle or release counts, later ones do nothing."""

    __slots__ = ()

    @property
    def headers(self) -> dict[str, str]:
        """What its caller is told; {} where no rule concerned the request."""
        return {}

    def settle(self, used: Amounts, now: float) -> None:
        """The request has ended and used so much; units that are not there were not used."""

    def release(self, now: float) -> None:
        """The request came to nothing, by no fault of the caller's: as if it had never been."""


NOTHING_HELD = Hold()


class AnyLimiter(Protocol):
    """Where the gateway holds, in memory or in Redis. Called from the event loop only; `now` is `time.time()`."""

    def hold(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold | None:
        """All or nothing, at once; None: only `ask` can tell. Raises LimitExceeded."""

    async def ask(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold: ...

    async def standing(self, subjects: Sequence[Subject], now: float) -> list[Standing]: ...

    async def restore(self, subject: str, unit: Unit, window: str, spent: float, now: float) -> None:
        """At least so much of a budget was spent in the period of `now`, as the usage records say."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Account:
    """The meters of one subject."""

    __slots__ = ("meters", "num_holds", "rules")

    def __init__(self) -> None:
        self.rules: tuple[Rule, ...] = ()
        self.meters: list[Meter] = []
        self.num_holds = 0

    def idle(self, now: float) -> bool:
        """Nothing would be lost if it were forgotten."""
        if self.num_holds:
            return False
        for meter in self.meters:
            meter.flow(now)
        return not any(meter.spent or meter.held for meter in self.meters)


Part = tuple[Meter, float, float, float]
"""Of a hold: where, how much, and the meter's share and wave then."""


def release(accounts: list[Account], parts: list[Part], now: float) -> None:
    for account in accounts:
        account.num_holds -= 1
    for meter, needed, share, wave in parts:
        meter.end(needed, share, wave, None, now)


class LedgerHold(Hold):
    __slots__ = ("_accounts", "_ledger", "_open", "_parts")

    def __init__(self, ledger: "Limiter", accounts: list[Account], parts: list[Part]) -> None:
        self._ledger = ledger
        self._accounts = accounts
        self._parts = parts
        self._open = True

    @property
    def headers(self) -> dict[str, str]:
        return headers_of([part[0] for part in self._parts], self._ledger.now)

    def settle(self, used: Amounts, now: float) -> None:
        if self._open:
            self._open = False
            for account in self._accounts:
                account.num_holds -= 1
            for meter, needed, share, wave in self._parts:
                meter.end(needed, share, wave, used.get(meter.unit, 0.0) if meter.unit else None, now)

    def release(self, now: float) -> None:
        if self._open:
            self._open = False
            release(self._accounts, self._parts, now)

    def __del__(self) -> None:
        # Whoever held it is gone without a word. The garbage collector may say so in any thread.
        if self._open:
            self._ledger.dropped.append((self._accounts, self._parts))


class Limiter:
    """AnyLimiter, in memory."""

    def __init__(self) -> None:
        self.now = 0.0
        """Of the last hold."""
        self.dropped: deque[tuple[list[Account], list[Part]]] = deque()
        """Holds that were neither settled nor released, to be released by the next event."""
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._remembered: dict[tuple[str, Unit, str], tuple[float, float]] = {}
        """(subject, unit, window) → (spent, end of that period), until the subject's rules are known."""
        self._many = MANY

    def __len__(self) -> int:
        """How many subjects are remembered."""
        return len(self._accounts)

    def hold(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold:
        """All or nothing. Raises LimitExceeded."""
        if self.dropped:
            self._release_dropped(now)
        accounts: list[Account] = []
        parts: list[Part] = []
        under_way, of = at_once(amounts), amounts.get
        for subject in subjects:
            if not subject.rules:
                continue
            account = self._accounts.get(subject.name)
            if account is None or account.rules is not subject.rules:
                account = self._account(subject, now)
            account.num_holds += 1
            accounts.append(account)
            for meter in account.meters:
                meter.flow(now)
                needed = under_way if meter.unit is None else of(meter.unit)
                if needed is None:
                    needed = 0.0
                elif meter.spent + meter.held + needed > meter.full:
                    release(accounts, parts, now)
                    raise self._refused(subjects, amounts, now)
                meter.held += needed
                parts.append((meter, needed, meter.share, meter.wave))
        if not accounts:
            return NOTHING_HELD
        self.now = now
        return LedgerHold(self, accounts, parts)

    async def ask(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold:
        return self.hold(subjects, amounts, now)

    def _release_dropped(self, now: float) -> None:
        while self.dropped:
            release(*self.dropped.popleft(), now)

    def _refused(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> LimitExceeded:
        error = refusal(self.standings(subjects, now), amounts)
        assert error is not None
        return error

    def _account(self, subject: Subject, now: float) -> Account:
        """Of a subject that is new, or has other rules than before."""
        account = self._accounts.get(subject.name)
        if account is None:
            self._forget_some(now)
            account = self._accounts[subject.name] = Account()
        kept = {meter.rule.name: meter for meter in account.meters}
        account.rules = subject.rules
        account.meters = [self._meter(kept.get(rule.name), subject.name, rule, now) for rule in subject.rules]
        return account

    def _meter(self, kept: Meter | None, subject: str, rule: Rule, now: float) -> Meter:
        if kept is not None:
            kept.flow(now)
            kept.allow(rule)
            return kept
        meter = Meter(subject, rule, now)
        if rule.unit is not None:
            spent, until = self._remembered.pop((subject, rule.unit, rule.window), (0.0, 0.0))
            meter.spent = spent if now < until else 0.0
        return meter

    def _forget_some(self, now: float) -> None:
        """Looks at the two accounts that were looked at longest ago, so that idle ones never outnumber the others for long."""
        for _ in range(min(2, len(self._accounts))):
            name, account = self._accounts.popitem(last=False)
            if not account.idle(now):
                self._accounts[name] = account

    def standings(self, subjects: Sequence[Subject], now: float) -> list[Standing]:
        self._release_dropped(now)
        found = []
        for subject in subjects:
            if subject.rules:
                account = self._accounts.get(subject.name)
                if account is None or account.rules is not subject.rules:
                    account = self._account(subject, now)
                for meter in account.meters:
                    meter.flow(now)
                    found.append(meter.standing(now))
        return found

    async def standing(self, subjects: Sequence[Subject], now: float) -> list[Standing]:
        return self.standings(subjects, now)

    def overview(self, now: float) -> Iterator[Standing]:
        """Of everybody who is remembered: between two of them others may have their turn."""
        for account in list(self._accounts.values()):
            for meter in account.meters:
                meter.flow(now)
                yield meter.standing(now)

    def remember(self, subject: str, unit: Unit, window: str, spent: float, now: float) -> None:
        """At least so much of a budget was spent in the period of `now`."""
        for meter in self._accounts[subject].meters if subject in self._accounts else ():
            if meter.unit is unit and meter.rule.window == window:
                meter.flow(now)
                meter.spent = max(meter.spent, spent)
                return
        if len(self._remembered) >= self._many:
            self._remembered = {key: value for key, value in self._remembered.items() if now < value[1]}
            self._many = max(MANY, 2 * len(self._remembered))
        before, until = self._remembered.get((subject, unit, window), (0.0, 0.0))
        self._remembered[subject, unit, window] = (spent, period_end(window, now)) if now >= until else (max(before, spent), until)

    def budgets(self, now: float) -> Iterator[tuple[str, Unit, str, float]]:
        """(subject, unit, window, spent) of all budgets of which something is known to be spent in the period of `now`."""
        for (subject, unit, window), (spent, until) in self._remembered.items():
            if now < until:
                yield subject, unit, window, spent
        for account in self._accounts.values():
            for meter in account.meters:
                if meter.unit is not None and meter.spent and now < meter.until < NEVER:
                    yield meter.subject, meter.unit, meter.rule.window, meter.spent

    async def restore(self, subject: str, unit: Unit, window: str, spent: float, now: float) -> None:
        self.remember(subject, unit, window, spent, now)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass
