"""`fairlead serve` as those see it who run it for others: processes, their store, their Redis, their signals."""

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from fairlead.cli import cli
from fairlead.gateway.identity.keys import parse_key, signing_key_of
from fairlead.gateway.signing import sign
from fairlead.store.rows import Dimension, UsageQuery
from fairlead.store.store import Store
from tests.gateway.limits.servers import RedisServer
from tests.servers import IDENTITY, Serving, serving, write_model

BODY = json.dumps({"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
INFER = "/v2/models/identity/infer"
SECONDS = 30.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "identity", IDENTITY)
    return folder


def command(*arguments: object) -> Any:
    """What a command of ours says with --json, in this process."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "fairlead", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)  # between looks at another process's doings


class Client:
    """One connection to a server's data port."""

    def __init__(self, server: Serving, key: str = "", **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.http).port, timeout=SECONDS)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            self.headers["authorization"] = f"Bearer {key}"

    def infer(self, **headers: str) -> tuple[int, dict[str, str]]:
        """(status, headers)."""
        self.connection.request("POST", INFER, BODY, self.headers | headers)
        response = self.connection.getresponse()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}

    def status(self) -> int:
        return self.infer()[0]

    def close(self) -> None:
        self.connection.close()


def asked(server: Serving, key: str = "", **headers: str) -> tuple[int, dict[str, str]]:
    with closing(Client(server, key, **headers)) as client:
        return client.infer()


def configured(folder: Path, text: str = "", name: str = "fairlead.yaml") -> Path:
    path = folder / name
    path.write_text(f"store: {{url: 'sqlite:///{folder}/fairlead.db', flush_seconds: 0.2}}\nlogs: {{requests: false}}\n{text}")
    return path


# Beyond loopback


def test_listening_beyond_loopback_needs_a_key_and_the_command_that_makes_one_is_named(models: Path, tmp_path: Path) -> None:
    config = configured(tmp_path)
    ports = ("--port", 0, "--grpc-port", 0, "--ops-port", 0)
    code, _, said = run("serve", models, "--config", config, "--host", "0.0.0.0", *ports)
    assert code == 2
    assert f"there is none: make one with `fairlead keys create --config {config} --scope infer --scope admin`" in said.splitlines()[-1]
    assert "Traceback" not in said

    code, out, said = run("keys", "create", "--scope", "infer", "--scope", "admin", "--config", config)
    key = out.strip()
    assert (code, key.count("\n")) == (0, 0) and parse_key(key)
    with serving(models, "--config", config, "--host", "0.0.0.0") as server:
        server.wait_for("model loaded")
        line = server.wait_for("serving")
        assert line["callers"] == "must show who they are"
        server.http, server.ops = line["http"], line["ops"]
        assert asked(server)[0] == 401
        assert asked(server, key)[0] == 200
        assert asked(server, key[:-1] + "x")[0] == 401
        assert server.get("/healthz") == (200, {"live": True, "ready": True})
        assert server.get("/metrics", url=server.ops)[0] == 200
        status, problem = server.get("/admin/keys", url=server.ops)
        assert (status, problem["title"]) == (401, "Unauthorized")

        place = ("--url", server.ops, "--key", key)
        tenant = command("tenants", "create", "acme", "--limit", "requests_per_day=3", *place)
        assert tenant["name"] == "acme"
        assert [each["name"] for each in command("tenants", "list", *place)] == ["acme", "default"]
        made = command("keys", "create", "--tenant", "acme", "--model", "ident*", *place)
        until(lambda: asked(server, made["secret"])[0] == 200)
        assert server.get("/v2/models/identity", headers={"authorization": f"Bearer {made['secret']}"})[0] == 200
        assert [asked(server, made["secret"])[0] for _ in range(3)] == [200, 200, 429]
        until(lambda: sum(each["requests"] for each in command("usage", "--tenant", "acme", *place)) == 4)
        outcomes = {each["outcome"]: each["requests"] for each in command("usage", "--by", "outcome", "--tenant", "acme", *place)}
        assert outcomes == {"success": 3, "refused": 1}
        entries = command("audit", *place)
        assert [each["action"] for each in entries] == ["key.create", "tenant.create", "key.create"]
        assert [each["actor"] for each in entries[:2]] == [parse_key(key)] * 2
        assert server.terminate() == 0


