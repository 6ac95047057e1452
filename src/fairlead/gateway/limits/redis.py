"""Limits that several gateways share, in Redis: `limits.lua` does the arithmetic, one EVALSHA a hold.

All commands share one connection and are answered in order. Holds wait for their answer, but not long. Settles and
releases do not: they are sent again after a broken connection, which does no harm because each hold ends only once.

Each connection takes a lease, renewed as long as one of its holds is open. Where a gateway dies, or a connection breaks
with holds whose answer never came, the lease ends and whoever renews next gives back what it held.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Sequence
from hashlib import sha1
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog

from fairlead.core.errors import ConfigError, Unreachable
from fairlead.core.policy import Amounts, Unit
from fairlead.gateway.limits.headers import headers_of, refusal
from fairlead.gateway.limits.ledger import NOTHING_HELD, Hold, Limiter
from fairlead.gateway.limits.meter import NEVER, Standing, Subject, at_once
from fairlead.observe.counts import Counts

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger("fairlead.gateway")

SCRIPT = Path(__file__).with_name("limits.lua").read_bytes()
DIGEST = sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
CONNECT_SECONDS = 1.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds between two tries to connect: the first, doubled up to the longest."""
LEASE_SECONDS = 15.0
FLUSH_SECONDS = 2.0
"""How long `stop` waits for settles to arrive."""
MAX_UNSENT = 10_000
"""Settles and releases that wait for Redis to come back."""
MAX_TRIES = 3
"""How often a settle is sent that Redis answers with an error."""

_encode = msgspec.msgpack.Encoder().encode
_decode_rows = msgspec.msgpack.Decoder(tuple[bool, float, list[tuple[float, float, float]]]).decode


class Gone(Exception):
    """Redis does not answer, or not as it should."""


class Command(msgspec.Struct):
    what: str
    input: dict[str, Any]
    answer: asyncio.Future[bytes] | None = None
    """None: nobody waits, and it is sent again after a failure."""
    num_tries: int = 0


class Line:
    """One connection, on which any number of commands are under way."""

    def __init__(self, connection: "AbstractConnection", gateway: str) -> None:
        self.gateway = gateway
        self.commands: deque[Command] = deque()
        """Sent or to be sent, not answered: in order."""
        self.alive = True
        self._connection = connection
        self._unsent: list[Command] = []
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        self._why = Gone("closed")

    def send(self, command: Command) -> None:
        self.commands.append(command)
        self._unsent.append(command)
        self._wake.set()

    async def ended(self) -> Gone:
        """Waits for its end; commands that have no answer are in `commands`."""
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.alive = False
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await self._connection.disconnect(nowait=True)
            for command in self.commands:
                if command.answer is not None and not command.answer.done():
                    command.answer.set_exception(self._why)
                    command.answer.exception()  # marks it as seen: whoever asked may have left
        for result in results:
            if isinstance(result, Exception):
                return Gone(f"{type(result).__name__}: {result}")
        return self._why

    def give_up(self, why: str) -> None:
        self.alive = False
        self._why = Gone(why)
        for task in self._tasks:
            task.cancel()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            packed = [_packed(command.what.encode(), _encode(command.input)) for command in self._unsent]
            self._unsent.clear()
            await self._connection.send_packed_command(packed, check_health=False)

    async def _read(self) -> None:
        from redis.exceptions import ResponseError

        while True:
            try:
                answer = await self._connection.read_response(disable_decoding=True, timeout=math.inf)
            except ResponseError:
                # Busy, loading, out of memory, without the script: whatever it is, it does not count limits now.
                self.commands[0].num_tries += 1
                raise
            command = self.commands.popleft()
            if command.answer is not None and not command.answer.done():
                command.answer.set_result(answer)


def _packed(what: bytes, argument: bytes) -> bytes:
    return b"*5\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n0\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (DIGEST, len(what), what, len(argument), argument)


class SharedHold(Hold):
    __slots__ = ("_gateway", "_id", "_limiter", "_open", "_standings")

    def __init__(self, limiter: "SharedLimiter", gateway: str, id: str, standings: list[Standing]) -> None:
        self._limiter = limiter
        self._gateway = gateway
        self._id = id
        self._standings = standings
        self._open = True

    @property
    def headers(self) -> dict[str, str]:
        return headers_of(self._standings, self._standings[0].now)

    def settle(self, used: Amounts, now: float) -> None:
        if self._open:
            self._open = False
            self._limiter.end(self._gateway, self._id, used, now)

    def release(self, now: float) -> None:
        if self._open:
            self._open = False
            self._limiter.end(self._gateway, self._id, None, now)

    def __del__(self) -> None:
        # Whoever held it is gone without a word. The garbage collector may say so in any thread.
        if self._open:
            self._limiter.dropped.append((self._gateway, self._id))


