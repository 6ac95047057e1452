"""What a tenant may do about its webhooks, over a real port, and with Replicate's client."""

import httpx2
import pytest
from replicate import Client
from standardwebhooks import Webhook

from fairlead.api.doorkeeper import CALLER
from fairlead.api.http_server import HttpServer
from fairlead.api.openapi import document
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.api.webhooks import WebhookRoutes
from fairlead.core.caller import Caller
from fairlead.core.jobs import JobStatus
from fairlead.core.policy import Scope, WebhookSettings
from fairlead.jobs.fake_receiver import FakeReceiver, Reply
from fairlead.jobs.secrets import Secrets
from fairlead.jobs.webhooks import Deliveries, new_secret, signatures
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.store.job_rows import JobRow
from tests.api.served import Lines
from tests.stores import new_store

SETTINGS = WebhookSettings(allow=("127.0.0.0/8",), retries=(5.0,), rotation_seconds=3600.0)
SHAPES = dict.fromkeys(("/v1/jobs", "/v1/deliveries", "/v1/webhooks"), Problems())


class Home:
    """A port, whose callers say of which tenant they are."""

    def __init__(self, folder):
        self.clock = 1000.0
        self.store = new_store(folder)
        self.jobs = self.store.jobs
        self.secrets = Secrets(self.jobs, "webhook", new_secret, self.now)
        self.deliveries = Deliveries(self.jobs, SETTINGS, self.secrets, self.render, Counts(), runner="one", now=self.now)
        self.lines = Lines(Metrics())
        self.routes = WebhookRoutes(self.jobs, self.secrets, SETTINGS, self.deliveries, self.lines, self.now)

    def now(self):
        return self.clock

    async def render(self, delivery):
        return b'{"id":"%b"}' % delivery.job.encode()

    async def admit(self, request, scope):
        assert scope is Scope.INFER
        tenant = request.headers.get("authorization", "Bearer acme").removeprefix("Bearer ")
        request.scope[CALLER] = (Caller(tenant=tenant, key="k"), "")

    def end_job(self, url, *, job="job_1", tenant="acme"):
        row = JobRow(
            id=job, tenant=tenant, model="m", webhook=url, created=1000.0, start_deadline=2e9, total_deadline=2e9, retention_seconds=60.0
        )
        self.jobs.submit(row, b"", tenant_queued=9, now=1000.0)
        self.jobs.lease("r", ["m"], 9, now=1000.0, lease_seconds=2e9, tenant_active=9)
        self.jobs.end(job, "r", status=JobStatus.FAILED, reason="model-error", now=1000.0)

    async def round(self):
        await self.deliveries.take()
        await self.deliveries.idle()

    async def log(self, job="job_1", tenant="acme"):
        answer = await self.client.get(f"/v1/jobs/{job}/deliveries", headers=of(tenant))
        return answer.status_code, answer.json()


def of(tenant):
    return {"authorization": f"Bearer {tenant}"}


@pytest.fixture
async def home(tmp_path):
    home = Home(tmp_path)
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in home.routes.operations], SHAPES, home.admit)
    server = HttpServer(None, app, home.lines)
    await server.listen(port=0)
    home.url = f"http://127.0.0.1:{server.port}"
    async with httpx2.AsyncClient(base_url=home.url, timeout=20) as client:
        home.client = client
        yield home
    await home.deliveries.stop(0.0)
    await server.drain(5.0)
    home.store.close()


async def test_a_tenant_sees_what_was_delivered_and_what_was_not(home):
    async with FakeReceiver([Reply(status=500)]) as receiver:
        home.end_job(receiver.url)
        await home.round()
        status, body = await home.log()
        [told] = body["deliveries"]
        assert status == 200
        assert told == {
            "id": receiver.received[0].headers["webhook-id"],
            "job": "job_1",
            "event": "failed",
            "url": receiver.url,
            "state": "pending",
            "tries": 1,
            "created": 1000.0,
            "next_at": told["next_at"],
            "ended": None,
            "last_status": 500,
            "last_error": "answered 500",
        }
        assert 1004.5 <= told["next_at"] <= 1005.5
        home.clock = 1006.0
        await home.round()
        [told] = (await home.log())[1]["deliveries"]
        assert (told["state"], told["tries"], told["ended"], told["next_at"], told["last_error"]) == ("delivered", 2, 1006.0, None, "")


