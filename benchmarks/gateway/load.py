"""The load, in a process of its own: python load.py '{"mode": "closed", "url": ..., ...}'. One JSON line on stdout.

closed    `connections` that ask again as soon as they are answered, for `seconds` or until `requests` are done
open      `rate` requests a second for `seconds`, sent whether or not earlier ones are answered
streams   `connections` that read answers of server-sent events, for `seconds` or until `requests` are done
A protocol on bytes: it shares the machine with what it measures.
"""

import asyncio
import json
import sys
import time
from collections import deque
from urllib.parse import urlsplit

import uvloop

TICK_SECONDS = 0.001
PATIENCE_SECONDS = 30.0


class Client(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.rest = b""
        self.need = -1
        """Bytes of body still to come; -1: the head is not here; -2: chunked."""
        self.asked = self.heard = 0.0
        self.status = 0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, at: float) -> None:
        self.asked = at
        self.heard = 0.0
        self.need = -1
        self.rest = b""
        self.waiting = True
        self.transport.write(self.run.message)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.need == -1:
            data = self.rest + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self.rest = data
                return
            self.rest = b""
            head, data = data[:end].lower(), data[end + 4 :]
            self.status = int(head[9:12])
            at = head.find(b"content-length:")
            self.need = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -2
            self.run.first(now - self.asked)
        if self.need == -2:
            if events := data.count(b"data: "):
                self.run.events(events, now - self.heard if self.heard else 0.0)
                self.heard = now
            if b'"error":' in data:
                self.run.num_errors += 1
            tail = self.rest = (self.rest + data)[-5:]
            if tail != b"0\r\n\r\n":
                return
            self.rest = b""
        else:
            self.need -= len(data)
            if self.need > 0:
                return
        self.need = -1
        self.waiting = False
        self.run.answered(self, now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(self)


class Run:
    """What is counted."""

    def __init__(self, spec: dict) -> None:
        self.mode = spec["mode"]
        self.connections = spec["connections"]
        self.seconds = spec.get("seconds", 0.0)
        self.limit = spec.get("requests", 0)
        self.rate = spec.get("rate", 0.0)
        self.stall = spec.get("stall", 0.0)
        self.report = spec.get("report", 0.0)
        url = urlsplit(spec["url"])
        self.host, self.port = url.hostname, url.port
        body = spec["body"].encode()
        headers = {"host": url.netloc, "content-type": "application/json", "content-length": str(len(body)), **spec["headers"]}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.message = f"POST {url.path} HTTP/1.1\r\n{lines}\r\n".encode() + body
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.num_errors = self.num_done = self.num_sent = self.num_events = self.num_stalls = 0
        self.done = asyncio.get_running_loop().create_future()
        self.idle: deque[Client] = deque()
        self.due: deque[float] = deque()
        self.stopping = False
        self.num_lost = 0
        self.replacing: set[asyncio.Task[None]] = set()

    def first(self, seconds: float) -> None:
        if self.mode == "streams":
            self.firsts.append(seconds)

    def events(self, num: int, gap: float) -> None:
        self.num_events += num
        if self.stall:
            self.gaps.append(gap)
            self.num_stalls += gap > self.stall

    def answered(self, client: Client, now: float) -> None:
        self.num_done += 1
        if client.status != 200:
            self.num_errors += 1
        self.latencies.append(now - client.asked)
        if self.mode == "open":
            if self.due:
                client.ask(self.due.popleft())
            else:
                self.idle.append(client)
            self._end_if_done()
        elif self.stopping or (self.limit and self.num_sent >= self.limit):
            self.idle.append(client)
            self._end_if_done()
        else:
            self.num_sent += 1
            client.ask(now)

    def lost(self, client: Client) -> None:
        """A request that was not answered is sent again, and its time runs on: the server may have closed an idle connection."""
        if self.done.done():
            return
        if not client.waiting:
            self.idle.remove(client)
        elif client.need != -1:
            self.num_errors += 1
        self.num_lost += 1
        self.replacing.add(task := asyncio.create_task(self._replace(client)))
        task.add_done_callback(self.replacing.discard)

    async def _replace(self, lost: Client) -> None:
        _, client = await asyncio.get_running_loop().create_connection(lambda: Client(self), self.host, self.port)
        if lost.waiting:
            client.ask(lost.asked)
        else:
            self.idle.append(client)
            self._end_if_done()

    def stop(self) -> None:
        self.stopping = True
        self._end_if_done()

    def _end_if_done(self) -> None:
        ended = self.stopping or (self.limit and self.num_done >= self.limit)
        if ended and len(self.idle) == self.connections and not self.due and not self.done.done():
            self.done.set_result(None)

    async def run(self) -> dict:
        loop = asyncio.get_running_loop()
        clients = [(await loop.create_connection(lambda: Client(self), self.host, self.port))[1] for _ in range(self.connections)]
        began = time.perf_counter()
        if self.mode == "open":
            self.idle.extend(clients)
            sending = asyncio.create_task(self._send(began))
        else:
            sending = None
            for number, client in enumerate(clients):
                self.num_sent += 1
                # streams begin one after the other, as callers do
                loop.call_later(number * self.spread, client.ask, time.perf_counter() + number * self.spread)
            if self.seconds:
                loop.call_later(self.seconds, self.stop)
        reporting = asyncio.create_task(self._tell()) if self.report else None
        try:
            async with asyncio.timeout((self.seconds or 3600) + PATIENCE_SECONDS):
                await self.done
        finally:
            for task in (sending, reporting):
                if task is not None:
                    task.cancel()
        seconds = time.perf_counter() - began
        self.done = loop.create_future()  # connections may end now
        self.done.set_result(None)
        return {
            "requests": self.num_done,
            "errors": self.num_errors,
            "seconds": seconds,
            "rps": self.num_done / seconds,
            "lost_connections": self.num_lost,
            "events": self.num_events,
            "stalls": self.num_stalls,
            "max_gap_ms": max(self.gaps, default=0.0) * 1e3,
            "gap_p99_ms": percentile(self.gaps, 0.99),
            "first_p50_ms": percentile(self.firsts, 0.5),
            "first_p99_ms": percentile(self.firsts, 0.99),
            "p50_ms": percentile(self.latencies, 0.5),
            "p99_ms": percentile(self.latencies, 0.99),
            "cpu_seconds": time.process_time(),
        }

    @property
    def spread(self) -> float:
        return 1.0 / self.connections if self.mode == "streams" else 0.0

    async def _send(self, began: float) -> None:
        """A request waits for a connection only where all are busy; its time counts from when it was due to leave."""
        while (now := time.perf_counter()) < began + self.seconds:
            while self.num_sent < (now - began) * self.rate:
                self.num_sent += 1
                if self.idle:
                    self.idle.popleft().ask(time.perf_counter())
                else:
                    self.due.append(now)
            await asyncio.sleep(TICK_SECONDS)
        self.stop()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self.report)
            print(json.dumps({"requests": self.num_done}), flush=True)


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 if ordered else 0.0


async def main() -> None:
    print(json.dumps(await Run(json.loads(sys.argv[1])).run()))


if __name__ == "__main__":
    uvloop.run(main())
