"""What was spent of this day's and this month's budgets before the server started, as the usage records say."""

import asyncio
import calendar
import time
from collections import defaultdict
from collections.abc import Collection, Iterator

from fairlead.core.policy import Unit
from fairlead.gateway.limits.ledger import AnyLimiter
from fairlead.store.rows import Dimension, UsageQuery, UsageSum
from fairlead.store.store import Store

SETTLED = ("success", "cancelled")
"""Outcomes of requests that used what was held for them; the others gave it back."""
SUBJECTS = {
    "tenant:{}": (Dimension.TENANT,),
    "project:{}/{}": (Dimension.TENANT, Dimension.PROJECT),
    "key:{}": (Dimension.KEY,),
    "model:{}": (Dimension.MODEL,),
}


async def restore(limits: AnyLimiter, store: Store, budgets: Collection[tuple[Unit, str]], now: float) -> None:
    """`budgets`: (unit, window) of every one that anybody has. Raises Unavailable."""
    today = time.gmtime(now)
    starts = {"month": calendar.timegm((today.tm_year, today.tm_mon, 1, 0, 0, 0)), "day": int(now // 86400) * 86400}
    for window, since in starts.items():
        if not any(budget == window for _, budget in budgets):
            continue
        for name, by in SUBJECTS.items():
            spent: defaultdict[tuple[str, Unit], float] = defaultdict(float)
            for total in await asyncio.to_thread(store.usage, UsageQuery(since=since), (*by, Dimension.OUTCOME)):
                *group, outcome = total.group
                if outcome in SETTLED:
                    for unit, amount in _amounts(total):
                        if (unit, window) in budgets:
                            spent[name.format(*group), unit] += amount
            for (subject, unit), amount in spent.items():
                await limits.restore(subject, unit, window, amount, now)


def _amounts(total: UsageSum) -> Iterator[tuple[Unit, float]]:
    yield Unit.REQUESTS, total.requests
    yield Unit.TOKENS, total.input_tokens + total.output_tokens
    yield Unit.INPUT_TOKENS, total.input_tokens
    yield Unit.OUTPUT_TOKENS, total.output_tokens
    yield Unit.ROWS, total.rows
    yield Unit.MEGAPIXELS, total.megapixels
    yield Unit.COMPUTE_SECONDS, total.compute_seconds
    yield Unit.MONEY, total.cost
