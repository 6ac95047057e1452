"""Objectives, alerts and incidents of a whole server, asked over its operations port."""

import asyncio
import base64
import io
import json
import tarfile

import pytest
import pytest_asyncio

from fairlead.app_slo import shown_config
from fairlead.core.policy import Scope
from fairlead.core.timeline import Timeline
from fairlead.jobs.fake_receiver import FakeReceiver
from tests.api.keyed import House, bearer, house, row

WHSEC = "whsec_" + base64.b64encode(b"7" * 32).decode()
OBJECTIVES = """
slos:
  - {name: available, target: 0.99, min_events: 20}
  - {name: fast, model: 'ident*', class: standard, kind: latency, threshold: 30, target: 0.9}
"""


async def asked(home: House, method: str, path: str, body: object = None, *, status: int = 200):
    key = home.new_key(Scope.ADMIN, tenant="ops")
    answer = await home.ops.request(method, path, headers=bearer(key), content=b"" if body is None else json.dumps(body).encode())
    assert answer.status_code == status, answer.text
    return answer


def slos(home: House):
    return home.server.telemetry.reliability.slos


def fail(home: House, number: int) -> None:
    for _ in range(number):
        timeline = Timeline(request_id="r", protocol="http", arrived=1.0, ended=2.0, kind="infer", model="m", outcome="failure", error="no")
        home.server.telemetry.finished.add(timeline)
    home.server.telemetry.finished.flush()


async def look(home: House, seconds: float = 0.0) -> None:
    """As the server does every few seconds; `seconds` after it did last."""
    watched = slos(home)
    before = watched.now
    watched.now = lambda: before() + seconds
    watched.look(await watched.signals())


@pytest.fixture
async def home(tmp_path):
    async with house(tmp_path, extra=OBJECTIVES) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def closed(tmp_path_factory):
    """A house in which nothing changes."""
    async with house(tmp_path_factory.mktemp("closed"), extra=OBJECTIVES) as opened:
        yield opened


async def test_objectives_are_shown_with_their_budgets(home):
    key = home.new_key()
    for _ in range(30):
        assert (await home.http.post("/v2/models/identity/infer", headers=bearer(key), json=row())).status_code == 200
    await home.http.post("/v2/models/identity/infer", headers=bearer(key), json={})
    await home.http.post("/v2/models/nobody/infer", headers=bearer(key), json=row())
    home.server.telemetry.finished.flush()
    available, fast = (await asked(home, "GET", "/admin/slo")).json()["objectives"]
    assert (available["name"], available["good"], available["bad"], available["enough"]) == ("available", 30, 0, True)
    assert (available["attained"], available["budget_left"], available["threshold"], available["alerts"]) == (1.0, 1.0, None, [])
    assert available["burn"] == dict.fromkeys(("5m", "30m", "1h", "6h", "3d"), 0.0)
    assert (fast["model"], fast["class"], fast["kind"], fast["threshold"], fast["good"]) == ("ident*", "standard", "latency", 30.0, 30)
    assert fast["enough"] is False
    text = (await home.ops.get("/metrics")).text
    assert 'fairlead_slo_events_total{outcome="good",slo="available"} 30' in text
    assert 'fairlead_slo_budget_ratio{slo="available"} 1' in text
    assert 'fairlead_slo_burn_rate{slo="fast",window="3d"} 0' in text


