"""How fast it answers while several requests are under way, in turns with the champion."""

import time
from typing import Any

import numpy as np
from msgspec import Struct

from fairlead.control.checks import LatencyRule
from fairlead.control.gates.asking import Driven, drive
from fairlead.control.gates.report import Outcome, Verdict, failed, passed, skipped, unknown
from fairlead.control.gates.trial import ChampionMissing, Trial
from fairlead.core.request import Request
from fairlead.runtime.version import Version

NUM_TURNS = 10
NUM_ALONE = 20
"""Requests one after another, to tell what load adds."""
MIN_REQUESTS = 20


class Times(Struct, frozen=True):
    """Seconds."""

    p50: float
    p99: float


async def latency(trial: Trial) -> Verdict:
    rule = trial.rules.latency
    if rule is None:
        return skipped("checks.yaml has no `latency`")
    compares = rule.p50_ratio is not None or rule.p99_ratio is not None
    if not trial.has_champion and rule.p50 is rule.p99 is None:
        return skipped("there is no champion to compare with")
    requests = trial.questions()
    if not requests:
        return skipped("there is no question: give golden examples, a data set, or `warmup` in model.yaml")
    champion = await trial.champion() if compares and trial.has_champion else None
    verdict = unknown("it was not measured")
    for attempt in range(1, rule.attempts + 1):
        verdict = await _measured(trial, rule, requests, champion)
        verdict.details["attempt"] = attempt
        if verdict.outcome is not Outcome.FAILED:
            break
    return verdict


async def _measured(trial: Trial, rule: LatencyRule, requests: list[Request], champion: Version | None) -> Verdict:
    until = time.perf_counter() + rule.seconds
    seconds = trial.rules.request_seconds
    alone = await drive(trial.candidate, requests, num=NUM_ALONE, concurrency=1, until=until, seconds=seconds)
    if champion is not None:
        await drive(champion, requests, num=NUM_ALONE, concurrency=1, until=until, seconds=seconds)
    mine, theirs = Driven(), Driven()
    sides = [(trial.candidate, mine)] if champion is None else [(trial.candidate, mine), (champion, theirs)]
    for turn in range(NUM_TURNS):
        for version, whole in sides if turn % 2 == 0 else reversed(sides):  # what the machine does meanwhile is shared out
            part = await drive(
                version,
                requests,
                num=max(rule.requests // NUM_TURNS, 1),
                concurrency=rule.concurrency,
                until=until,
                seconds=seconds,
            )
            whole.seconds += part.seconds
            whole.errors += part.errors
            whole.error = whole.error or part.error
    if champion is not None and theirs.errors:
        raise ChampionMissing(f"{theirs.errors} of {theirs.num} requests are not answered by the champion: {theirs.error}")
    if mine.errors:
        return failed(f"{mine.errors} of {mine.num} requests are not answered under load: {mine.error}")
    fewest = min(len(side.seconds) for _, side in sides)
    if fewest < MIN_REQUESTS:
        return unknown(f"{fewest} requests within {rule.seconds:g} s are too few to tell: give more `seconds`")
    return judged(rule, times_of(mine.seconds), times_of(theirs.seconds) if theirs.seconds else None, times_of(alone.seconds), mine.num)


def times_of(seconds: list[float]) -> Times:
    if not seconds:
        return Times(0.0, 0.0)
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    return Times(float(p50), float(p99))


def judged(rule: LatencyRule, mine: Times, theirs: Times | None, alone: Times, num: int) -> Verdict:
    details: dict[str, Any] = {
        "requests": num,
        "concurrency": rule.concurrency,
        "p50": mine.p50,
        "p99": mine.p99,
        "alone_p50": alone.p50,
    }
    wrong = []
    for name, value, limit in (("p50", mine.p50, rule.p50), ("p99", mine.p99, rule.p99)):
        if limit is not None and value > limit:
            wrong.append(f"its {name} is {_ms(value)}, more than {_ms(limit)}")
    if theirs is not None:
        details |= {"champion_p50": theirs.p50, "champion_p99": theirs.p99}
        for name, value, before, ratio in (
            ("p50", mine.p50, theirs.p50, rule.p50_ratio),
            ("p99", mine.p99, theirs.p99, rule.p99_ratio),
        ):
            if ratio is not None and value > ratio * before:
                wrong.append(
                    f"its {name} is {_ms(value)}, {value / before:.2f} times the champion's {_ms(before)}: more than {ratio:g} times"
                )
    under = f"with {rule.concurrency} requests under way"
    if wrong:
        return failed(f"{under}, {'; '.join(wrong)} (alone its p50 is {_ms(alone.p50)})", **details)
    beside = f"; the champion's are {_ms(theirs.p50)} and {_ms(theirs.p99)}" if theirs is not None else ""
    return passed(f"{under}, p50 is {_ms(mine.p50)} and p99 {_ms(mine.p99)}{beside}", **details)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
