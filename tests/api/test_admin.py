"""The administration's operations, as an HTTP client sees them, on a real store."""

import csv
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from openapi_spec_validator import OpenAPIV31SpecValidator

from fairlead.api.admin import Admin
from fairlead.api.doorkeeper import CALLER
from fairlead.api.ops import ops_app
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.core.caller import Caller
from fairlead.core.errors import ConfigError
from fairlead.core.policy import Scope
from fairlead.gateway.identity.keys import digest_of, parse_key, signing_key_of
from fairlead.observe.metrics import Metrics
from fairlead.store.rows import UsageRow
from fairlead.store.store import Store
from tests.stores import new_store

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
DAY = 86400


class Policies:
    """A server's configuration, without the server."""

    def __init__(self) -> None:
        self.version = 1
        self.said: list[str] = ["a: 1"]
        self.by: list[str] = []

    def text(self) -> str:
        return self.said[-1]

    async def put(self, text: str, actor: str) -> int:
        if "wrong" in text:
            raise ConfigError("fairlead.yaml:1: unknown key `wrong`")
        self.said.append(text)
        return self._next(actor)

    async def rollback(self, actor: str) -> int:
        self.said.pop()
        return self._next(actor)

    async def reload(self, actor: str) -> int:
        return self._next(actor)

    def _next(self, actor: str) -> int:
        self.by.append(actor)
        self.version += 1
        return self.version


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = new_store(tmp_path)
    yield opened
    opened.close()


class Clock:
    now = NOW


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policies() -> Policies:
    return Policies()


@pytest.fixture
async def client(store: Store, clock: Clock, policies: Policies) -> AsyncIterator[httpx2.AsyncClient]:
    admin = Admin(store, policies, lambda: ("interactive", "standard"), lambda: clock.now)

    async def admit(request: Any, scope: Scope | None) -> None:
        assert scope is Scope.ADMIN
        request.scope[CALLER] = (Caller(key="boss", address="10.0.0.9"), "")

    app = json_app([(each.method, each.path, each.serve, each.scope) for each in admin.operations], {"/admin": Problems()}, admit)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as asking:
        yield asking


def problem(answer: httpx2.Response) -> tuple[int, list[str], str]:
    """(status, fields that are wrong, what is said)."""
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code and body["title"]
    return answer.status_code, [each["field"] for each in body.get("errors", [])], body["detail"]


# Tenants and projects


async def test_a_tenant_from_its_beginning_to_its_end(client: httpx2.AsyncClient) -> None:
    made = await client.post(
        "/admin/tenants", json={"name": "acme", "policy": {"class": "interactive", "limits": {"tokens_per_minute": 9}}}
    )
    acme = {
        "name": "acme",
        "policy": {"class": "interactive", "limits": {"tokens_per_minute": 9.0}},
        "created": "2026-09-21T14:13:20Z",
        "disabled": False,
    }
    assert (made.status_code, made.json()) == (200, acme)
    assert [each["name"] for each in (await client.get("/admin/tenants")).json()["tenants"]] == ["acme", "default"]
    assert (await client.get("/admin/tenants/acme")).json() == acme
    assert problem(await client.post("/admin/tenants", json={"name": "acme"}))[0] == 409
    assert (await client.delete("/admin/tenants/acme")).json() == {"deleted": 1}
    assert problem(await client.get("/admin/tenants/acme"))[0] == 404


async def test_a_patch_changes_what_it_names_and_null_takes_away(client: httpx2.AsyncClient) -> None:
    limits = {"tokens_per_minute": 9, "concurrent": 3}
    await client.post("/admin/tenants", json={"name": "acme", "policy": {"limits": limits, "models": ["a"]}})
    changed = await client.patch(
        "/admin/tenants/acme", json={"policy": {"limits": {"concurrent": None, "rows_per_second": 2}}, "disabled": True}
    )
    assert changed.json()["policy"] == {"limits": {"tokens_per_minute": 9.0, "rows_per_second": 2.0}, "models": ["a"]}
    assert changed.json()["disabled"] is True
    enabled = await client.patch("/admin/tenants/acme", json={"disabled": False, "policy": None})
    assert (enabled.json()["policy"], enabled.json()["disabled"]) == (None, False)


async def test_a_patch_of_a_tenant_without_a_policy_makes_one(client: httpx2.AsyncClient) -> None:
    changed = await client.patch("/admin/tenants/default", json={"policy": {"weight": 2}})
    assert changed.json()["policy"] == {"weight": 2.0}


