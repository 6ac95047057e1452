"""Webhooks, told as what receivers see. The store is real, the receivers are servers on loopback, the clock is the test's."""

import asyncio
import hashlib
import hmac
import json
import socket
import sys
import time
from contextlib import asynccontextmanager

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from replicate.webhook import Webhooks as ReplicateWebhooks
from replicate.webhook import WebhookSigningSecret
from standardwebhooks import Webhook, WebhookVerificationError

from fairlead.core.errors import Unavailable
from fairlead.core.jobs import JobStatus
from fairlead.core.policy import WebhookSettings
from fairlead.jobs.addresses import Lookup
from fairlead.jobs.calls import Answer, retry_after
from fairlead.jobs.fake_receiver import CHUNK, FakeReceiver, Reply
from fairlead.jobs.secrets import FRESH_SECONDS, Secrets
from fairlead.jobs.webhooks import MAX_RETRY_AFTER, Deliveries, new_secret, next_try, signatures
from fairlead.observe.counts import Counts
from fairlead.store.job_rows import DeliveryState, JobRow
from tests.stores import new_store

SETTINGS = WebhookSettings(allow=("127.0.0.0/8",), retries=(5.0, 300.0), timeout=10.0)
COUNT = "fairlead_webhook_deliveries_total"


class Post:
    """A server's deliveries, a clock to turn, and jobs that ended."""

    def __init__(self, jobs, settings=SETTINGS, *, runner="one", real_clock=False):
        self.jobs = jobs
        self.clock = 1000.0
        self.now = time.time if real_clock else lambda: self.clock
        self.counts = Counts()
        self.gone = False
        self.rendered = 0
        self.secrets = Secrets(jobs, "webhook", new_secret, self.now)
        self.deliveries = Deliveries(
            jobs, settings, self.secrets, self.render, self.counts, runner=runner, now=self.now, chance=lambda: 0.5
        )

    async def render(self, delivery):
        self.rendered += 1
        return None if self.gone else json.dumps({"id": delivery.job, "event": delivery.event, "said": self.rendered, "ü": "ß"}).encode()

    def end_job(self, url, *, id="job_1", tenant="acme", status=JobStatus.COMPLETE, face="jobs", secret=""):
        """A job that ends now. The id of its delivery."""
        now = self.now()
        row = JobRow(
            id=id,
            tenant=tenant,
            model="m",
            face=face,
            webhook=url,
            webhook_secret=secret,
            created=now,
            start_deadline=now + 1e9,
            total_deadline=now + 1e9,
            retention_seconds=1e9,
        )
        self.jobs.submit(row, b"", tenant_queued=10_000, now=now)
        [leased] = self.jobs.lease("r", ["m"], 1, now=now, lease_seconds=1e9, tenant_active=10_000)
        assert leased[0].id == id
        self.jobs.end(id, "r", status=status, now=now)
        [delivery] = self.jobs.deliveries(id, tenant)
        return delivery.id

    async def round(self):
        """All that is due, tried once."""
        while await self.deliveries.take():
            await self.deliveries.idle()
        await self.deliveries.idle()

    def told(self, id="job_1"):
        [delivery] = self.jobs.deliveries(id, None)
        return delivery

    def counted(self):
        return {outcome: number for outcome in ("delivered", "retried", "failed") if (number := self.counts.get(COUNT, outcome))}


class Here(Lookup):
    """Every name leads to this host."""

    def __init__(self, guard):
        super().__init__(guard)
        self.asked = []

    def addresses(self, host, port):
        self.asked.append(host)
        return super().addresses("127.0.0.1", port)


@pytest.fixture
def jobs(tmp_path):
    store = new_store(tmp_path)
    yield store.jobs
    store.close()


@asynccontextmanager
async def posted(jobs, settings=SETTINGS, **options):
    post = Post(jobs, settings, **options)
    try:
        yield post
    finally:
        await post.deliveries.stop(0.0)


# Signatures


