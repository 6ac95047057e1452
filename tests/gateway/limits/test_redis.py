"""Limits that several gateways share, in a real Redis, which dies now and then."""

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings

from fairlead.core.errors import ConfigError, LimitExceeded, Unreachable
from fairlead.core.policy import Amounts, Limits, Unit, rules_of
from fairlead.gateway.limits.ledger import NOTHING_HELD, Hold, Limiter
from fairlead.gateway.limits.meter import Standing, Subject, period_end
from fairlead.gateway.limits.redis import LEASE_SECONDS, SharedLimiter
from fairlead.observe.counts import Counts
from tests.gateway.limits.servers import RedisServer
from tests.gateway.limits.traffic import RULES, START, SUBJECTS, events, used_of


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis(server: RedisServer) -> Iterator[RedisServer]:
    server.flush()
    yield server
    server.start()


class Clocked(SharedLimiter):
    """Redis goes by a clock that the test sets."""

    now = START

    def redis_now(self, now: float) -> float:
        return self.now


@asynccontextmanager
async def running(url: str, kind: type[SharedLimiter] = SharedLimiter, **options: Any) -> AsyncIterator[Any]:
    limiter = kind(url, counts=Counts(), **({"deadline": 5.0} | options))
    await limiter.start()
    try:
        yield limiter
    finally:
        await limiter.stop()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def tenant(limits: Limits, name: str = "acme") -> tuple[Subject, ...]:
    return (Subject(f"tenant:{name}", rules_of(limits)),)


def tokens(number: float) -> Amounts:
    return {Unit.REQUESTS: 1.0, Unit.TOKENS: number}


def shared(limiter: SharedLimiter) -> bool:
    """Whether it would ask Redis."""
    try:
        return limiter.hold(tenant({"concurrent": 100}, "probe"), {}, time.time()) is None
    except Unreachable:
        return False


async def standing(limiter: SharedLimiter, subjects: tuple[Subject, ...]) -> Standing:
    (found,) = await limiter.standing(subjects, time.time())
    return found


# Sharing


async def test_two_gateways_share_one_limit(redis):
    acme = tenant({"tokens_per_day": 1000, "concurrent": 3})
    async with running(redis.url) as one, running(redis.url) as other:
        first = await one.ask(acme, tokens(600), time.time())
        with pytest.raises(LimitExceeded) as caught:
            await other.ask(acme, tokens(600), time.time())
        assert caught.value.reason == "budget-tokens"
        assert "RateLimit" in caught.value.headers
        assert '"tenant-tokens_per_day";r=400' in first.headers["RateLimit"]
        first.settle(tokens(100), time.time())
        first.settle(tokens(100), time.time())
        assert [each.spent for each in await one.standing(acme, time.time())] == [100, 0]
        second = await other.ask(acme, tokens(600), time.time())
        second.release(time.time())
        assert [each.spent + each.held for each in await other.standing(acme, time.time())] == [100, 0]


async def test_requests_without_rules_never_touch_redis(redis):
    async with running(redis.url) as limiter:
        free = (Subject("tenant:acme", ()), Subject("model:m", ()))
        assert limiter.hold(free, tokens(1), time.time()) is NOTHING_HELD
        assert await limiter.ask(free, tokens(1), time.time()) is NOTHING_HELD
        assert limiter.hold(tenant({"concurrent": 1}), tokens(1), time.time()) is None


async def test_budgets_restored_at_start_only_ever_rise(redis):
    acme = tenant({"tokens_per_month": 1000})
    async with running(redis.url) as one, running(redis.url) as other:
        await one.restore("tenant:acme", Unit.TOKENS, "month", 700, time.time())
        await other.restore("tenant:acme", Unit.TOKENS, "month", 600, time.time())
        assert (await standing(other, acme)).spent == 700
        with pytest.raises(LimitExceeded):
            await other.ask(acme, tokens(301), time.time())


async def test_a_client_that_leaves_while_redis_is_asked_holds_nothing(redis):
    acme = tenant({"concurrent": 1})
    async with running(redis.url) as limiter:
        leaving = asyncio.create_task(limiter.ask(acme, tokens(1), time.time()))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (await standing(limiter, acme)).held == 0


async def test_a_hold_that_everybody_forgot_comes_back(redis):
    acme = tenant({"concurrent": 1})
    async with running(redis.url) as limiter:
        forgotten = await limiter.ask(acme, tokens(1), time.time())
        del forgotten
        await limiter.renew()
        assert (await standing(limiter, acme)).held == 0


# The same arithmetic