async def test_projects_are_put_listed_and_deleted(client: httpx2.AsyncClient) -> None:
    for limit in (1, 2):
        put = await client.put("/admin/tenants/default/projects/app", json={"limits": {"concurrent": limit}})
        assert put.json()["limits"] == {"concurrent": float(limit)}
    listed = (await client.get("/admin/tenants/default/projects")).json()["projects"]
    assert [(each["name"], each["limits"]) for each in listed] == [("app", {"concurrent": 2.0})]
    await client.post("/admin/keys", json={"project": "app"})
    assert problem(await client.delete("/admin/tenants/default/projects/app"))[0] == 409
    assert problem(await client.get("/admin/tenants/nobody/projects"))[0] == 404
    assert problem(await client.put("/admin/tenants/nobody/projects/app", json={}))[0] == 404
    assert problem(await client.put("/admin/tenants/default/projects/a%20b", json={}))[:2] == (400, ["project"])


# Keys


async def test_a_keys_secret_is_shown_once_and_only_what_proves_it_is_stored(client: httpx2.AsyncClient, store: Store) -> None:
    made = await client.post(
        "/admin/keys", json={"name": "laptop", "expires": "2026-12-31T00:00:00Z", "class": "interactive", "models": ["llama-*"]}
    )
    secret, shown = made.json()["secret"], made.json()["key"]
    assert made.headers["cache-control"] == "no-store"
    assert parse_key(secret) == shown["id"]
    row = store.key(shown["id"])
    assert (row.digest, row.signing_key, row.created_by) == (digest_of(secret), signing_key_of(secret), "boss")
    assert (shown["state"], shown["scopes"], shown["models"], shown["class"]) == ("live", ["infer"], ["llama-*"], "interactive")
    for path in ("/admin/keys", f"/admin/keys/{row.id}", "/admin/audit"):
        text = (await client.get(path)).text
        assert row.id in text
        assert not any(each in text for each in (secret, row.digest, row.signing_key))


async def test_a_rotated_key_and_its_successor_work_side_by_side_for_a_while(
    client: httpx2.AsyncClient, store: Store, clock: Clock
) -> None:
    body = {"name": "app", "scopes": ["infer", "repository"], "limits": {"concurrent": 2}, "expires": "2026-10-21T14:13:20Z"}
    old = (await client.post("/admin/keys", json=body)).json()
    clock.now += 20 * DAY
    answer = (await client.post(f"/admin/keys/{old['key']['id']}/rotate", json={"overlap_seconds": 60})).json()
    new = answer["key"]
    assert (new["replaces"], new["name"], new["scopes"], new["limits"]) == (
        old["key"]["id"],
        "app",
        ["infer", "repository"],
        {"concurrent": 2.0},
    )
    # As long as the old one was given: thirty days.
    assert new["expires"] == "2026-11-10T14:13:20Z"
    assert store.key(new["id"]).digest == digest_of(answer["secret"]) != digest_of(old["secret"])

    async def states() -> dict[str, str]:
        return {each["id"]: each["state"] for each in (await client.get("/admin/keys")).json()["keys"]}

    assert await states() == {old["key"]["id"]: "live", new["id"]: "live"}
    clock.now += 60
    assert await states() == {old["key"]["id"]: "expired", new["id"]: "live"}
    assert problem(await client.post(f"/admin/keys/{old['key']['id']}/rotate"))[0] == 409


async def test_a_key_that_is_given_for_its_id_is_not_repeated(client: httpx2.AsyncClient) -> None:
    secret = (await client.post("/admin/keys", json={})).json()["secret"]
    for method, path in (("GET", ""), ("POST", "/rotate"), ("POST", "/revoke")):
        answer = await client.request(method, f"/admin/keys/{secret}{path}")
        assert problem(answer)[:2] == (400, ["key"]) and secret not in answer.text


async def test_the_last_admin_key_is_revoked_by_force_only(client: httpx2.AsyncClient) -> None:
    id = (await client.post("/admin/keys", json={"scopes": ["admin"]})).json()["key"]["id"]
    status, _, detail = problem(await client.post(f"/admin/keys/{id}/revoke"))
    assert status == 409 and "last one with the scope `admin`" in detail
    assert problem(await client.patch("/admin/tenants/default", json={"disabled": True}))[0] == 409
    assert (await client.post(f"/admin/keys/{id}/revoke", json={"force": True})).json()["state"] == "revoked"
    assert [each["id"] for each in (await client.get("/admin/keys?state=revoked")).json()["keys"]] == [id]
    assert (await client.get("/admin/keys?state=live")).json() == {"keys": []}