# Two gateways, one store, one Redis


class Pair:
    """`local` and `refuse` say what each does while Redis is gone."""

    def __init__(self, config: Path, local: Serving, refuse: Serving, redis: RedisServer, admin: str) -> None:
        self.config, self.local, self.refuse, self.redis, self.admin = config, local, refuse, redis, admin

    @property
    def both(self) -> tuple[Serving, Serving]:
        return self.local, self.refuse

    def key(self, *options: object) -> str:
        """A new one, known to both."""
        secret: str = command("keys", "create", *options, "--config", self.config)["secret"]
        for server in self.both:
            until(lambda server=server: models_of(server, secret) == 200)
        return secret


def models_of(server: Serving, key: str) -> int:
    return server.get("/v2/models/identity", headers={"authorization": f"Bearer {key}"})[0]


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    redis = RedisServer(folder)
    redis.start()
    configs = [
        configured(
            folder,
            f"auth: {{required: true}}\ngateway: {{redis_url: '{redis.url}', limits: {{redis: true, redis_gone: {gone}}}}}\n",
            f"{gone}.yaml",
        )
        for gone in ("local", "refuse")
    ]
    admin = command("keys", "create", "--scope", "infer", "--scope", "admin", "--config", configs[0])["secret"]
    with ExitStack() as stack:
        stack.callback(redis.kill)
        local, refuse = (stack.enter_context(serving(models, "--config", config)) for config in configs)
        yield Pair(configs[0], local.begin(), refuse.begin(), redis, admin)


def test_a_revoked_key_is_refused_by_every_gateway_of_the_store(pair: Pair) -> None:
    key = pair.key()
    with closing(Client(pair.local, key)) as one, closing(Client(pair.refuse, key)) as other:
        assert (one.status(), other.status()) == (200, 200)
        code, _, _ = run("keys", "revoke", parse_key(key), "--config", pair.config)
        assert code == 0
        revoked = time.monotonic()
        until(lambda: asked(pair.local, key)[0] == 401 and asked(pair.refuse, key)[0] == 401)
        assert time.monotonic() - revoked < 5.0  # half a second, on a machine that has nothing else to do
        assert one.status() == 401


def test_a_disabled_tenant_s_keys_are_refused_by_both_and_come_back(pair: Pair) -> None:
    command("tenants", "create", "closed", "--config", pair.config)
    key = pair.key("--tenant", "closed")
    command("tenants", "set", "closed", "--disable", "--config", pair.config)
    until(lambda: [asked(server, key)[0] for server in pair.both] == [401, 401])
    command("tenants", "set", "closed", "--enable", "--config", pair.config)
    until(lambda: [asked(server, key)[0] for server in pair.both] == [200, 200])