@settings(max_examples=60, deadline=None)
@given(events)
def test_redis_and_memory_agree(server, happening):
    server.flush()
    asyncio.run(both(server.url, happening))


async def both(url, happening):
    memory = Limiter()
    async with running(url, Clocked, lease_seconds=1e9) as limiter:
        open: list[tuple[Hold, Hold, Amounts]] = []
        for event in happening:
            if event.what == "wait":
                limiter.now += event.seconds
            elif event.what == "hold":
                ours = await tried(memory.ask(SUBJECTS, event.amounts, limiter.now))
                theirs = await tried(limiter.ask(SUBJECTS, event.amounts, limiter.now))
                assert told(ours) == told(theirs)
                if isinstance(ours, Hold) and isinstance(theirs, Hold):
                    assert ours.headers == theirs.headers
                    open.append((ours, theirs, event.amounts))
            elif open:
                ours, theirs, amounts = open.pop(event.index % len(open))
                for each in (ours, theirs):
                    if event.what == "settle":
                        each.settle(used_of(event, amounts), limiter.now)
                    else:
                        each.release(limiter.now)
            ours, theirs = memory.standings(SUBJECTS, limiter.now), await limiter.standing(SUBJECTS, limiter.now)
            for left, right in zip(ours, theirs, strict=True):
                assert (left.rule, left.until) == (right.rule, right.until)
                assert (left.spent, left.held) == (pytest.approx(right.spent, abs=1e-6), pytest.approx(right.held, abs=1e-6)), (
                    left.rule.name
                )


async def tried(asking: Awaitable[Hold]) -> Hold | LimitExceeded:
    try:
        return await asking
    except LimitExceeded as e:
        return e


def told(outcome: Hold | LimitExceeded) -> tuple[object, ...]:
    if isinstance(outcome, Hold):
        return ()
    return outcome.message, outcome.reason, round(outcome.retry_after, 3)


async def test_redis_knows_the_calendar(redis):
    month, day = tenant({"tokens_per_month": 10}), tenant({"tokens_per_day": 10})
    moments = [datetime(year, month, 1, tzinfo=UTC) for year in (1999, 2000, 2024, 2026, 2100, 2399, 2400) for month in range(1, 13)]
    moments += [each - timedelta(seconds=1) for each in moments] + [each + timedelta(days=27.5) for each in moments]
    async with running(redis.url, Clocked, lease_seconds=1e12) as limiter:
        for moment in moments:
            limiter.now = moment.timestamp()
            assert (await standing(limiter, month)).until == period_end("month", limiter.now), moment
            assert (await standing(limiter, day)).until == period_end("day", limiter.now), moment


async def test_rules_that_change_under_way_keep_what_was_counted(redis):
    async with running(redis.url, Clocked) as limiter:
        hold = await limiter.ask(tenant({"tokens_per_minute": 1000, "tokens_per_day": 5000}), tokens(600), START)
        raised = tenant({"tokens_per_minute": 2000, "tokens_per_day": 5000, "concurrent": 3})
        assert [each.remaining for each in await limiter.standing(raised, START)] == [1400, 4400, 3]
        hold.settle(tokens(600), START)
        lowered = tenant({"tokens_per_minute": 100, "tokens_per_day": 500})
        assert [each.spent for each in await limiter.standing(lowered, START)] == [100, 600]


async def test_many_requests_at_once_with_crashes_overdraw_nothing_and_leave_nothing(redis):
    """Clients leave, connections break between hold and settle, holds are forgotten: two gateways, one truth."""
    subjects = (Subject("tenant:acme", RULES), Subject("model:m", rules_of({"tokens_per_day": 3000, "concurrent": 3})))
    chance = random.Random(7)
    spent = 0.0

    async def request(limiter: Clocked) -> None:
        nonlocal spent
        needed = chance.choice([10.0, 100.0, 300.0])
        asking = asyncio.create_task(limiter.ask(subjects, tokens(needed), START))
        if chance.random() < 0.1:
            await asyncio.sleep(0)
            asking.cancel()
        try:
            hold = await asking
        except (LimitExceeded, asyncio.CancelledError):
            return
        if hold.headers and isinstance(hold, Hold) and chance.random() < 0.1 and limiter._line is not None:
            limiter._line.give_up("cut by the test")
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if type(hold).__name__ != "SharedHold":  # made alone while the connection was cut
            hold.release(START)
        elif chance.random() < 0.7:
            used = needed * chance.choice([0.1, 0.5, 1.0])
            spent += used
            hold.settle(tokens(used), START)
        elif chance.random() < 0.5:
            hold.release(START)
        del hold

    async with running(redis.url, Clocked) as one, running(redis.url, Clocked) as other:
        for _ in range(12):
            one.now = other.now = one.now + 20
            await asyncio.gather(*(request(limiter) for limiter in (one, other) for _ in range(10)))
            await until(lambda: shared(one) and shared(other))
            for each in await one.standing(subjects, START):
                assert each.spent + each.held <= each.rule.amount + 1e-6, each.rule.name
        one.now = other.now = one.now + 2 * LEASE_SECONDS
        await one.renew()
        await other.renew()
        await one.renew()
        standings = await other.standing(subjects, START)
        assert [(each.rule.name, each.held) for each in standings if each.held] == []
        assert [each.spent for each in standings if each.rule.name == "tokens_per_day"] == [pytest.approx(spent)] * 2