async def test_an_alert_is_shown_counted_and_told_and_then_over(tmp_path):
    async with FakeReceiver() as receiver:
        extra = f"""{OBJECTIVES}
alerts:
  runbooks: https://wiki.example/
  webhooks: [{{url: '{receiver.url}', secret: {WHSEC}, severities: [page]}}]
webhooks: {{allow: [127.0.0.0/8]}}
"""
        async with house(tmp_path, extra=extra) as home:
            fail(home, 100)
            await look(home)
            await look(home, 61.0)
            # A busy machine may bring alerts of its own, such as that of a late event loop
            burning = [
                each for each in (await asked(home, "GET", "/admin/alerts")).json()["alerts"] if each["alert"] == "FairleadBudgetBurn"
            ]
            first, *others = burning
            assert (first["alert"], first["severity"], first["subject"], first["state"]) == (
                "FairleadBudgetBurn",
                "page",
                "available",
                "firing",
            )
            assert first["runbook"] == "https://wiki.example/FairleadBudgetBurn.md"
            assert [(each["severity"], each["state"]) for each in others] == [("ticket", "pending")]
            assert 'fairlead_alerts{alert="FairleadBudgetBurn",severity="page",slo="available"} 1' in (await home.ops.get("/metrics")).text
            available, _ = (await asked(home, "GET", "/admin/slo")).json()["objectives"]
            assert available["budget_left"] == 0.0
            assert {each["severity"]: each["state"] for each in available["alerts"]} == {"page": "firing", "ticket": "pending"}

            await look(home, 8 * 3600.0)
            await look(home, 3600.0)
            shown = (await asked(home, "GET", "/admin/alerts")).json()
            assert ("FairleadBudgetBurn", "page") not in [(each["alert"], each["severity"]) for each in shown["alerts"]]
            assert ("page", "resolved") in [(each["severity"], each["state"]) for each in shown["recent"]]
            await receiver.until(lambda: len(receiver.received) == 2)
            assert [json.loads(call.body)["type"] for call in receiver.received] == ["alert.firing", "alert.resolved"]
            async with asyncio.timeout(10):
                while home.count("fairlead_alert_calls_total", "delivered") < 2:
                    await asyncio.sleep(0.01)


async def test_a_page_begins_an_incident_where_that_is_wanted(tmp_path):
    async with house(tmp_path, extra=f"{OBJECTIVES}\nincidents: {{on_page: true}}\n") as home:
        fail(home, 100)
        await look(home)
        await look(home, 61.0)
        async with asyncio.timeout(10):
            while not (shown := (await asked(home, "GET", "/admin/incidents")).json()["incidents"]):
                await asyncio.sleep(0.01)
        assert shown[0]["title"].startswith("FairleadBudgetBurn: available: the error budget burns 100 times")
        assert (shown[0]["by"], shown[0]["ended"]) == ("alert", None)


async def test_an_incident_from_beginning_to_download(home):
    key = home.new_key()
    (await home.http.post("/v2/models/identity/infer", headers=bearer(key), json=row())).raise_for_status()
    begun = (await asked(home, "POST", "/admin/incidents/start", {"title": "It is slow"})).json()
    assert (await asked(home, "POST", "/admin/incidents/start", {}, status=409)).json()["detail"].startswith(f"incident {begun['id']} runs")
    await asked(home, "GET", f"/admin/incidents/{begun['id']}", status=404)
    fail(home, 3)
    async with asyncio.timeout(10):  # audit rows are written in groups
        while not (await asked(home, "GET", "/admin/audit?action=incident.start")).json()["entries"]:
            await asyncio.sleep(0.01)
    ended = (await asked(home, "POST", "/admin/incidents/stop")).json()
    await asked(home, "POST", "/admin/incidents/stop", status=404)
    [listed] = (await asked(home, "GET", "/admin/incidents")).json()["incidents"]
    assert listed == ended
    answer = await asked(home, "GET", f"/admin/incidents/{ended['id']}")
    assert answer.headers["content-type"] == "application/gzip"
    assert f'filename="{ended["id"]}.tar.gz"' in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        files = {info.name.partition("/")[2]: tar.extractfile(info).read().decode("utf-8", "replace") for info in tar}
    assert {
        "postmortem.md", "incident.json", "slow.json", "failed.json", "logs.ndjson", "config.yaml", "configs.json", "slo.json", "versions.json",
        "audit.json", "rollouts.json", "alerts.json", "start/slo.json",
    } <= files.keys()  # fmt: skip
    assert len(json.loads(files["failed.json"])) == 3
    assert any(each["model"] == "identity" for each in json.loads(files["versions.json"])["loaded"])
    text = files["postmortem.md"]
    assert "# Post-mortem: It is slow" in text
    assert "incident.start" in text.partition("## Timeline")[2]
    assert "| m | no | 3 |" in text