class SharedLimiter:
    """AnyLimiter, in Redis."""

    def __init__(
        self,
        url: str,
        *,
        counts: Counts,
        gone: Literal["local", "refuse"] = "local",
        deadline: float = 0.1,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        try:
            from redis.asyncio.connection import ConnectionPool
        except ImportError:
            raise ConfigError("limits in Redis need a package that is not installed: pip install 'fairlead[redis]'") from None
        try:
            # Not for its pool: it makes connections as the URL says.
            self._pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, socket_connect_timeout=CONNECT_SECONDS)
        except ValueError as e:
            raise ConfigError(f"`redis_url` is no URL of a Redis: {e}") from None
        self.local = Limiter()
        """Counts while Redis is gone, and remembers what of budgets is spent."""
        self.dropped: deque[tuple[str, str]] = deque()
        """Holds that were neither settled nor released, to be released with the next hold or renewal."""
        self._counts = counts
        self._gone: Literal["local", "refuse"] = gone
        self._deadline = deadline
        self._lease_seconds = lease_seconds
        self._name = secrets.token_hex(8)
        self._ids = count()
        self._last_line: Line | None = None
        self._num_open: Counter[str] = Counter()
        """Holds under way, by the connection on which they were made."""
        self._unsent: deque[Command] = deque()
        self._told_gone = False
        self._task: asyncio.Task[None] | None = None
        self._first_try = asyncio.Event()

    # The life of the connection

    @property
    def _line(self) -> Line | None:
        """None while Redis is gone."""
        line = self._last_line
        return line if line is not None and line.alive else None

    async def start(self) -> None:
        """Returns when Redis has answered, or has not."""
        self._task = asyncio.create_task(self._keep())
        await self._first_try.wait()

    async def stop(self) -> None:
        """Sends what is unsent, as far as Redis takes it in a short time."""
        self._release_dropped()
        with contextlib.suppress(TimeoutError, Gone):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self.renew()  # answered after all that was sent before
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._unsent:
            self._counts.add("fairlead_limits_lost_settles_total", by=len(self._unsent))

    async def _keep(self) -> None:
        from redis.exceptions import RedisError

        pause = FIRST_PAUSE
        for number in count():
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    line = await self._connect(f"{self._name}-{number}")
            except (OSError, RedisError, TimeoutError, ValueError) as e:
                self._tell_gone(f"{type(e).__name__}: {e}")
            else:
                pause = FIRST_PAUSE
                try:
                    self._take(line)
                    why = await self._use(line)
                finally:
                    self._keep_unanswered(line)
                self._tell_gone(str(why))
            self._first_try.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _connect(self, gateway: str) -> Line:
        connection: Any = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
            await connection.send_command("SCRIPT", "LOAD", SCRIPT)
            await connection.read_response(disable_decoding=True)
            # Full, read-only or loading: one that cannot run the script is not there.
            lease = {"now": self.redis_now(time.time()), "lease": self._lease_seconds, "gateways": [gateway]}
            await connection.send_packed_command([_packed(b"renew", _encode(lease))], check_health=False)
            await connection.read_response(disable_decoding=True)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Line(connection, gateway)

    def _take(self, line: Line) -> None:
        if self._told_gone:
            self._told_gone = False
            log.info("Redis is back: limits are shared again")
        now = time.time()
        for subject, unit, window, spent in self.local.budgets(now):
            line.send(self._restoring(subject, unit, window, spent, now))
        for command in self._unsent:
            line.send(command)
        self._unsent.clear()
        self._last_line = line
        self._first_try.set()

    async def _use(self, line: Line) -> Gone:
        renewing = asyncio.create_task(self._keep_leases(line))
        try:
            return await line.ended()
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _keep_leases(self, line: Line) -> None:
        while True:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self.renew()
            except (TimeoutError, Gone):
                line.give_up(f"no answer in {CONNECT_SECONDS:g} s")
                return
            await asyncio.sleep(self._lease_seconds / 3)

    async def renew(self) -> int:
        """Keeps this gateway's holds, and takes back what gateways held that are gone: so many holds."""
        self._release_dropped()
        if self._line is None:
            raise Gone
        gateways = [*{self._line.gateway, *self._num_open}]
        input = {"now": self.redis_now(time.time()), "lease": self._lease_seconds, "gateways": gateways}
        return msgspec.msgpack.decode(await self._answer("renew", self._line, input), type=int)

    def _keep_unanswered(self, line: Line) -> None:
        for command in line.commands:
            if command.answer is None:
                self._later(command)

    def _later(self, command: Command) -> None:
        if command.num_tries >= MAX_TRIES or len(self._unsent) >= MAX_UNSENT:
            self._counts.add("fairlead_limits_lost_settles_total")
        else:
            self._unsent.append(command)

    def _tell_gone(self, why: str) -> None:
        if not self._told_gone:
            self._told_gone = True
            self._counts.add("fairlead_limits_redis_outages_total")
            what = "counted in this process alone" if self._gone == "local" else "not counted, and requests that have some are refused"
            log.warning(f"Redis does not answer: until it does, limits are {what}", error=why)

    # Holding

    def redis_now(self, now: float) -> float:
        """0: Redis goes by its own clock, because those of several gateways differ."""
        return 0.0

    def hold(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold | None:
        if not any(subject.rules for subject in subjects):
            return NOTHING_HELD
        return self._hold_alone(subjects, amounts, now) if self._line is None else None

    def _hold_alone(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold:
        if self._gone == "refuse":
            raise unreachable()
        self._counts.add("fairlead_limits_local_holds_total")
        return self.local.hold(subjects, amounts, now)

    async def ask(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> Hold:
        self._release_dropped()
        line = self._line
        if line is None or not any(subject.rules for subject in subjects):
            hold = self.hold(subjects, amounts, now)
            assert hold is not None
            return hold
        id = str(next(self._ids))
        self._num_open[line.gateway] += 1
        try:
            answer = await self._answer_soon("hold", line, self._asking(subjects, amounts, now) | {"gateway": line.gateway, "id": id})
        except Gone:
            self.end(line.gateway, id, None, now)
            return self._hold_alone(subjects, amounts, now)
        except BaseException:
            self.end(line.gateway, id, None, now)
            raise
        fits, standings = _read(answer, subjects)
        if not fits:
            self._closed(line.gateway)
            error = refusal(standings, amounts)
            assert error is not None
            raise error
        self._learn(standings, now)
        return SharedHold(self, line.gateway, id, standings)

    def _asking(self, subjects: Sequence[Subject], amounts: Amounts, now: float) -> dict[str, Any]:
        named = []
        for subject in subjects:
            rules = []
            for rule in subject.rules:
                needed = at_once(amounts) if rule.unit is None else amounts.get(rule.unit, -1.0)
                rules.append((rule.name, rule.window, rule.amount, rule.unit or "", needed))
            if rules:
                named.append((subject.name, rules))
        return {"now": self.redis_now(now), "lease": self._lease_seconds, "subjects": named}

    async def _answer_soon(self, what: str, line: Line, input: dict[str, Any]) -> bytes:
        try:
            async with asyncio.timeout(self._deadline):
                return await self._answer(what, line, input)
        except TimeoutError:
            line.give_up(f"no answer in {self._deadline:g} s")  # later requests do not wait as this one did
            raise Gone from None

    async def _answer(self, what: str, line: Line, input: dict[str, Any]) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        line.send(Command(what, input, answer))
        return await answer

    def _learn(self, standings: list[Standing], now: float) -> None:
        for standing in standings:
            if standing.until != NEVER and standing.spent:
                assert standing.rule.unit is not None
                self.local.remember(standing.subject, standing.rule.unit, standing.rule.window, standing.spent, now)

    def end(self, gateway: str, id: str, used: Amounts | None, now: float) -> None:
        """Of a hold; None: released. Nobody waits for it."""
        self._closed(gateway)
        command = Command("settle", {"now": self.redis_now(now), "gateway": gateway, "id": id, "used": used})
        if self._line is not None:
            self._line.send(command)
        else:
            self._later(command)

    def _closed(self, gateway: str) -> None:
        self._num_open[gateway] -= 1
        if not self._num_open[gateway]:
            del self._num_open[gateway]

    def _release_dropped(self) -> None:
        while self.dropped:
            gateway, id = self.dropped.popleft()
            self.end(gateway, id, None, time.time())

    # Beside the requests' path

    async def standing(self, subjects: Sequence[Subject], now: float) -> list[Standing]:
        if self._line is not None:
            with contextlib.suppress(Gone):
                return _read(await self._answer_soon("standing", self._line, self._asking(subjects, {}, now)), subjects)[1]
        return self.local.standings(subjects, now)

    async def restore(self, subject: str, unit: Unit, window: str, spent: float, now: float) -> None:
        self.local.remember(subject, unit, window, spent, now)
        if self._line is not None:
            self._line.send(self._restoring(subject, unit, window, spent, now))

    def _restoring(self, subject: str, unit: Unit, window: str, spent: float, now: float) -> Command:
        rule = f"{unit}_per_{window}"
        return Command("restore", {"now": self.redis_now(now), "subject": subject, "rule": rule, "window": window, "spent": spent})


def _read(answer: bytes, subjects: Sequence[Subject]) -> tuple[bool, list[Standing]]:
    fits, now, rows = _decode_rows(answer)
    rules = [(subject.name, rule) for subject in subjects for rule in subject.rules]
    return fits, [
        Standing(name, rule, spent, held, until or NEVER, now) for (name, rule), (spent, held, until) in zip(rules, rows, strict=True)
    ]


def unreachable() -> Unreachable:
    return Unreachable("limits cannot be counted now: try again later", reason="limits-unreachable")
