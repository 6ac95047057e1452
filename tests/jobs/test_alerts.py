"""Who is told of alerts, and how. Receivers are servers on loopback, the clock is the test's."""

import asyncio
import base64
import json
from contextlib import asynccontextmanager

import pytest
from msgspec import structs
from standardwebhooks import Webhook

from fairlead.core.errors import ConfigError
from fairlead.core.policy import WebhookSettings
from fairlead.core.slo import AlertSettings, AlertWebhook
from fairlead.jobs.alerts import CALLS, MAX_KEY, MAX_WAITING, AlertCalls
from fairlead.jobs.fake_receiver import FakeReceiver, Reply
from fairlead.observe.counts import Counts
from fairlead.observe.slo.board import Alert

SECRET = "whsec_" + base64.b64encode(b"0" * 32).decode()
HERE = WebhookSettings(allow=("127.0.0.0/8",))


def alert(number=1, *, severity="page", state="firing", name="FairleadBudgetBurn"):
    return Alert(
        id=f"host-1-ab-{number}",
        name=name,
        severity=severity,
        subject="api",
        summary="api: <!channel> burns & burns",
        state=state,
        since=1_790_000_100.0 if state == "resolved" else 1_790_000_000.0,
        began=1_790_000_000.0,
    )


class Office:
    def __init__(self, *receivers, webhooks=HERE, real_clock=False, **settings):
        import time

        self.clock = 1000.0
        self.counts = Counts()
        self.calls = AlertCalls(
            AlertSettings(webhooks=receivers, **settings),
            webhooks,
            self.counts,
            runbook="https://wiki.example/{}.md".format,
            wall=time.time,
            now=lambda: self.clock,
            chance=lambda: 0.5,
        )

    def counted(self):
        outcomes = ("delivered", "retried", "failed", "dropped")
        return {outcome: number for outcome in outcomes if (number := self.counts.get(CALLS, outcome))}

    def wake(self):
        for line in self.calls.lines:
            line.news.set()

    async def until(self, **counted):
        async with asyncio.timeout(10):
            while self.counted() != counted:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def office(*receivers, **options):
    made = Office(*receivers, **options)
    made.calls.start()
    try:
        yield made
    finally:
        await made.calls.stop(0.0)


async def test_a_receiver_verifies_what_it_is_told_with_the_library_that_it_has():
    async with FakeReceiver() as receiver, office(AlertWebhook(url=receiver.url, secret=SECRET)) as here:
        here.calls.tell([alert()])
        await here.until(delivered=1)
        [call] = receiver.received
        assert Webhook(SECRET).verify(call.body, call.headers) == {
            "type": "alert.firing",
            "timestamp": "2026-09-21T14:13:20.000Z",
            "data": {
                "id": "host-1-ab-1",
                "alert": "FairleadBudgetBurn",
                "severity": "page",
                "state": "firing",
                "subject": "api",
                "summary": "api: <!channel> burns & burns",
                "began": "2026-09-21T14:13:20.000Z",
                "since": "2026-09-21T14:13:20.000Z",
                "runbook": "https://wiki.example/FairleadBudgetBurn.md",
            },
        }


async def test_each_receiver_gets_what_it_asked_for_in_its_words():
    async with FakeReceiver() as slack, FakeReceiver() as pager, FakeReceiver() as tickets:
        receivers = (
            AlertWebhook(url=slack.url, format="slack"),
            AlertWebhook(url=pager.url, format="pagerduty", secret="routing-key", severities=("page",)),
            AlertWebhook(url=tickets.url, secret=SECRET, severities=("ticket",)),
        )
        async with office(*receivers) as here:
            here.calls.tell([alert(1), alert(2, severity="ticket"), alert(1, state="resolved")])
            await here.until(delivered=6)
        texts = [json.loads(call.body)["text"] for call in slack.received]
        assert [text.partition(" ")[0] for text in texts] == [":rotating_light:", ":warning:", ":white_check_mark:"]
        assert "&lt;!channel&gt; burns &amp; burns" in texts[0]
        assert "<https://wiki.example/FairleadBudgetBurn.md|runbook>" in texts[0]
        assert "webhook-signature" not in slack.received[0].headers
        paged = [json.loads(call.body) for call in pager.received]
        assert [(each["event_action"], each["dedup_key"], each["routing_key"]) for each in paged] == [
            ("trigger", "host/FairleadBudgetBurn/page/api", "routing-key"),
            ("resolve", "host/FairleadBudgetBurn/page/api", "routing-key"),
        ]
        assert paged[0]["payload"]["severity"] == "critical"
        assert [json.loads(call.body)["data"]["id"] for call in tickets.received] == ["host-1-ab-2"]