def test_two_gateways_admit_together_no_more_than_the_limit(pair: Pair) -> None:
    key = pair.key("--limit", "requests_per_day=25")

    def some(server: Serving) -> list[int]:
        with closing(Client(server, key)) as client:
            return [client.status() for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        statuses = Counter(status for each in pool.map(some, pair.both * 3) for status in each)
    assert statuses == {200: 25, 429: 35}
    _, headers = asked(pair.local, key)
    assert (headers["x-ratelimit-remaining-requests"], headers["x-fairlead-reason"]) == ("0", "budget-requests")


def test_a_signed_request_counts_once_for_both(pair: Pair) -> None:
    headers = {"host": "models.test", **sign("POST", f"http://models.test{INFER}", BODY, **signing(pair.key()))}
    assert asked(pair.local, **headers)[0] == 200
    assert [asked(server, **headers)[0] for server in pair.both] == [401, 401]


def signing(key: str) -> dict[str, Any]:
    """What `sign` needs of it."""
    return {"keyid": parse_key(key), "secret": bytes.fromhex(signing_key_of(key)), "now": time.time()}


def test_while_redis_is_gone_one_goes_on_by_itself_and_the_other_refuses_what_has_a_limit(pair: Pair) -> None:
    limited, free = pair.key("--limit", "requests_per_day=10"), pair.key()
    assert [asked(server, limited)[0] for server in pair.both] == [200, 200]
    pair.redis.kill()
    try:
        until(lambda: asked(pair.refuse, limited)[0] == 503)
        status, headers = asked(pair.refuse, limited)
        assert (status, headers["x-fairlead-reason"]) == (503, "limits-unreachable")
        assert [asked(server, free)[0] for server in pair.both] == [200, 200]
        signed = sign("POST", f"http://models.test{INFER}", BODY, **signing(free))
        status, headers = asked(pair.local, host="models.test", **signed)
        assert (status, headers["x-fairlead-reason"]) == (503, "redis-gone")
        statuses = [asked(pair.local, limited)[0] for _ in range(14)]
        assert statuses == sorted(statuses) and 8 <= statuses.count(200) <= 10
        assert "fairlead_limits_redis_outages_total 1.0" in pair.local.get("/metrics", url=pair.local.ops)[1]
    finally:
        pair.redis.start()
    other = pair.key("--limit", "requests_per_day=1000")
    until(lambda: asked(pair.refuse, other)[0] == 200)


# What changes while a server runs


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path, str]]:
    """A server with a file that changes, and a key for everything."""
    folder = tmp_path_factory.mktemp("alone")
    config = configured(folder, POLICIES.format(limit=50))
    key = command("keys", "create", "--scope", "infer", "--scope", "admin", "--config", config)["secret"]
    with serving(models, "--config", config) as server:
        yield server.begin(), config, key


POLICIES = "auth: {{required: true}}\ngateway: {{tenants: {{default: {{limits: {{requests_per_minute: {limit}}}}}}}}}\n"


def limit_of(server: Serving, key: str) -> str:
    return asked(server, key)[1]["x-ratelimit-limit-requests"]


def put(server: Serving, path: str, key: str, text: str = "", method: str = "PUT") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.ops).port, timeout=SECONDS)
    with closing(connection):
        connection.request(method, path, text.encode(), {"authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_a_signal_makes_it_read_the_file_again_and_a_broken_file_changes_nothing(alone: tuple[Serving, Path, str]) -> None:
    server, config, key = alone
    first = config.read_text()
    assert limit_of(server, key) == "50"
    config.write_text(first.replace("requests_per_minute: 50", "requests_per_minute: 70"))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("configured")
    assert limit_of(server, key) == "70"
    for broken in (
        "gateway: [",
        first + "unknown: 1\n",
        first.replace("requests_per_minute", "requests_per_moon"),
        "auth: {required: false}\n",
    ):
        config.write_text(broken)
        server.process.send_signal(signal.SIGHUP)
        assert server.wait_for("not_configured")["level"] == "error"
        assert limit_of(server, key) == "70"
    config.unlink()
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("not_configured")
    assert limit_of(server, key) == "70"
    config.write_text(first)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("configured")
    assert limit_of(server, key) == "50"


def test_an_administrator_changes_the_policies_and_takes_the_change_back(alone: tuple[Serving, Path, str]) -> None:
    server, config, key = alone
    first = config.read_text()
    before = put(server, "/admin/config", key, method="GET")[1]["version"]
    status, answer = put(server, "/admin/config", key, first.replace("requests_per_minute: 50", "requests_per_minute: 90"))
    assert (status, answer["version"]) == (200, before + 1)
    assert limit_of(server, key) == "90"
    for broken in ("gateway: [", first + "unknown: 1\n", first.replace("required: true", "required: false")):
        status, problem = put(server, "/admin/config", key, broken)
        assert status == 400 and problem["detail"]
        assert limit_of(server, key) == "90"
    assert put(server, "/admin/config/rollback", key, method="POST")[0] == 200
    assert limit_of(server, key) == "50"
    actions = [each["action"] for each in command("audit", "--limit", 2, "--url", server.ops, "--key", key)]
    assert actions == ["config.rollback", "config.put"]
    plain = command("keys", "create", "--config", config)["secret"]
    until(lambda: asked(server, plain)[0] == 200)
    assert put(server, "/admin/config", plain, first)[0] == 403


# The books


@contextmanager
def clients(server: Serving, key: str, number: int = 4) -> Iterator[Counter[int]]:
    """Askers without pause until the server goes away, and what they were answered."""
    answers: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                with closing(Client(server, key)) as client:
                    while not stop.is_set():
                        answers[client.status()] += 1
            except (OSError, http.client.HTTPException):
                if server.process.poll() is not None or not_listening(server):
                    return

    threads = [threading.Thread(target=ask) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)


def not_listening(server: Serving) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(server.http).port or 0), timeout=5).close()
    except OSError:
        return True
    return False


