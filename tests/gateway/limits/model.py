"""The reference: each hold's units are kept apart, and flow off them one by one. Slow, and nothing in it is clever."""

from fairlead.core.policy import CALENDAR, Amounts, Rule
from fairlead.gateway.limits.meter import period_end, rate_of


class ModelMeter:
    def __init__(self, rule: Rule, now: float) -> None:
        self.rule = rule
        self.spent = 0.0
        self.left: dict[int, float] = {}
        """Hold → how much of it has not flowed off."""
        self.needed: dict[int, float] = {}
        self.at = now
        self.until = period_end(rule.window, now) if rule.window in CALENDAR else float("inf")

    @property
    def held(self) -> float:
        return sum(self.left.values())

    def flow(self, now: float) -> None:
        amount = (now - self.at) * rate_of(self.rule)
        self.at = now
        from_spent = min(self.spent, amount)
        self.spent -= from_spent
        held = self.held
        if held > 0:
            keep = max(0.0, 1 - (amount - from_spent) / held)
            self.left = {hold: left * keep for hold, left in self.left.items()}
        if now >= self.until:
            self.spent = 0.0
            self.until = period_end(self.rule.window, now)

    def needs(self, amounts: Amounts) -> float | None:
        return 1.0 if self.rule.unit is None else amounts.get(self.rule.unit)

    def fits(self, amounts: Amounts) -> bool:
        needed = self.needs(amounts)
        return needed is None or self.spent + self.held + needed <= self.rule.amount * (1 + 1e-9) + 1e-9

    def hold(self, hold: int, amounts: Amounts) -> None:
        self.needed[hold] = self.left[hold] = self.needs(amounts) or 0.0

    def end(self, hold: int, used: Amounts | None, now: float) -> None:
        self.flow(now)
        flowed_off = self.needed.pop(hold) - self.left.pop(hold)
        if used is not None and self.rule.unit is not None:
            self.spent += max(0.0, used.get(self.rule.unit, 0.0) - flowed_off)


class Model:
    def __init__(self, rules: tuple[Rule, ...], now: float) -> None:
        self.meters = [ModelMeter(rule, now) for rule in rules]

    def hold(self, hold: int, amounts: Amounts, now: float) -> bool:
        for meter in self.meters:
            meter.flow(now)
        if not all(meter.fits(amounts) for meter in self.meters):
            return False
        for meter in self.meters:
            meter.hold(hold, amounts)
        return True

    def end(self, hold: int, used: Amounts | None, now: float) -> None:
        for meter in self.meters:
            meter.end(hold, used, now)
