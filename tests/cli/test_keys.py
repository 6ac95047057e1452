"""`fairlead keys`, `tenants`, `usage` and `audit`: on the store itself, and on a server over the network."""

import asyncio
import csv
import io
import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fairlead.api.admin import Admin
from fairlead.api.doorkeeper import CALLER
from fairlead.api.http_server import HttpServer
from fairlead.api.problems import Problems
from fairlead.api.web import json_app
from fairlead.cli import cli
from fairlead.cli.admin import seconds_of, time_of
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, Forbidden, Unauthenticated
from fairlead.core.policy import Scope
from fairlead.gateway.identity.keys import digest_of, parse_key
from fairlead.observe.finished import Finished
from fairlead.store.rows import AuditQuery, UsageRow
from fairlead.store.store import Store


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("FAIRLEAD_ADMIN_KEY", "FAIRLEAD_ADMIN_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def store(data: Path) -> Iterator[Store]:
    (data / "fairlead").mkdir()
    opened = Store.open(f"sqlite:///{data}/fairlead/fairlead.db")
    yield opened
    opened.close()


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if isinstance(result.exception, FairleadError):
        raise result.exception
    return result


def asked(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# On the store itself


def test_the_first_key_is_made_without_a_server_and_its_secret_alone_is_on_stdout(data: Path) -> None:
    result = run("keys", "create", "--scope", "admin", "--name", "first")
    secret = result.stdout.strip()
    id = parse_key(secret)
    assert id is not None
    assert "only time" in result.stderr and "curl -H 'Authorization: Bearer fl_" in result.stderr and "OpenAI(base_url=" in result.stderr
    assert secret not in result.stderr
    store = Store.open(f"sqlite:///{data}/fairlead/fairlead.db")
    assert store.key(id).digest == digest_of(secret)
    assert stat.S_IMODE((data / "fairlead").stat().st_mode) == 0o700
    (entry,) = store.audit(AuditQuery(), 10)
    assert (entry.action, entry.subject, entry.actor.partition(":")[0]) == ("key.create", id, "cli")
    store.close()


@pytest.mark.usefixtures("store")
def test_a_key_with_everything_that_can_be_said_of_it(tmp_path: Path) -> None:
    public = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    run("tenants", "create", "acme")
    run("tenants", "project", "acme", "app", "--limit", "requests_per_minute=60")
    key = asked(
        "keys", "create", "--tenant", "acme", "--project", "app", "--name", "laptop", "--scope", "infer", "--scope", "repository", "--model",
        "llama-*", "--model", "fraud", "--class", "interactive", "--limit", "tokens_per_minute=90000", "--limit", "concurrent=2", "--expires",
        "2126-01-01", "--public-key", tmp_path / "public.pem",
    )["key"]  # fmt: skip
    assert {name: key[name] for name in ("tenant", "project", "name", "scopes", "models", "class", "limits", "expires", "public_key")} == {
        "tenant": "acme",
        "project": "app",
        "name": "laptop",
        "scopes": ["infer", "repository"],
        "models": ["llama-*", "fraud"],
        "class": "interactive",
        "limits": {"tokens_per_minute": 90000.0, "concurrent": 2.0},
        "expires": "2126-01-01T00:00:00Z",
        "public_key": public.decode(),
    }
    assert asked("keys", "show", key["id"]) == key
    shown = run("keys", "show", key["id"]).stdout
    assert "llama-*, fraud" in shown and "tokens_per_minute=90000, concurrent=2" in shown


@pytest.mark.usefixtures("store")
def test_keys_are_listed_rotated_and_revoked() -> None:
    assert "no keys yet" in run("keys", "list").stderr
    old = asked("keys", "create")["key"]["id"]
    new = asked("keys", "rotate", old, "--overlap", "0s")["key"]["id"]
    assert "revoked" in run("keys", "revoke", new).stdout
    assert {key["id"]: key["state"] for key in asked("keys", "list")} == {old: "expired", new: "revoked"}
    table = run("keys", "list", "--state", "revoked").stdout
    assert new in table and old not in table
    with pytest.raises(FairleadError, match="there is no key nothing"):
        run("keys", "revoke", "nothing")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("command", [("keys", "show"), ("keys", "rotate"), ("keys", "revoke"), ("usage", "--key-id")])
def test_a_key_that_is_given_for_its_id_is_repeated_to_nobody(data: Path, command: tuple[str, ...]) -> None:
    secret = run("keys", "create").stdout.strip()
    told = run(*command, secret)
    assert told.exit_code == 2 and f"give its id, {parse_key(secret)}" in told.output
    assert secret not in told.output and secret[-32:] not in told.output
    assert run(*command, parse_key(secret)).exit_code == 0


def test_an_argument_that_is_no_utf_8_is_told_in_words(data: Path) -> None:
    for arguments in (("keys", "show", "\udcff"), ("tenants", "create", "\udcff"), ("audit", "--actor", "\udcff")):
        told = run(*arguments)
        assert told.exit_code == 2 and "is not UTF-8" in told.output, told.exception


def test_the_last_admin_key_is_revoked_with_force_only() -> None:
    id = asked("keys", "create", "--scope", "admin")["key"]["id"]
    with pytest.raises(FairleadError, match="last one with the scope `admin`"):
        run("keys", "revoke", id)
    assert asked("keys", "revoke", id, "--force")["state"] == "revoked"


@pytest.mark.usefixtures("store")
def test_tenants_are_made_changed_shown_and_deleted() -> None:
    run(
        "tenants",
        "create",
        "acme",
        "--class",
        "interactive",
        "--may-ask",
        "batch",
        "--limit",
        "money_per_month=50",
        "--model",
        "a",
        "--weight",
        2,
    )
    run("tenants", "set", "acme", "--limit", "money_per_month=", "--limit", "tokens_per_day=1e6", "--require-signature")
    acme = asked("tenants", "show", "acme")
    assert acme["policy"] == {
        "class": "interactive",
        "classes": ["batch"],
        "limits": {"tokens_per_day": 1e6},
        "models": ["a"],
        "weight": 2.0,
        "require_signature": True,
    }
    assert asked("tenants", "set", "acme", "--disable")["disabled"] is True
    assert asked("tenants", "set", "acme", "--enable", "--default-policy")["policy"] is None
    run("tenants", "project", "acme", "app", "--limit", "concurrent=3")
    assert asked("tenants", "show", "acme")["projects"][0]["limits"] == {"concurrent": 3.0}
    assert "concurrent=3" in run("tenants", "show", "acme").stdout
    run("tenants", "delete-project", "acme", "app")
    asked("keys", "create", "--tenant", "acme")
    with pytest.raises(FairleadError, match="keys that work"):
        run("tenants", "delete", "acme")
    run("tenants", "delete", "acme", "--force")
    assert [tenant["name"] for tenant in asked("tenants", "list")] == ["default"]
    assert "as in fairlead.yaml" in run("tenants", "list").stdout


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["keys", "create", "--limit", "tokens"], "'tokens' is not NAME=AMOUNT"),
        (["keys", "create", "--limit", "tokens_per_minute=many"], "is not NAME=AMOUNT"),
        (["keys", "create", "--expires", "soon"], "'soon' is neither a span"),
        (["keys", "create", "--scope", "root"], "'root' is not one of"),
        (["keys", "rotate", "x", "--overlap", "a while"], "is no span"),
        (["tenants", "set", "default"], "nothing to change"),
        (["tenants", "set", "default", "--default-policy", "--weight", "2"], "excludes"),
        (["usage", "--csv", "--json"], "exclude each other"),
    ],
)
def test_an_option_that_is_wrong_is_told_at_once(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.usefixtures("store")
def test_what_the_operations_refuse_names_the_field() -> None:
    with pytest.raises(FairleadError, match=r"^limits: `wishes_per_day` is no limit"):
        run("keys", "create", "--limit", "wishes_per_day=3")
    with pytest.raises(FairleadError, match=r"^expires: is in the past"):
        run("keys", "create", "--expires", "2020-01-01")
    with pytest.raises(FairleadError, match="no tenant `nobody`"):
        run("keys", "create", "--tenant", "nobody")


def test_the_store_and_the_classes_are_those_of_the_config(data: Path) -> None:
    (data / "fairlead.yaml").write_text(f"store: {{url: 'sqlite:///{data}/other.db'}}\ngateway: {{classes: {{gold: 1, standard: 0}}}}\n")
    assert asked("keys", "create", "--class", "gold", "--config", data / "fairlead.yaml")["key"]["class"] == "gold"
    with pytest.raises(FairleadError, match="'silver' is none of the classes gold, standard"):
        run("keys", "create", "--class", "silver", "--config", data / "fairlead.yaml")
    assert (data / "other.db").exists() and not (data / "fairlead").exists()


def test_usage_as_a_table_json_and_csv(store: Store) -> None:
    common = {"tenant": "acme", "key": "k", "outcome": "success", "seconds": 0.5}
    store.record([UsageRow(time=1_790_000_000.0 + n, request_id=str(n), model=f"m{n % 2}", input_tokens=10, **common) for n in range(5)])
    assert [(each["model"], each["requests"]) for each in asked("usage", "--by", "model")] == [("m0", 3), ("m1", 2)]
    table = run("usage").stdout
    assert "acme" in table and "input_tokens" in table and "megapixels" not in table
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "day,tenant", "--csv").stdout)))
    assert [(each["day"], each["requests"]) for each in rows] == [("2026-09-21", "5")]
    assert "no usage" in run("usage", "--to", "2020-01-01").stderr
    assert "m1" in run("usage", "--records", 3).stdout


