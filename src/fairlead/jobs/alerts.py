"""Calls that tell of alerts: one line for each receiver, in order, tried again by a schedule, given up after its end.

Receivers are the operator's, but what a name leads to is checked as for the webhooks of jobs (`webhooks.allow`).
"""

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec
import structlog
from msgspec import Struct, structs

from fairlead import __version__
from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.policy import WebhookSettings
from fairlead.core.slo import AlertSettings, AlertWebhook
from fairlead.jobs.addresses import check_url
from fairlead.jobs.calls import Answer, Calls
from fairlead.jobs.webhooks import next_try, signatures
from fairlead.observe.counts import Counts
from fairlead.observe.slo.board import Alert

MAX_WAITING = 100
"""Calls to one receiver; of more the oldest are dropped."""
MAX_KEY = 255
"""Of PagerDuty's `dedup_key`, which refuses longer ones."""
CALLS = "fairlead_alert_calls_total"

log = structlog.get_logger("fairlead.alerts")


class Call(Struct):
    alert: Alert
    id: str
    """Its receiver sees the same at each try."""
    tries: int = 0
    due: float = 0.0


class AlertCalls:
    """Lives in the event loop."""

    def __init__(
        self,
        settings: AlertSettings,
        webhooks: WebhookSettings,
        counts: Counts,
        *,
        runbook: Callable[[str], str],
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`webhooks.enabled` is about those that tenants name. Raises ConfigError for a URL that may not be called."""
        self.settings = settings
        rules = structs.replace(webhooks, enabled=True, timeout=settings.timeout)
        for number, receiver in enumerate(settings.webhooks):
            try:
                check_url(receiver.url, rules, f"alerts.webhooks[{number}].url")
            except InvalidRequest as error:
                advice = (
                    "; `webhooks.allow` names networks of yours that may be called all the same" if "its address" in error.message else ""
                )
                raise ConfigError(error.message + advice) from None
        self.runbook = runbook
        self.wall = wall
        self.now = now
        self.chance = chance
        self.calls = Calls(rules, wall)
        self.lines = [Line(receiver) for receiver in settings.webhooks]
        self._counts = counts
        self._tasks: list[asyncio.Task[None]] = []

    def tell(self, alerts: Sequence[Alert]) -> None:
        """Never waits."""
        for alert in alerts:
            for line in self.lines:
                if alert.severity in line.receiver.severities:
                    if len(line.waiting) >= MAX_WAITING:
                        line.waiting.popleft()
                        self._counts.add(CALLS, "dropped")
                    line.waiting.append(Call(alert, f"alert_{alert.id}_{alert.state}"))
                    line.news.set()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(line), name="alerts") for line in self.lines]

    async def stop(self, seconds: float) -> None:
        """What is due now may still be called; the rest is lost, and the log says so."""
        deadline = self.now() + seconds
        for line in self.lines:
            line.stopping = True
            line.news.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(deadline - self.now(), 0.0))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.calls.close()
        left = sum(len(line.waiting) for line in self.lines)
        if left:
            log.warning("alerts_not_told", calls=left)

    async def _run(self, line: "Line") -> None:
        while not (line.stopping and not line.due(self.now())):
            line.news.clear()
            call = line.next()
            wait = None if call is None else call.due - self.now()
            if call is None or (wait is not None and wait > 0):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await line.news.wait()
                continue
            try:
                await self.try_one(line, call)
            except Exception:
                log.exception("alert_call_failed", receiver=line.place)
                self._over(line, call, "failed")

    async def try_one(self, line: "Line", call: Call) -> None:
        receiver = line.receiver
        body = msgspec.json.encode(self._body(receiver, call.alert))
        answer = await self.calls.post(receiver.url, body, self._headers(receiver, call, body))
        call.tries += 1
        if answer.taken:
            self._over(line, call, "delivered")
            return
        due = next_try(answer, tries=call.tries, retries=self.settings.retries, now=self.now(), chance=self.chance())
        if due is None:
            log.error("alert_not_told", receiver=line.place, alert=call.alert.name, state=call.alert.state, error=_why(answer))
            self._over(line, call, "failed")
        else:
            call.due = due
            self._counts.add(CALLS, "retried")

    def _over(self, line: "Line", call: Call, outcome: str) -> None:
        if call in line.waiting:  # else it was dropped meanwhile
            line.waiting.remove(call)
        self._counts.add(CALLS, outcome)

    def _headers(self, receiver: AlertWebhook, call: Call, body: bytes) -> dict[str, str]:
        headers = {"content-type": "application/json", "user-agent": f"Fairlead/{__version__}", "accept-encoding": "identity"}
        if receiver.format == "json":
            stamp = int(self.wall())
            headers |= {
                "webhook-id": call.id,
                "webhook-timestamp": str(stamp),
                "webhook-signature": signatures(call.id, stamp, body, [receiver.secret]),
            }
        return headers

    def _body(self, receiver: AlertWebhook, alert: Alert) -> dict[str, Any]:
        runbook = self.runbook(alert.name)
        match receiver.format:
            case "slack":
                sign = (
                    ":white_check_mark:" if alert.state == "resolved" else ":rotating_light:" if alert.severity == "page" else ":warning:"
                )
                text = f"{sign} *{alert.name}* {alert.state} ({alert.severity})\n{_escaped(alert.summary)}\n<{runbook}|runbook>"
                return {"text": text}
            case "pagerduty":
                return {
                    "routing_key": receiver.secret,
                    "event_action": "resolve" if alert.state == "resolved" else "trigger",
                    # not its id: a server that began anew takes up what it told of before
                    "dedup_key": _key(alert),
                    "payload": {
                        "summary": f"{alert.name}: {alert.summary}"[:1024],
                        "source": alert.subject or "fairlead",
                        "severity": "critical" if alert.severity == "page" else "warning",
                        "timestamp": _time(alert.began),
                    },
                    "links": [{"href": runbook, "text": "runbook"}],
                }
        return {
            "type": f"alert.{alert.state}",
            "timestamp": _time(alert.since),
            "data": {
                "id": alert.id,
                "alert": alert.name,
                "severity": alert.severity,
                "state": alert.state,
                "subject": alert.subject,
                "summary": alert.summary,
                "began": _time(alert.began),
                "since": _time(alert.since),
                "runbook": runbook,
            },
        }


class Line:
    """Calls to one receiver: the first is tried until it is delivered or given up, so that none overtakes another."""

    def __init__(self, receiver: AlertWebhook) -> None:
        self.receiver = receiver
        self.waiting: deque[Call] = deque()
        self.news = asyncio.Event()
        self.stopping = False

    @property
    def place(self) -> str:
        """For the log: the rest of a URL may be a secret."""
        return urlsplit(self.receiver.url).hostname or ""

    def next(self) -> Call | None:
        return self.waiting[0] if self.waiting else None

    def due(self, now: float) -> bool:
        return bool(self.waiting) and self.waiting[0].due <= now


def _key(alert: Alert) -> str:
    key = "/".join((alert.id.rsplit("-", 3)[0], alert.name, alert.severity, alert.subject))
    return key if len(key) <= MAX_KEY else hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _why(answer: Answer) -> str:
    return answer.error or f"answered {answer.status}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _escaped(text: str) -> str:
    """https://docs.slack.dev/messaging/formatting-message-text#escaping"""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
