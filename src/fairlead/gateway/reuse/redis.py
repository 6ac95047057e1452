"""The response cache that several gateways share, in Redis. What goes wrong there is a miss, and is counted.

Values are msgpack, never pickle, and end by themselves when even a degraded request would not take them any more.
"""

import asyncio
import math
import time
from typing import Any

import msgspec
import numpy as np
import structlog

from fairlead.core.errors import ConfigError
from fairlead.core.tensors import DTYPES, datatype_of, decode_bytes, encode_bytes, object_array
from fairlead.gateway.reuse.response_cache import Stored
from fairlead.observe.counts import Counts

log = structlog.get_logger("fairlead.gateway")

PREFIX = b"fairlead:answer:1:"
"""Of keys; another number when the form of the values changes."""
DEADLINE = 0.05
"""Seconds that a request waits for Redis."""
PAUSE = 1.0
"""Seconds in which Redis is not asked after it did not answer."""
MAX_VALUE_BYTES = 16 << 20
MAX_PUTS = 64
"""Answers on their way there; further ones are not stored."""


class RedisResponses:
    def __init__(self, url: str, counts: Counts, *, deadline: float = DEADLINE) -> None:
        """Raises ConfigError."""
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError:
            raise ConfigError("a response cache in Redis needs a package that is not installed: pip install 'fairlead[redis]'") from None
        try:
            self._redis = Redis.from_url(
                url, protocol=2, socket_timeout=deadline, socket_connect_timeout=deadline, retry=Retry(NoBackoff(), 0), max_connections=64
            )
        except ValueError as error:
            raise ConfigError(f"`redis_url` is no URL of a Redis: {error}") from None
        self._counts = counts
        self._deadline = deadline
        self._puts: set[asyncio.Task[None]] = set()
        self._ask_again = 0.0

    async def get(self, key: bytes) -> Stored | None:
        value = await self._ask("get", self._redis.get, PREFIX + key)
        if value is None:
            return None
        try:
            return _decode(value)
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            self._failed("get", error)
            return None

    def put(self, key: bytes, stored: Stored, now: float) -> None:
        """Not waited for."""
        if len(self._puts) >= MAX_PUTS or time.monotonic() < self._ask_again:
            self._counts.add("fairlead_cache_redis_failures_total", "put")
            return
        task = asyncio.get_running_loop().create_task(self._put(key, stored, now))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    async def close(self) -> None:
        """After what is on its way."""
        while self._puts:
            await asyncio.wait(set(self._puts))
        await self._redis.aclose()

    async def _put(self, key: bytes, stored: Stored, now: float) -> None:
        try:
            value = _encode(stored)
        except (TypeError, ValueError, OverflowError) as error:  # a parameter of the model's that has no form
            self._failed("put", error)
            return
        milliseconds = math.ceil((stored.stale_until - now) * 1000)
        if len(value) <= MAX_VALUE_BYTES and milliseconds > 0:
            await self._ask("put", self._redis.set, PREFIX + key, value, None, milliseconds)

    async def _ask(self, what: str, command: Any, *arguments: Any) -> Any:
        """None where there is no answer in time."""
        from redis.exceptions import RedisError

        if time.monotonic() < self._ask_again:
            self._counts.add("fairlead_cache_redis_failures_total", what)
            return None
        try:
            async with asyncio.timeout(self._deadline):
                return await command(*arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._ask_again = time.monotonic() + PAUSE
            self._failed(what, error)
            return None

    def _failed(self, what: str, error: Exception) -> None:
        self._counts.add("fairlead_cache_redis_failures_total", what)
        log.warning("the response cache in Redis failed", what=what, error=f"{type(error).__name__}: {error}")


def _tensor_out(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = encode_bytes(value) if value.dtype.kind == "O" else value.tobytes()
        return datatype_of(value), value.shape, data
    raise TypeError(f"no form for {type(value).__name__}")


def _tensor_in(kind: type, value: Any) -> Any:
    datatype, shape, data = value
    shape = tuple(shape)
    if datatype == "BYTES":
        array = object_array(decode_bytes(memoryview(data)), shape)
    else:
        array = np.frombuffer(data, DTYPES[datatype]).reshape(shape)
    array.flags.writeable = False
    return array


_encode = msgspec.msgpack.Encoder(enc_hook=_tensor_out).encode
_decode = msgspec.msgpack.Decoder(Stored, dec_hook=_tensor_in).decode