async def test_a_long_subject_is_one_that_pagerduty_takes():
    async with FakeReceiver() as pager, office(AlertWebhook(url=pager.url, format="pagerduty", secret="routing-key")) as here:
        long, other = (structs.replace(alert(number), subject=f"{'m' * 300}@{number}") for number in (1, 2))
        here.calls.tell([long, other, structs.replace(long, state="resolved")])
        await here.until(delivered=3)
        first, second, resolved = (json.loads(call.body)["dedup_key"] for call in pager.received)
        assert first == resolved != second and len(first) <= MAX_KEY


async def test_a_receiver_that_fails_is_asked_again_later_with_the_same_id_and_in_order():
    replies = [Reply(status=500), Reply(status=503, headers={"retry-after": "60"})]
    async with FakeReceiver(replies) as receiver, office(AlertWebhook(url=receiver.url, secret=SECRET), retries=(5.0, 30.0)) as here:
        here.calls.tell([alert(1), alert(1, state="resolved")])
        await here.until(retried=1)
        here.clock += 4.9
        here.wake()
        await asyncio.sleep(0)
        assert len(receiver.received) == 1
        here.clock += 0.1
        here.wake()
        await here.until(retried=2)
        here.clock += 60.0
        here.wake()
        await here.until(retried=2, delivered=2)
        ids = [call.headers["webhook-id"] for call in receiver.received]
        assert ids == ["alert_host-1-ab-1_firing"] * 3 + ["alert_host-1-ab-1_resolved"]


async def test_after_the_last_try_it_is_given_up_and_the_next_one_has_its_turn():
    async with (
        FakeReceiver([Reply(status=500)] * 2) as receiver,
        office(AlertWebhook(url=receiver.url, secret=SECRET), retries=(5.0,)) as here,
    ):
        here.calls.tell([alert(1), alert(2)])
        await here.until(retried=1)
        here.clock += 5.0
        here.wake()
        await here.until(retried=1, failed=1, delivered=1)


async def test_one_that_wants_no_more_is_not_asked_again():
    async with FakeReceiver([Reply(status=410)]) as receiver, office(AlertWebhook(url=receiver.url, secret=SECRET)) as here:
        here.calls.tell([alert(1)])
        await here.until(failed=1)


async def test_a_receiver_that_hangs_holds_up_nobody_else():
    async with FakeReceiver([Reply(hang=True)]) as slow, FakeReceiver() as quick:
        receivers = [AlertWebhook(url=each.url, secret=SECRET) for each in (slow, quick)]
        async with office(*receivers) as here:
            here.calls.tell([alert(number) for number in range(5)])
            await here.until(delivered=5)
            assert len(quick.received) == 5


async def test_calls_that_wait_are_bounded_and_the_oldest_go_first():
    here = Office(AlertWebhook(url="http://127.0.0.1:8080/", secret=SECRET))
    here.calls.tell([alert(number) for number in range(MAX_WAITING + 7)])
    assert here.counted() == {"dropped": 7}
    [line] = here.calls.lines
    assert len(line.waiting) == MAX_WAITING
    assert line.waiting[0].alert.id == "host-1-ab-7"
    await here.calls.stop(0.0)


async def test_what_a_name_leads_to_is_checked_as_for_tenants_webhooks():
    async with FakeReceiver() as receiver:
        with pytest.raises(ConfigError, match=r"`alerts.webhooks\[0\].url` must not call 127.0.0.1.*webhooks.allow"):
            Office(AlertWebhook(url=receiver.url, secret=SECRET), webhooks=WebhookSettings())
        with pytest.raises(ConfigError, match="must be a URL"):
            Office(AlertWebhook(url="ftp://example.com", secret=SECRET))
        async with office(
            AlertWebhook(url=f"http://localhost.example:{receiver.port}/", secret=SECRET), webhooks=WebhookSettings(), retries=()
        ) as here:
            here.calls.calls.lookup.addresses = lambda host, port: [("127.0.0.1", 2)]
            here.calls.tell([alert()])
            await here.until(failed=1)
            assert receiver.received == []


async def test_alerts_are_told_where_tenants_may_name_no_webhooks():
    webhooks = WebhookSettings(enabled=False, allow=HERE.allow)
    async with FakeReceiver() as receiver, office(AlertWebhook(url=receiver.url, secret=SECRET), webhooks=webhooks) as here:
        here.calls.tell([alert()])
        await here.until(delivered=1)


async def test_a_server_that_stops_tells_what_is_due():
    async with FakeReceiver() as receiver:
        here = Office(AlertWebhook(url=receiver.url, secret=SECRET))
        here.calls.start()
        here.calls.tell([alert(1), alert(2)])
        await here.calls.stop(5.0)
        assert len(receiver.received) == 2