def pem(private: Any) -> str:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


async def test_a_public_key_for_signatures_is_checked(client: httpx2.AsyncClient) -> None:
    private = Ed25519PrivateKey.generate()
    made = await client.post("/admin/keys", json={"public_key": pem(private)})
    assert made.json()["key"]["public_key"] == pem(private)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    status, fields, detail = problem(await client.post("/admin/keys", json={"public_key": secret}))
    assert (status, fields) == (400, ["public_key"]) and "keep it to yourself" in detail
    for wrong in (pem(generate_private_key(65537, 2048)), "nonsense", ""):
        assert problem(await client.post("/admin/keys", json={"public_key": wrong}))[:2] == (400, ["public_key"])


# Bad input


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/admin/tenants", {}, "name"),
        ("/admin/tenants", {"name": "a b"}, "name"),
        ("/admin/tenants", {"name": "acme\n"}, "name"),
        ("/admin/tenants", {"name": "../../etc"}, "name"),
        ("/admin/tenants", {"name": "x" * 129}, "name"),
        ("/admin/tenants", {"name": "a", "color": "red"}, "color"),
        ("/admin/tenants", {"name": "a", "policy": {"limits": {"tokens_per_fortnight": 1}}}, "policy"),
        ("/admin/tenants", {"name": "a", "policy": {"limits": {"concurrent": -1}}}, "policy.limits[...]"),
        ("/admin/tenants", {"name": "a", "policy": {"wait": 1}}, "policy.wait"),
        ("/admin/tenants", {"name": "a", "policy": {"class": "gold"}}, "policy.class"),
        ("/admin/tenants", {"name": "a", "policy": {"classes": ["gold"]}}, "policy.classes"),
        ("/admin/keys", {"scopes": ["everything"]}, "scopes[0]"),
        ("/admin/keys", {"scopes": []}, "scopes"),
        ("/admin/keys", {"models": [""]}, "models[0]"),
        ("/admin/keys", {"class": "gold"}, "class"),
        ("/admin/keys", {"name": "a\x00b"}, "name"),
        ("/admin/keys", {"limits": {"wishes_per_day": 3}}, "limits"),
        ("/admin/keys", {"expires": "2020-01-01T00:00:00Z"}, "expires"),
        ("/admin/keys", {"expires": "2027-01-01T00:00:00"}, "expires"),
        ("/admin/keys/x/rotate", {"overlap_seconds": -1}, "overlap_seconds"),
    ],
)
async def test_what_is_wrong_is_refused_by_the_name_of_its_field(client: httpx2.AsyncClient, path: str, body: Any, field: str) -> None:
    assert problem(await client.post(path, json=body))[:2] == (400, [field])


async def test_a_patch_that_is_wrong_names_its_field_and_changes_nothing(client: httpx2.AsyncClient, store: Store) -> None:
    before = store.revision()
    assert problem(await client.patch("/admin/tenants/default", json={"policy": {"weight": 0}}))[:2] == (400, ["policy.weight"])
    assert problem(await client.patch("/admin/tenants/default", json={"policy": {"class": "gold"}}))[:2] == (400, ["policy.class"])
    assert problem(await client.patch("/admin/tenants/default", json={"name": "other"}))[:2] == (400, ["name"])
    assert store.revision() == before


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("usage?by=colour", "by"),
        ("usage?from=yesterday", "from"),
        ("usage?from=2026-10-02&to=2026-10-01", "to"),
        ("usage?tenant=a&tenant=b", "tenant"),
        ("usage?color=red", "color"),
        ("usage?format=xml", "format"),
        ("usage/records?limit=0", "limit"),
        ("usage/records?limit=10001", "limit"),
        ("usage/records?cursor=abc", "cursor"),
        ("audit?cursor=abc", "cursor"),
        ("keys?state=odd", "state"),
        ("tenants?page=2", "page"),
    ],
)
async def test_a_query_that_is_wrong_is_refused_by_its_name(client: httpx2.AsyncClient, query: str, field: str) -> None:
    assert problem(await client.get(f"/admin/{query}"))[:2] == (400, [field])


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("GET", "/admin/usage?tenant=a%00b", None, "tenant"),
        ("GET", "/admin/usage/records?model=%00", None, "model"),
        ("GET", "/admin/audit?subject=a%00", None, "subject"),
        ("GET", "/admin/keys?project=%00", None, "project"),
        ("GET", "/admin/tenants/a%00", None, "tenant"),
        ("DELETE", "/admin/tenants/default/projects/%00", None, "project"),
        ("PUT", "/admin/tenants/a%00/projects/p", {}, "tenant"),
        ("POST", "/admin/keys/a%00/revoke", {}, "key"),
        ("POST", "/admin/tenants", {"name": "acme", "policy": {"models": ["a\0b"]}}, "policy.models"),
        ("PATCH", "/admin/tenants/default", {"policy": {"filters": {"deny": {"words": ["\0"]}}}}, "policy.filters.deny.words"),
    ],
)
async def test_a_nul_which_postgresql_takes_nowhere_is_refused_before_it_gets_there(
    client: httpx2.AsyncClient, method: str, path: str, body: Any, field: str
) -> None:
    status, fields, detail = problem(await client.request(method, path, json=body))
    assert (status, fields) == (400, [field]) and "NUL" in detail