# Who dies


DYING = """
import asyncio, sys, time
from fairlead.core.policy import Unit, rules_of
from fairlead.gateway.limits.meter import Subject
from fairlead.gateway.limits.redis import SharedLimiter
from fairlead.observe.counts import Counts

async def main():
    limiter = SharedLimiter(sys.argv[1], counts=Counts(), deadline=5.0, lease_seconds=0.5)
    await limiter.start()
    acme = (Subject("tenant:acme", rules_of({"concurrent": 1, "tokens_per_day": 1000})),)
    hold = await limiter.ask(acme, {Unit.TOKENS: 600.0}, time.time())
    print("holding", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_what_a_killed_gateway_held_comes_back_when_its_lease_ends(redis):
    acme = tenant({"concurrent": 1, "tokens_per_day": 1000})
    dying = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING, redis.url, stdout=subprocess.PIPE)
    try:
        assert dying.stdout is not None
        assert await dying.stdout.readline() == b"holding\n"
        async with running(redis.url, lease_seconds=0.2) as limiter:
            with pytest.raises(LimitExceeded):
                await limiter.ask(acme, tokens(600), time.time())
            dying.kill()
            async with asyncio.timeout(20):
                while [each.held for each in await limiter.standing(acme, time.time())] != [0, 0]:
                    await asyncio.sleep(0.02)
            (await limiter.ask(acme, tokens(600), time.time())).release(time.time())
    finally:
        with contextlib.suppress(ProcessLookupError):
            dying.kill()
        await dying.communicate()


async def test_a_gateway_that_was_taken_for_dead_still_settles_and_only_once(redis):
    acme = tenant({"tokens_per_day": 1000})
    async with running(redis.url, Clocked) as slept, running(redis.url, Clocked) as other:
        hold = await slept.ask(acme, tokens(600), START)
        slept.now = other.now = START + LEASE_SECONDS + 1
        assert await other.renew() == 1
        assert (await standing(other, acme)).held == 0
        hold.settle(tokens(400), START)
        await slept.renew()
        assert await other.renew() == 0
        assert (await standing(other, acme)).spent == 400


async def test_a_long_request_keeps_its_lease(redis):
    acme = tenant({"concurrent": 1})
    async with running(redis.url, Clocked) as one, running(redis.url, Clocked) as other:
        hold = await one.ask(acme, tokens(1), START)
        for _ in range(10):
            one.now = other.now = one.now + LEASE_SECONDS / 2
            await one.renew()
            assert await other.renew() == 0
        assert (await standing(other, acme)).held == 1
        hold.release(START)


async def test_redis_gone_limits_are_local_and_shared_again_when_it_is_back(redis):
    acme = tenant({"requests_per_hour": 2, "tokens_per_month": 1000})
    async with running(redis.url) as limiter:
        before = await limiter.ask(acme, tokens(400), time.time())
        before.settle(tokens(400), time.time())
        under_way = await limiter.ask(acme, tokens(100), time.time())
        with pytest.raises(LimitExceeded):
            await limiter.ask(acme, tokens(100), time.time())

        redis.kill()
        alone = await limiter.ask(acme, tokens(100), time.time())
        assert not shared(limiter)
        now_at_once = limiter.hold(acme, tokens(100), time.time())
        assert now_at_once is not None
        with pytest.raises(LimitExceeded):  # limits hold here too, of this process alone
            limiter.hold(acme, tokens(100), time.time())
        alone.settle(tokens(100), time.time())
        now_at_once.settle(tokens(100), time.time())
        under_way.settle(tokens(100), time.time())
        with pytest.raises(LimitExceeded) as caught:  # and what was known to be spent of a budget is
            limiter.hold(tenant({"tokens_per_month": 1000}), tokens(500), time.time())
        assert caught.value.reason == "budget-tokens"
        await until(lambda: limiter._counts.get("fairlead_limits_redis_outages_total") == 1)
        assert limiter._counts.get("fairlead_limits_local_holds_total") >= 4

        redis.start()
        await until(lambda: shared(limiter))
        # Redis lost everything: budgets are as this gateway knew them.
        month = await standing(limiter, tenant({"tokens_per_month": 1000}))
        assert month.spent == 600
        assert limiter._counts.get("fairlead_limits_redis_outages_total") == 1


async def test_redis_gone_requests_with_limits_are_refused_where_the_policy_says_so(redis):
    acme = tenant({"concurrent": 2})
    async with running(redis.url, gone="refuse") as limiter:
        hold = await limiter.ask(acme, tokens(1), time.time())
        redis.kill()
        with pytest.raises(Unreachable) as caught:
            await limiter.ask(acme, tokens(1), time.time())
        assert caught.value.reason == "limits-unreachable"
        with pytest.raises(Unreachable):
            limiter.hold(acme, tokens(1), time.time())
        assert limiter.hold((Subject("tenant:free", ()),), tokens(1), time.time()) is NOTHING_HELD
        hold.release(time.time())
        redis.start()
        await until(lambda: shared(limiter))
        (await limiter.ask(acme, tokens(1), time.time())).release(time.time())


async def test_redis_that_hangs_costs_one_deadline_and_what_it_does_later_comes_back(redis):
    acme = tenant({"concurrent": 5})
    async with running(redis.url, Clocked, deadline=0.1) as limiter, running(redis.url, Clocked) as other:
        redis.freeze()
        try:
            holds = await asyncio.gather(*(limiter.ask(acme, tokens(1), time.time()) for _ in range(5)))
            assert not shared(limiter)
        finally:
            redis.thaw()
        await until(lambda: shared(limiter) and shared(other))
        for hold in holds:
            hold.release(time.time())
        limiter.now = other.now = START + LEASE_SECONDS + 1
        await limiter.renew()
        await other.renew()
        assert (await standing(other, acme)).held == 0


async def test_settles_survive_a_restart_of_the_connection_and_none_counts_twice(redis):
    acme = tenant({"tokens_per_day": 1000})
    async with running(redis.url) as limiter:
        hold = await limiter.ask(acme, tokens(600), time.time())
        line = limiter._line
        hold.settle(tokens(500), time.time())
        await asyncio.sleep(0.01)  # may have arrived, may not
        line.give_up("cut by the test")
        await until(lambda: limiter._line not in (None, line))
        assert (await standing(limiter, acme)).spent == 500


async def test_a_redis_that_lost_the_script_is_given_it_again(redis):
    acme = tenant({"concurrent": 5})
    async with running(redis.url) as limiter:
        import redis.asyncio as client

        async with client.Redis.from_url(redis.url) as admin:
            await admin.script_flush()
        (await limiter.ask(acme, tokens(1), time.time())).release(time.time())  # alone
        await until(lambda: shared(limiter))
        (await limiter.ask(acme, tokens(1), time.time())).release(time.time())


async def test_no_redis_at_start_is_no_reason_not_to_start():
    async with running("redis://127.0.0.1:1/0") as limiter:
        hold = await limiter.ask(tenant({"concurrent": 1}), tokens(1), time.time())
        assert hold.headers["RateLimit"] == '"tenant-concurrent";r=0'
        hold.release(time.time())


async def test_stopping_sends_what_is_unsent(redis):
    acme = tenant({"tokens_per_day": 1000})
    async with running(redis.url) as watching:
        async with running(redis.url) as limiter:
            (await limiter.ask(acme, tokens(600), time.time())).settle(tokens(500), time.time())
        assert (await standing(watching, acme)).spent == 500


def test_a_url_that_is_none_is_a_config_error():
    with pytest.raises(ConfigError, match="redis_url"):
        SharedLimiter("http://127.0.0.1", counts=Counts())


async def test_redis_keeps_nothing_of_who_has_nothing_to_remember(redis):
    import redis.asyncio as client

    async with running(redis.url) as limiter, client.Redis.from_url(redis.url) as admin:
        for number in range(50):
            hold = await limiter.ask(tenant({"concurrent": 2, "tokens_per_second": 1e6}, f"t{number}"), tokens(1), time.time())
            hold.settle(tokens(0), time.time())
        await limiter.renew()
        assert [key for key in await admin.keys("fairlead:limits:*") if b":of:" in key or b":holds:" in key] == []
        (await limiter.ask(tenant({"tokens_per_minute": 60}), tokens(10), time.time())).settle(tokens(10), time.time())
        await limiter.renew()
        (key,) = await admin.keys("fairlead:limits:of:*")
        assert 10 < await admin.ttl(key) < 120