async def test_receivers_verify_it_with_the_libraries_that_they_have(jobs):
    async with FakeReceiver() as receiver, posted(jobs, real_clock=True) as post:
        id = post.end_job(receiver.url)
        await post.round()
        [call] = receiver.received
        [secret] = [row.value for row in await post.secrets.rows("acme")]

        assert call.headers["webhook-id"] == id
        assert call.headers["content-type"] == "application/json"
        body = Webhook(secret).verify(call.body, call.headers)
        assert body == {"id": "job_1", "event": "complete", "said": 1, "ü": "ß"}
        openai = OpenAI(api_key="none", webhook_secret=secret)
        assert openai.webhooks.unwrap(call.body, call.headers).id == "job_1"
        ReplicateWebhooks.validate(headers=call.headers, body=call.body.decode(), secret=WebhookSigningSecret(key=secret), tolerance=300)

        forged = call.body.replace(b"complete", b"failed")
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(forged, call.headers)
        with pytest.raises(InvalidWebhookSignatureError):
            openai.webhooks.verify_signature(call.body, {**call.headers, "webhook-id": "msg_2"})
        with pytest.raises(WebhookVerificationError):
            Webhook(new_secret()).verify(call.body, call.headers)


async def test_while_a_secret_is_replaced_both_verify(jobs):
    async with FakeReceiver() as receiver, posted(jobs, real_clock=True) as post:
        [old] = await post.secrets.rows("acme")
        new, _ = await post.secrets.rotate("acme", 3600.0)
        post.end_job(receiver.url)
        post.end_job(receiver.url, id="job_2", tenant="other")
        await post.round()
        of_acme, of_other = sorted(receiver.received, key=lambda call: call.body)
        for secret in (old.value, new.value):
            Webhook(secret).verify(of_acme.body, of_acme.headers)
            OpenAI(api_key="none").webhooks.verify_signature(of_acme.body, of_acme.headers, secret=secret)
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(of_other.body, of_other.headers)