async def test_what_is_no_json_no_path_and_no_method_is_a_problem_too(client: httpx2.AsyncClient) -> None:
    assert problem(await client.post("/admin/keys", content=b"{"))[0] == 400
    assert problem(await client.post("/admin/keys", content=b"[" * 5000))[0] == 400
    assert problem(await client.post("/admin/keys", content=b"[]"))[0] == 400
    assert problem(await client.post("/admin/keys", content=b" " * (1 << 21)))[0] == 413
    assert problem(await client.get("/admin/nothing"))[0] == 404
    assert problem(await client.post("/admin/audit"))[0] == 405


async def test_a_page_of_another_site_cannot_use_an_administrators_browser(client: httpx2.AsyncClient) -> None:
    for origin in ("https://evil.example", "null", "http://server:81"):
        assert problem(await client.post("/admin/keys", content=b"", headers={"Origin": origin}))[0] == 403
    assert (await client.get("/admin/keys")).json() == {"keys": []}
    assert (await client.post("/admin/keys", headers={"Origin": "http://server"})).status_code == 200


# Usage and audit


@pytest.fixture
def used(store: Store) -> None:
    common = {"tenant": "acme", "key": "k", "outcome": "success"}
    store.record(
        [
            UsageRow(time=NOW, request_id="1", model="llama", input_tokens=10, output_tokens=5, cost=0.5, **common),
            UsageRow(time=NOW + 1, request_id="2", model="llama", input_tokens=1, cost=0.25, **common),
            UsageRow(time=NOW + DAY, request_id="3", model="=cmd()", **common),
        ]
    )


@pytest.mark.usefixtures("used")
async def test_usage_is_added_up_as_json_and_as_csv(client: httpx2.AsyncClient) -> None:
    groups = (await client.get("/admin/usage?by=day,model&to=2026-09-22")).json()["groups"]
    assert [(each["day"], each["model"], each["requests"], each["input_tokens"], each["cost"]) for each in groups] == [
        ("2026-09-21", "llama", 2, 11, 0.75)
    ]
    for answer in (
        await client.get("/admin/usage?by=model&format=csv"),
        await client.get("/admin/usage?by=model", headers={"Accept": "text/csv"}),
    ):
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        # What a spreadsheet would compute is quoted.
        assert [(each["model"], each["requests"]) for each in rows] == [("'=cmd()", "1"), ("llama", "2")]
    assert (await client.get("/admin/usage?tenant=nobody")).json() == {"groups": []}


@pytest.mark.usefixtures("used")
async def test_records_are_paged(client: httpx2.AsyncClient) -> None:
    first = (await client.get("/admin/usage/records?limit=2")).json()
    rest = (await client.get("/admin/usage/records", params={"limit": 2, "cursor": first["next"]})).json()
    assert [each["request_id"] for each in (*first["records"], *rest["records"])] == ["3", "2", "1"]
    assert (first["records"][0]["time"], rest["next"]) == ("2026-09-22T14:13:20Z", None)
    sheet = await client.get("/admin/usage/records?limit=2&format=csv")
    again = await client.get("/admin/usage/records", params={"format": "csv", "cursor": sheet.headers["x-next-cursor"]})
    assert [each["request_id"] for each in csv.DictReader(io.StringIO(again.text))] == ["1"]