def test_records_come_in_pages_and_as_many_as_are_wanted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairlead.cli.usage.PAGE", 2)
    store.record([UsageRow(time=float(n), request_id=str(n), tenant="t", model="m", outcome="success") for n in range(5)])
    lines = run("usage", "--records", 0, "--json").stdout.splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["4", "3", "2", "1", "0"]
    rows = list(csv.DictReader(io.StringIO(run("usage", "--records", 3, "--csv").stdout)))
    assert [each["request_id"] for each in rows] == ["4", "3", "2"]
    narrowed = run("usage", "--purge-before", "1d", "--tenant", "acme")
    assert narrowed.exit_code == 2 and "everybody" in narrowed.stderr
    assert "forgot 5 records" in run("usage", "--purge-before", "1d").stdout
    assert run("usage", "--records", 0, "--json").stdout == ""


def test_the_audit_log_is_shown(store: Store) -> None:
    run("tenants", "create", "acme", "--limit", "concurrent=2")
    table = run("audit").stdout
    assert "tenant.create" in table and "concurrent=2" in table
    assert [entry["subject"] for entry in asked("audit", "--action", "tenant.create", "--from", "1h")] == ["acme"]
    assert asked("audit", "--to", "1h") == []


def test_spans_dates_and_times() -> None:
    assert time_of("2d", now=lambda: 3 * 86400.0) == "1970-01-02T00:00:00+00:00"
    assert time_of("90m", ahead=True, now=lambda: 0.0) == "1970-01-01T01:30:00+00:00"
    assert time_of("2026-10-01") == "2026-10-01T00:00:00+00:00"
    assert time_of("2026-10-01T12:00:00+02:00") == "2026-10-01T12:00:00+02:00"
    assert seconds_of("1.5h") == 5400.0