async def test_what_was_given_up_is_sent_once_more_when_it_is_asked_for(home):
    async with FakeReceiver([Reply(status=410)]) as receiver:
        home.end_job(receiver.url)
        await home.round()
        [told] = (await home.log())[1]["deliveries"]
        assert told["state"] == "failed"
        answer = await home.client.post(f"/v1/deliveries/{told['id']}/replay")
        assert (answer.status_code, answer.json()["state"], answer.json()["tries"]) == (200, "pending", 0)
        await home.round()
        [told] = (await home.log())[1]["deliveries"]
        assert (told["state"], told["tries"]) == ("delivered", 1)
        assert [call.headers["webhook-id"] for call in receiver.received] == [told["id"]] * 2


async def test_others_see_nothing_of_it(home):
    home.end_job("http://127.0.0.1:9/")
    [told] = (await home.log())[1]["deliveries"]
    for answer in (
        await home.client.get("/v1/jobs/job_1/deliveries", headers=of("rival")),
        await home.client.get("/v1/jobs/job_2/deliveries"),
        await home.client.post(f"/v1/deliveries/{told['id']}/replay", headers=of("rival")),
        await home.client.post("/v1/deliveries/msg_2/replay"),
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert answer.headers["x-request-id"]
    assert [(await home.lines.next())["status"] for _ in range(5)] == [200, 404, 404, 404, 404]


async def test_a_job_without_webhooks_has_an_empty_log(home):
    home.end_job("")
    assert await home.log() == (200, {"deliveries": []})


async def test_the_secret_is_made_at_first_use_and_is_the_tenants_own(home):
    first = await home.client.get("/v1/webhooks/secret")
    assert first.headers["cache-control"] == "no-store"
    assert first.json() == {"key": first.json()["key"], "created": 1000.0, "until": None}
    assert first.json()["key"].startswith("whsec_")
    assert (await home.client.get("/v1/webhooks/secret")).json() == first.json()
    other = await home.client.get("/v1/webhooks/secret", headers=of("rival"))
    assert other.json()["key"] != first.json()["key"]


async def test_a_secret_is_replaced_while_the_old_one_signs_too(home):
    old = (await home.client.get("/v1/webhooks/secret")).json()["key"]
    rotated = (await home.client.post("/v1/webhooks/secret/rotate")).json()
    assert rotated["key"] != old and rotated["until"] >= 1000.0 + SETTINGS.rotation_seconds
    assert (await home.client.get("/v1/webhooks/secret")).json() == rotated
    async with FakeReceiver() as receiver:
        home.end_job(receiver.url)
        await home.round()
        [call] = receiver.received
    given = call.headers["webhook-signature"].split()
    assert given == [signatures(call.headers["webhook-id"], 1000, call.body, [key]) for key in (rotated["key"], old)]


async def test_replicates_client_asks_for_it_in_its_own_way(home):
    key = (await home.client.get("/v1/webhooks/secret")).json()["key"]
    replicate = Client(api_token="acme", base_url=home.url)
    secret = await replicate.webhooks.default.async_secret()
    assert secret.key == key
    Webhook(secret.key)


def test_the_document_tells_of_them(tmp_path):
    routes = WebhookRoutes(None, None, SETTINGS, None, None)
    described = document(routes.operations, {})
    assert set(described["paths"]) == {each.path for each in routes.operations}
    assert "404" in described["paths"]["/v1/deliveries/{delivery}/replay"]["post"]["responses"]