async def test_a_secret_that_was_replaced_signs_no_more_when_its_time_is_over(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        await post.secrets.rows("acme")
        await post.secrets.rotate("acme", 60.0)
        for clock, num_signatures in ((1000.0, 2), (1069.9, 2), (1060.0 + FRESH_SECONDS, 1)):
            post.clock = clock
            post.end_job(receiver.url, id=f"job_{clock:g}")
            await post.round()
            assert len(receiver.received[-1].headers["webhook-signature"].split()) == num_signatures


async def test_black_forest_labs_receivers_find_their_own_signature(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        post.end_job(receiver.url, id="job_1", face="bfl", secret="mine")
        post.end_job(receiver.url, id="job_2", face="bfl")
        await post.round()
        with_secret, without = sorted(receiver.received, key=lambda call: call.body)
        expected = "sha256=" + hmac.new(b"mine", with_secret.body, hashlib.sha256).hexdigest()
        assert with_secret.headers["x-bfl-signature"] == expected
        assert "x-bfl-signature" not in without.headers


# The schedule


def test_when_it_is_tried_again():
    def after(answer, tries, chance=0.5):
        return next_try(answer, tries=tries, retries=(5.0, 300.0), now=1000.0, chance=chance)

    assert [after(Answer(500), tries) for tries in (1, 2, 3)] == [1005.0, 1300.0, None]
    assert (after(Answer(500), 1, 0.0), after(Answer(500), 1, 1.0)) == (1004.5, 1005.5)
    assert after(Answer(410), 1) is None
    assert after(Answer(503, "", 60.0), 1) == 1060.0
    assert after(Answer(503, "", 60.0), 2) == 1300.0
    assert after(Answer(503, "", 1e9), 1) == 1000.0 + MAX_RETRY_AFTER
    assert next_try(Answer(500), tries=1, retries=(), now=1000.0, chance=0.5) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        ("Thu, 01 Jan 1970 00:20:00 GMT", 200.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("", 0.0),
        ("-5", 0.0),
        ("soon", 0.0),
        ("Thu, 99 Jan 1970 00:20:00 GMT", 0.0),
        ("9" * 100, 999999999999.0),
    ],
)
def test_what_a_receiver_asks_for(header, seconds):
    assert retry_after(header, 1000.0) == seconds


async def test_a_receiver_that_fails_is_called_by_the_schedule_and_then_no_more(jobs):
    async with FakeReceiver([Reply(status=500), Reply(status=404), Reply(status=503)]) as receiver, posted(jobs) as post:
        id = post.end_job(receiver.url)
        for clock, num_calls, state in (
            (1000.0, 1, "pending"),
            (1004.9, 1, "pending"),
            (1005.0, 2, "pending"),
            (1304.0, 2, "pending"),
            (1305.0, 3, "failed"),
            (1e9, 3, "failed"),
        ):
            post.clock = clock
            await post.round()
            assert (len(receiver.received), post.told().state) == (num_calls, state)
        assert {call.headers["webhook-id"] for call in receiver.received} == {id}
        assert [json.loads(call.body)["said"] for call in receiver.received] == [1, 2, 3]
        told = post.told()
        assert (told.tries, told.last_status, told.last_error, told.ended) == (3, 503, "answered 503", 1305.0)
        assert post.counted() == {"retried": 2, "failed": 1}


async def test_a_receiver_that_comes_back_is_told(jobs):
    async with FakeReceiver([Reply(status=503, headers={"Retry-After": "60"})]) as receiver, posted(jobs) as post:
        post.end_job(receiver.url)
        await post.round()
        assert post.told().next_at == 1060.0
        post.clock = 1060.0
        await post.round()
        told = post.told()
        assert (told.state, told.tries, told.last_status, told.last_error) == ("delivered", 2, 200, "")
        assert post.counted() == {"retried": 1, "delivered": 1}


async def test_a_receiver_that_is_gone_is_not_called_again(jobs):
    async with FakeReceiver([Reply(status=410)]) as receiver, posted(jobs) as post:
        post.end_job(receiver.url)
        await post.round()
        assert (post.told().state, post.told().tries) == ("failed", 1)


# Receivers that are not as they should be


async def test_nobody_there(jobs):
    async with FakeReceiver() as receiver:
        url = receiver.url
    async with posted(jobs) as post:
        post.end_job(url)
        post.end_job("https://" + url.removeprefix("http://"), id="job_2")
        await post.round()
        assert (post.told().state, post.told().last_status, post.told().last_error) == ("pending", None, "no connection")
        assert post.told("job_2").last_error == "no connection"


async def test_a_redirect_leads_nowhere(jobs):
    async with FakeReceiver() as elsewhere, FakeReceiver([Reply(status=307, headers={"Location": elsewhere.url})]) as receiver:
        async with posted(jobs) as post:
            post.end_job(receiver.url)
            await post.round()
            assert post.told().last_error == "answered 307, and redirects are not followed"
        assert elsewhere.received == []


async def test_a_proxy_of_the_environment_is_not_asked(jobs, monkeypatch):
    async with FakeReceiver() as proxy, FakeReceiver() as receiver, posted(jobs) as post:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        post.end_job(receiver.url)
        await post.round()
        assert (len(proxy.received), len(receiver.received)) == (0, 1)


async def test_a_huge_answer_is_not_read_to_its_end(jobs):
    async with FakeReceiver([Reply(chunks=1000)]) as receiver, posted(jobs) as post:
        post.end_job(receiver.url)
        await post.round()
        assert post.told().state is DeliveryState.DELIVERED
        await receiver.until(lambda: receiver.num_open == 0)
        assert receiver.num_sent_bytes < 1000 * len(CHUNK)


async def test_a_receiver_that_hangs_costs_its_deadline(jobs):
    settings = WebhookSettings(allow=("127.0.0.0/8",), timeout=0.2)
    async with FakeReceiver([Reply(hang=True), Reply(body_hangs=True)]) as receiver, posted(jobs, settings) as post:
        post.end_job(receiver.url)
        await post.round()
        assert (post.told().state, post.told().last_error) == ("pending", "no answer within 0.2 seconds")
        post.clock = 1006.0
        await post.round()  # it says that all is well, and then no more
        assert post.told().state is DeliveryState.DELIVERED


async def test_what_speaks_no_http(jobs):
    async def chatter(_, writer):
        writer.write(b"220 mail.example.com ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(chatter, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with posted(jobs) as post:
        post.end_job(url)
        post.end_job("https" + url.removeprefix("http"), id="job_2")
        await post.round()
        assert post.told().last_error.startswith("no answer: ")
        assert post.told("job_2").last_error == "its certificate is not good, or it speaks no TLS"
    server.close()
    await server.wait_closed()


async def test_a_slow_receiver_does_not_hold_up_the_others(jobs):
    settings = WebhookSettings(allow=("127.0.0.0/8",), max_in_flight=8)
    async with FakeReceiver([Reply(hang=True)] * 20) as slow, FakeReceiver() as quick, posted(jobs, settings) as post:
        for number in range(20):
            post.end_job(slow.url, id=f"job_1{number:02}", tenant=f"slow-{number}")
        post.end_job(quick.url, id="job_2", tenant="quick")
        while await post.deliveries.take():
            pass
        await quick.until(lambda: len(quick.received) == 1)
        await slow.until(lambda: len(slow.received) == 1)
        tried = {post.told(f"job_1{number:02}").tries for number in range(20)}
        assert tried == {0, 1}  # those that waited have lost no try
        slow.replies.clear()
        slow.release()
        for step in range(40):
            post.clock = 1000.0 + 10 * step
            await post.round()
        assert post.counted() == {"delivered": 21}
        assert len(slow.received) == 20


async def test_a_tenant_with_many_receivers_does_not_hold_up_the_others(jobs):
    settings = WebhookSettings(allow=("127.0.0.0/8",), max_in_flight=4)
    async with FakeReceiver([Reply(hang=True)] * 10) as slow, FakeReceiver() as quick, posted(jobs, settings) as post:
        post.deliveries.calls.lookup = Here(post.deliveries.calls.guard)
        for number in range(10):
            post.end_job(f"http://hooks-{number}.example.com:{slow.port}/", id=f"job_1{number}", tenant="greedy")
        running = asyncio.create_task(post.deliveries.run())
        for number in range(1, 4):
            post.end_job(quick.url, id=f"job_2{number}", tenant="modest")
            post.deliveries.look()
            await quick.until(lambda number=number: len(quick.received) == number)
        await slow.until(lambda: len(slow.received) >= 2)
        assert len(slow.received) == 2
        await post.deliveries.stop(0.0)
        await asyncio.wait_for(running, 10)


# Several servers, and those that die


async def test_servers_share_the_work(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as one, posted(jobs, runner="other") as other:
        for number in range(10):
            one.end_job(receiver.url, id=f"job_{number}")
        for _ in range(20):
            await asyncio.gather(one.round(), other.round())
            one.clock = other.clock = one.clock + 10
        ids = [call.headers["webhook-id"] for call in receiver.received]
        assert len(ids) == len(set(ids)) == 10


async def test_what_a_dead_server_had_begun_another_one_delivers(jobs):
    async with FakeReceiver([Reply(hang=True)]) as receiver:
        async with posted(jobs, runner="dead") as dead:
            id = dead.end_job(receiver.url)
            await dead.deliveries.take()
            await receiver.until(lambda: len(receiver.received) == 1)
            # it dies here: nothing of this call is written down
        async with posted(jobs, runner="other") as other:
            await other.round()
            assert len(receiver.received) == 1
            other.clock += SETTINGS.timeout + 60
            await other.round()
        assert [call.headers["webhook-id"] for call in receiver.received] == [id, id]
        assert (other.told().state, other.told().tries) == ("delivered", 2)


KILLED = """
import asyncio, sys
from fairlead.core.policy import WebhookSettings
from fairlead.jobs.secrets import Secrets
from fairlead.jobs.webhooks import Deliveries, new_secret
from fairlead.observe.counts import Counts
from fairlead.store.store import Store

async def render(delivery):
    return b"{}"

async def main():
    jobs = Store.open(sys.argv[1]).jobs
    settings = WebhookSettings(allow=("127.0.0.0/8",))
    await Deliveries(jobs, settings, Secrets(jobs, "webhook", new_secret), render, Counts(), runner="killed").run()

asyncio.run(main())
"""


async def test_a_server_that_is_killed_while_it_calls_loses_nothing(jobs, tmp_path):
    async with FakeReceiver([Reply(hang=True)]) as receiver, posted(jobs) as post:
        post.clock = time.time()
        id = post.end_job(receiver.url)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, f"sqlite:///{tmp_path}/fairlead.db")
        try:
            await receiver.until(lambda: len(receiver.received) == 1, 60)
        finally:
            process.kill()
            await process.wait()
        await post.round()
        assert len(receiver.received) == 1  # as far as others know, it is still at it
        post.clock += 60
        await post.round()
        first, second = receiver.received
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == id
        [secret] = [row.value for row in await post.secrets.rows("acme")]
        for call in (first, second):
            stamp = int(call.headers["webhook-timestamp"])
            assert call.headers["webhook-signature"] == signatures(id, stamp, call.body, [secret])
        assert (post.told().state, post.told().tries) == ("delivered", 2)


async def test_what_was_delivered_but_could_not_be_written_down_is_delivered_again(jobs, monkeypatch):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        post.end_job(receiver.url)

        def gone(*_, **__):
            raise Unavailable("the store does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(type(jobs), "delivered", gone)
            await post.round()
        assert post.told().state is DeliveryState.PENDING
        post.clock += 60
        await post.round()
        assert (len(receiver.received), post.told().state) == (2, "delivered")


async def test_the_loop_finds_what_is_due_by_itself_and_ends_when_told(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        running = asyncio.create_task(post.deliveries.run())
        post.end_job(receiver.url)
        post.deliveries.look()
        await receiver.until(lambda: len(receiver.received) == 1)
        await post.deliveries.stop(10.0)
        await asyncio.wait_for(running, 10)
        assert post.told().state is DeliveryState.DELIVERED


# What is sent


async def test_of_a_job_that_was_purged_the_last_words_are_sent_again(jobs):
    async with FakeReceiver([Reply(status=500)]) as receiver, posted(jobs) as post:
        id = post.end_job(receiver.url)
        await post.round()
        post.gone = True
        post.clock = 1005.0
        await post.round()
        assert receiver.received[0].body == receiver.received[1].body
        assert post.jobs.replay(id, "acme", post.clock).state is DeliveryState.PENDING
        await post.round()
        assert receiver.received[2].body == receiver.received[0].body
        assert {call.headers["webhook-id"] for call in receiver.received} == {id}


async def test_of_a_job_that_was_purged_before_anything_was_sent_nothing_is(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        post.end_job(receiver.url)
        post.gone = True
        await post.round()
        assert receiver.received == []
        assert (post.told().state, post.told().tries) == ("failed", 1)


async def test_a_body_that_cannot_be_written_is_tried_again(jobs):
    async with FakeReceiver() as receiver, posted(jobs) as post:
        post.end_job(receiver.url)
        post.deliveries.render, render = None, post.deliveries.render  # whatever a bug may raise
        await post.round()
        assert (post.told().state, post.told().last_error) == ("pending", "internal error")
        post.deliveries.render = render
        post.clock = 1005.0
        await post.round()
        assert post.told().state is DeliveryState.DELIVERED


# Where it may not go


async def test_a_name_that_leads_to_this_host_is_not_called(jobs):
    async with FakeReceiver() as receiver, posted(jobs, WebhookSettings()) as post:
        post.deliveries.calls.lookup = Here(post.deliveries.calls.guard)
        post.end_job(f"http://hooks.example.com:{receiver.port}/")
        post.end_job(receiver.url, id="job_2")
        post.end_job(f"http://2130706433:{receiver.port}/", id="job_3")
        post.end_job(f"http://[::ffff:127.0.0.1]:{receiver.port}/", id="job_4")
        await post.round()
        assert receiver.received == []
        assert post.deliveries.calls.lookup.asked == ["hooks.example.com"]
        assert post.told().last_error == "its address is loopback, which webhooks may not call"
        assert post.told("job_2").last_error == "`webhook` must not call 127.0.0.1: its address is loopback"
        assert post.told("job_3").last_error == "`webhook` names no host, or one whose address is spelt in an odd way"
        assert post.told("job_4").last_error == "`webhook` must not call ::ffff:127.0.0.1: its address is an IPv4 address in disguise"
        assert {post.told(f"job_{number}").state for number in range(1, 5)} == {DeliveryState.PENDING}


class Blind(Lookup):
    """One that checks nothing."""

    async def resolve(self, host, port=0, family=0):
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]


async def test_the_last_look_is_at_the_address_that_is_connected_to(jobs):
    async with FakeReceiver() as receiver, posted(jobs, WebhookSettings()) as post:
        post.deliveries.calls.lookup = Blind(post.deliveries.calls.guard)
        post.end_job(f"http://hooks.example.com:{receiver.port}/")
        await post.round()
        assert receiver.received == []
        assert "may not call" in post.told().last_error


async def test_what_may_be_called_is_asked_again_at_each_try(jobs):
    """The operator may have changed their mind since it was submitted."""
    async with FakeReceiver() as receiver, posted(jobs, WebhookSettings(allow=SETTINGS.allow, schemes=("https",))) as post:
        post.end_job(receiver.url)
        await post.round()
        assert receiver.received == []
        assert post.told().last_error == "`webhook` must be a URL that begins with https://"


async def test_each_call_looks_the_name_up_again(jobs):
    async with FakeReceiver([Reply(status=500)]) as receiver, posted(jobs) as post:
        post.deliveries.calls.lookup = Here(post.deliveries.calls.guard)
        post.end_job(f"http://hooks.example.com:{receiver.port}/")
        await post.round()
        post.clock = 1005.0
        await post.round()
        assert (len(receiver.received), len(post.deliveries.calls.lookup.asked)) == (2, 2)