# Over the network


@pytest.fixture
def server(store: Store) -> Iterator[str]:
    """The URL of an operations port that wants the key `good`."""

    async def admit(request: Any, scope: Scope | None) -> None:
        match request.headers.get("authorization"):
            case "Bearer good":
                request.scope[CALLER] = (Caller(key="k1"), "")
            case "Bearer poor":
                raise Forbidden(f"this key has no scope '{scope}'")
            case _:
                raise Unauthenticated("no such key")

    app = json_app([(each.method, each.path, each.serve, each.scope) for each in Admin(store).operations], {"/admin": Problems()}, admit)
    ready, end = threading.Event(), asyncio.Event()
    where: list[Any] = []

    async def serve() -> None:
        port = HttpServer(None, app, Finished())
        await port.listen(port=0)
        where.extend((port.port, asyncio.get_running_loop()))
        ready.set()
        await end.wait()
        await port.drain(1.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{where[0]}"
    where[1].call_soon_threadsafe(end.set)
    thread.join(30)


def test_a_running_server_is_asked_the_same(server: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_ADMIN_KEY", "good")
    monkeypatch.setenv("FAIRLEAD_ADMIN_URL", server)
    run("tenants", "create", "acme", "--class", "batch")
    secret = run("keys", "create", "--tenant", "acme").stdout.strip()
    key = store.key(parse_key(secret) or "")
    assert (key.tenant, key.created_by) == ("acme", "k1")
    assert [each["id"] for each in asked("keys", "list")] == [key.id]
    assert [each["actor"] for each in asked("audit")] == ["k1", "k1"]
    assert run("usage", "--csv").stdout.startswith("tenant,model,requests")
    with pytest.raises(FairleadError, match="there is no tenant `nobody`"):
        run("tenants", "show", "nobody")


def test_a_server_that_does_not_let_in_or_is_not_there_says_so(server: str) -> None:
    with pytest.raises(FairleadError, match=r"no such key \(give a key with the scope admin: FAIRLEAD_ADMIN_KEY or --key\)"):
        run("keys", "list", "--url", server)
    with pytest.raises(FairleadError, match="no scope 'admin'"):
        run("keys", "list", "--url", server, "--key", "poor")
    with pytest.raises(FairleadError, match="Is `fairlead serve` running there"):
        run("keys", "list", "--url", "http://127.0.0.1:1")
    for url in ("somewhere", "http://127.0.0.1:99999"):
        with pytest.raises(FairleadError, match="--url must look like"):
            run("keys", "list", "--url", url)
    for key in ("fl_good\nsecret", "fl_good\r\nX-Admin: yes", "fl_gööd"):
        with pytest.raises(FairleadError, match="holds no key: there is a line break in it") as told:
            run("keys", "list", "--url", server, "--key", key)
        assert "fl_g" not in told.value.message
    with pytest.raises(FairleadError, match="exclude each other"):
        run("keys", "list", "--url", server, "--config", "fairlead.yaml")