@pytest.mark.usefixtures("used")
async def test_old_records_are_forgotten_but_not_their_sums(client: httpx2.AsyncClient) -> None:
    assert (await client.delete("/admin/usage/records?before=2026-09-22")).json() == {"deleted": 2}
    assert len((await client.get("/admin/usage/records")).json()["records"]) == 1
    assert (await client.get("/admin/usage")).json()["groups"][0]["requests"] == 3
    assert problem(await client.delete("/admin/usage/records"))[:2] == (400, ["before"])


async def test_every_change_is_in_the_audit_log_with_who_and_from_where(client: httpx2.AsyncClient) -> None:
    await client.post("/admin/tenants", json={"name": "acme"})
    await client.patch("/admin/tenants/acme", json={"policy": {"weight": 2}})
    await client.put("/admin/tenants/acme/projects/app", json={})
    id = (await client.post("/admin/keys", json={"tenant": "acme"})).json()["key"]["id"]
    new = (await client.post(f"/admin/keys/{id}/rotate")).json()["key"]["id"]
    await client.post(f"/admin/keys/{new}/revoke", json={"force": True})
    await client.delete("/admin/tenants/acme/projects/app")
    await client.delete("/admin/tenants/acme?force=true")
    entries = (await client.get("/admin/audit")).json()["entries"]
    assert [(each["action"], each["subject"]) for each in reversed(entries)] == [
        ("tenant.create", "acme"),
        ("tenant.change", "acme"),
        ("project.put", "acme/app"),
        ("key.create", id),
        ("key.rotate", id),
        ("key.revoke", new),
        ("project.delete", "acme/app"),
        ("tenant.delete", "acme"),
    ]
    assert {(each["actor"], each["address"], each["time"]) for each in entries} == {("boss", "10.0.0.9", "2026-09-21T14:13:20Z")}
    assert entries[-2]["details"] == {"policy": {"weight": 2}}
    page = (await client.get("/admin/audit?limit=3&action=key.create")).json()
    assert [each["subject"] for each in page["entries"]] == [id]


# Configuration


async def test_the_configuration_is_read_put_and_taken_back(client: httpx2.AsyncClient, policies: Policies) -> None:
    assert (await client.get("/admin/config")).json() == {"version": 1, "text": "a: 1", "versions": []}
    assert (await client.put("/admin/config", content=b"a: 2")).json() == {"version": 2}
    assert (await client.get("/admin/config")).json()["text"] == "a: 2"
    status, _, detail = problem(await client.put("/admin/config", content=b"wrong: 1"))
    assert (status, detail) == (400, "fairlead.yaml:1: unknown key `wrong`")
    assert problem(await client.put("/admin/config", content=b"\xff"))[0] == 400
    assert (await client.post("/admin/config/rollback")).json() == {"version": 3}
    assert (await client.post("/admin/config/reload")).json() == {"version": 4}
    assert (policies.text(), policies.by) == ("a: 1", ["boss", "boss", "boss"])


async def test_where_no_server_runs_there_is_no_configuration_to_change(store: Store) -> None:
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in Admin(store).operations], {"/admin": Problems()})
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        assert problem(await client.get("/admin/config"))[0] == 501


async def test_a_store_that_is_gone_is_a_503_that_tells_nothing_of_its_statements(client: httpx2.AsyncClient, store: Store) -> None:
    with store._writing.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO keyes")
    status, _, detail = problem(await client.get("/admin/keys"))
    assert status == 503 and "SELECT" not in detail


async def test_the_operations_port_describes_itself(store: Store) -> None:
    class Ready:
        ready, stopping = True, False

    app = ops_app(Ready(), Metrics().scrape, Admin(store).operations)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://here") as client:
        described = (await client.get("/admin/openapi.json")).json()
    OpenAPIV31SpecValidator(described).validate()
    assert described["paths"].keys() == {operation.path for operation in Admin(store).operations}
    refusals = described["paths"]["/admin/keys"]["get"]["responses"]["403"]["$ref"].rpartition("/")[2]
    assert list(described["components"]["responses"][refusals]["content"]) == ["application/problem+json"]


@pytest.mark.parametrize(("host", "status"), [("localhost:8002", 200), ("127.0.0.1", 200), ("[::1]:8002", 200), ("evil.example", 403)])
async def test_a_page_whose_name_was_made_to_point_here_cannot_administer_an_open_server(store: Store, host: str, status: int) -> None:
    app = json_app([(each.method, each.path, each.serve, each.scope) for each in Admin(store).operations], {"/admin": Problems()})
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/admin/keys", headers={"host": host, "origin": f"http://{host}"})).status_code == status