async def test_archives_hold_no_secrets(tmp_path):
    extra = f"""
alerts:
  webhooks:
    - {{url: 'https://hooks.slack.example/services/T000/B000/XyZsecretpath', format: slack}}
    - {{url: 'https://hooks.example/x', secret: {WHSEC}}}
slos: [{{name: available}}]
"""
    async with house(tmp_path, extra=extra) as home:
        key = home.new_key()
        (await home.http.post("/v2/models/identity/infer", headers=bearer(key), json=row())).raise_for_status()
        await asked(home, "POST", "/admin/incidents/start", {"title": ""})
        ended = (await asked(home, "POST", "/admin/incidents/stop")).json()
        answer = await asked(home, "GET", f"/admin/incidents/{ended['id']}")
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            everything = b"".join(tar.extractfile(info).read() for info in tar if "/metrics/" not in info.name)
        assert b"identity" in everything
        for secret in (WHSEC, "XyZsecretpath", key.secret):
            assert secret.encode() not in everything


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/slo"),
        ("GET", "/admin/alerts"),
        ("GET", "/admin/incidents"),
        ("POST", "/admin/incidents/start"),
        ("POST", "/admin/incidents/stop"),
        ("GET", "/admin/incidents/20260101T000000Z-abcd"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_only_administrators_may(closed, method, path):
    assert (await closed.ops.request(method, path)).status_code == 401
    assert (await closed.ops.request(method, path, headers=bearer(closed.new_key()))).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/admin/incidents/start", {"title": "x" * 500}, 400),
        ("/admin/incidents/start", {"title": "two\nlines"}, 400),
        ("/admin/incidents/start", {"tilte": "x"}, 400),
        ("/admin/incidents/start", [], 400),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_bad_bodies_are_problems(closed, path, body, status):
    assert (await asked(closed, "POST", path, body, status=status)).headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("id", ["..%2f..%2fetc%2fpasswd", "x", "20260101T000000Z-abcd", "%00"])
@pytest.mark.asyncio(loop_scope="module")
async def test_bad_ids_are_problems(closed, id):
    key = closed.new_key(Scope.ADMIN, tenant="ops")
    assert (await closed.ops.get(f"/admin/incidents/{id}", headers=bearer(key))).status_code in (400, 404)


async def test_budgets_and_incidents_outlive_the_server(tmp_path):
    async with house(tmp_path, extra=OBJECTIVES) as home:
        fail(home, 7)
        begun = (await asked(home, "POST", "/admin/incidents/start", {"title": "long"})).json()
    from fairlead.app import Server
    from fairlead.core.settings import parse_settings

    text = f"""
listen: {{port: 0, grpc_port: 0, ops_port: 0}}
store: {{url: 'sqlite:///{tmp_path}/fairlead.db'}}
auth: {{required: true}}
models: {{repositories: ['{tmp_path}/models'], control: explicit}}
{OBJECTIVES}
"""
    server = Server(parse_settings(text, "test"), None, text)
    await server.start()
    try:
        reliability = server.telemetry.reliability
        async with asyncio.timeout(10):
            while not reliability.slos.rounds or reliability.incidents.running is None:
                await asyncio.sleep(0.01)
        assert reliability.slos.shown()[0].reading.events.bad == 7
        assert reliability.incidents.running.incident.id == begun["id"]
        assert (await reliability.incidents.stop("me")).restarts == 1
    finally:
        await server.stop()


def test_a_configuration_is_shown_without_keys_whatever_they_look_like():
    text = """
gateway: {models: {gpt: {upstreams: [{url: 'https://up.example', key: plainword}, {url: 'https://two.example'}]}}}
traces: {endpoint: 'https://traces.example', headers: {x-team: anotherword}}
"""
    shown = shown_config(text)
    assert "https://up.example" in shown and "https://traces.example" in shown and "x-team" in shown
    assert "plainword" not in shown and "anotherword" not in shown