def booked(store: Store, *outcomes: str) -> int:
    return int(sum(each.requests for each in store.usage(UsageQuery(), (Dimension.OUTCOME,)) if each.group[0] in outcomes))


def test_the_books_are_complete_after_sigterm_all_but_complete_after_sigkill_and_budgets_go_on(models: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, "auth: {required: true}\n")
    key = command("keys", "create", "--limit", "requests_per_day=1000000", "--config", config)["secret"]
    with closing(Store.open(f"sqlite:///{tmp_path}/fairlead.db")) as store:
        with serving(models, "--config", config) as server:
            server.begin()
            with clients(server, key) as answers:
                until(lambda: answers[200] > 400)
                assert server.terminate() == 0
        told = answers[200]
        assert booked(store, "success") == told
        assert booked(store, "failure", "cancelled") == 0

        with serving(models, "--config", config) as server:
            server.begin()
            _, headers = asked(server, key)
            assert int(headers["x-ratelimit-remaining-requests"]) == 1_000_000 - told - 1
            with clients(server, key) as answers:
                until(lambda: answers[200] > 400)
                written = answers[200]
                time.sleep(0.6)  # longer than a flush interval: what was answered before is written now
                os.kill(server.process.pid, signal.SIGKILL)
                server.process.wait(30)
        after = booked(store, "success") - told
        assert written + 1 <= after <= answers[200] + 1 + 4

        with serving(models, "--config", config) as server:
            server.begin()
            _, headers = asked(server, key)
            assert int(headers["x-ratelimit-remaining-requests"]) == 1_000_000 - told - after - 1


def test_a_request_under_way_is_in_the_books_of_a_server_that_stops(tmp_path: Path) -> None:
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    os.mkfifo(gate)
    code = f"""
import numpy as np

class Model:
    batched = False

    def infer(self, inputs):
        open({str(begun)!r}, "w").close()
        with open({str(gate)!r}) as gate:
            gate.read()
        return {{"output": inputs["input"]}}
"""
    spec = "inputs: [{name: input, datatype: FP32, shape: [1, 4]}]\noutputs: [{name: output, datatype: FP32, shape: [1, 4]}]\n"
    write_model(tmp_path / "models", "identity", code, spec=spec)
    config = configured(tmp_path, "auth: {required: true}\n")
    key = command("keys", "create", "--config", config)["secret"]
    with serving(tmp_path / "models", "--config", config) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        server.begin()
        answer = pool.submit(asked, server, key)
        until(begun.exists)
        server.process.terminate()
        server.wait_for("draining")
        with open(gate, "w") as opened:
            opened.write("go")
        assert answer.result(SECONDS)[0] == 200
        assert server.process.wait(30) == 0
    with closing(Store.open(f"sqlite:///{tmp_path}/fairlead.db")) as store:
        assert booked(store, "success") == 1
