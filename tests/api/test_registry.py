"""The registry's operations, as an HTTP client sees them: on a real store, uploads through a real server."""

import asyncio
import errno
import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from openapi_spec_validator import OpenAPIV31SpecValidator

from fairlead.api.doorkeeper import CALLER
from fairlead.api.http_server import HttpServer
from fairlead.api.openapi import document
from fairlead.api.ops import OPS_SHAPES
from fairlead.api.problems import Problems
from fairlead.api.registry import MAX_ADDING, RegistryRoutes
from fairlead.api.web import json_app
from fairlead.control.registry import Registry
from fairlead.control.signing import pem_of, sign
from fairlead.control.tar import unpack
from fairlead.core.caller import Caller
from fairlead.core.errors import Unauthenticated, Unreachable
from fairlead.core.policy import Scope
from fairlead.core.rollout import RegistrySettings
from fairlead.core.versions import Stage
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import IndexEntry
from fairlead.store.registry_rows import DeploymentRow, GateOutcome, GateRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from tests.stores import new_store

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
SECONDS = 20.0
TAR = {"content-type": "application/x-tar"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "data").mkdir()
    opened = new_store(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture
def loaded() -> list[IndexEntry]:
    return []


@pytest.fixture
def routes(store: Store, tmp_path: Path, loaded: list[IndexEntry]) -> Iterator[RegistryRoutes]:
    registry = Registry(store, RegistrySettings(max_bytes=1 << 22), cache_folder=tmp_path / "cache", now=lambda: NOW)
    made = RegistryRoutes(registry, lambda: loaded)
    yield made
    made.close()


def app_of(routes: RegistryRoutes) -> Any:
    async def admit(request: Any, scope: Scope | None) -> None:
        assert scope is Scope.ADMIN
        if request.headers.get("authorization") == "Bearer wrong":
            raise Unauthenticated("no such key")
        request.scope[CALLER] = (Caller(key="boss", address="10.0.0.9"), "")

    return json_app([(each.method, each.path, each.serve, each.scope) for each in routes.operations], {"/admin": Problems()}, admit)


@pytest.fixture
async def client(routes: RegistryRoutes) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app_of(routes)), base_url="http://server") as asking:
        yield asking


@asynccontextmanager
async def served(routes: RegistryRoutes, **limits: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, HttpServer]]:
    """The operations port, over a socket."""
    server = HttpServer(None, app_of(routes), Finished(), shapes=OPS_SHAPES, max_body_bytes=1 << 16, larger=routes.body_bound, **limits)
    await server.listen(port=0)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=SECONDS) as asking:
            yield asking, server
    finally:
        await server.drain(1.0)


def problem(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["detail"]


def model(tmp_path: Path, content: str = "x", spec: str = "", name: str = "m") -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_text(content)
    (folder / "model.yaml").write_text(spec)
    return folder


async def add(client: httpx2.AsyncClient, uri: object, name: str = "fraud", **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/admin/models/{name}/versions", json={"uri": str(uri), **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def packed(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


# Models and versions


async def test_a_version_from_its_beginning_to_its_end(client: httpx2.AsyncClient, store: Store, tmp_path: Path) -> None:
    source = model(tmp_path, spec="batching: {max_batch_size: 8}")
    added = await add(client, source, git_commit="abc", metrics={"auc": 0.9}, tags={"team": "risk"})
    version = added["version"]
    assert added["new"] is True
    assert {name: version[name] for name in ("model", "version", "stage", "backend", "bytes", "signed_by", "trusted", "created")} == {
        "model": "fraud",
        "version": 1,
        "stage": "staged",
        "backend": "onnx",
        "bytes": 1,
        "signed_by": "",
        "trusted": False,
        "created": "2026-09-21T14:13:20Z",
    }
    assert version["provenance"] == {"who": "boss", "source": str(source), "git_commit": "abc", "metrics": {"auc": 0.9}}
    assert (await add(client, source))["new"] is False
    whole = (await client.get("/admin/models/fraud/versions/1")).json()
    assert [(each["path"], each["bytes"]) for each in whole["files"]] == [("model.onnx", 1)]
    assert whole["spec"] == "batching:\n  max_batch_size: 8\n" and whole["gates"] == [] and whole["schema"] == {}
    assert (await client.get("/admin/models/fraud/versions")).json()["versions"] == [version]
    assert (await client.get("/admin/models/fraud/versions?stage=validated")).json() == {"versions": []}

    changed = await client.patch("/admin/models/fraud/versions/1", json={"tags": {"team": None, "region": "eu"}, "metrics": {"loss": 0.1}})
    assert changed.json()["tags"] == {"region": "eu"}
    assert changed.json()["provenance"]["metrics"] == {"auc": 0.9, "loss": 0.1}
    retired = await client.post("/admin/models/fraud/versions/1/retire", json={"reason": "old"})
    assert (retired.json()["stage"], retired.json()["reason"]) == ("retired", "old")
    assert problem(await client.post("/admin/models/fraud/versions/1/retire"))[0] == 409
    assert (await client.delete("/admin/models/fraud/versions/1")).json() == {"deleted": 1}
    assert problem(await client.get("/admin/models/fraud/versions/1")) == (404, "model `fraud` has no version 1 in the registry")
    events = (await client.get("/admin/models/fraud/events?limit=3")).json()
    assert [each["action"] for each in events["entries"]] == ["version.delete", "version.stage", "version.change"]
    rest = (await client.get(f"/admin/models/fraud/events?cursor={events['next']}")).json()
    assert [(each["action"], each["subject"], each["actor"], each["address"]) for each in rest["entries"]] == [
        ("version.add", "fraud@1", "boss", "10.0.0.9")
    ]


async def test_models_are_listed_with_what_the_server_has_loaded(
    client: httpx2.AsyncClient, tmp_path: Path, loaded: list[IndexEntry]
) -> None:
    made = await client.post("/admin/models", json={"name": "spam", "description": "mails", "tags": {"team": "mail"}})
    assert (made.status_code, made.json()["versions"], made.json()["newest"]) == (200, 0, None)
    assert problem(await client.post("/admin/models", json={"name": "spam"})) == (409, "there is a model `spam` already")
    for content in ("one", "two"):
        await add(client, model(tmp_path, content))
    await client.put("/admin/models/fraud/aliases/blue", json={"version": 1})
    loaded += [IndexEntry("fraud", "2", "READY", ""), IndexEntry("plain", "1", "UNAVAILABLE", "it is broken")]
    found = {each["name"]: each for each in (await client.get("/admin/models")).json()["models"]}
    assert list(found) == ["fraud", "plain", "spam"]
    assert {name: found["fraud"][name] for name in ("registered", "versions", "newest", "aliases", "loaded")} == {
        "registered": True,
        "versions": 2,
        "newest": 2,
        "aliases": {"blue": 1},
        "loaded": [{"version": "2", "state": "READY", "reason": ""}],
    }
    assert (found["plain"]["registered"], found["plain"]["loaded"][0]["reason"]) == (False, "it is broken")
    changed = await client.patch("/admin/models/spam", json={"description": "letters", "tags": {"team": None}})
    assert (changed.json()["description"], changed.json()["tags"], changed.json()["loaded"]) == ("letters", {}, [])
    assert (await client.patch("/admin/models/spam", json={"tags": {"a": "b"}})).json()["description"] == "letters"


async def test_aliases_name_versions_and_those_of_rollouts_are_left_to_them(client: httpx2.AsyncClient, tmp_path: Path) -> None:
    for content in ("one", "two"):
        await add(client, model(tmp_path, content))
    assert (await client.put("/admin/models/fraud/aliases/blue", json={"version": 1})).json()["aliases"] == {"blue": 1}
    assert (await client.get("/admin/models/fraud/versions/blue")).json()["version"] == 1
    assert (await client.put("/admin/models/fraud/aliases/blue", json={"version": 2})).json()["aliases"] == {"blue": 2}
    assert problem(await client.put("/admin/models/fraud/aliases/champion", json={"version": 1})) == (
        409,
        "the alias `champion` is moved by rollouts",
    )
    assert problem(await client.put("/admin/models/fraud/aliases/blue", json={"version": 9}))[0] == 404
    assert problem(await client.put("/admin/models/fraud/aliases/BLUE", json={"version": 1}))[0] == 400
    assert (await client.delete("/admin/models/fraud/aliases/blue")).json() == {"deleted": 1}
    assert problem(await client.delete("/admin/models/fraud/aliases/blue"))[0] == 404


async def test_two_versions_are_compared(client: httpx2.AsyncClient, store: Store, tmp_path: Path) -> None:
    await add(client, model(tmp_path, "one"), metrics={"auc": 0.9})
    await add(client, model(tmp_path, "three", spec="trusted: true"), metrics={"auc": 0.8})
    await client.put("/admin/models/fraud/aliases/blue", json={"version": 2})
    found = (await client.get("/admin/models/fraud/diff?from=1&to=blue")).json()
    assert found["versions"] == ["fraud@1", "fraud@2"]
    assert found["files"] == [{"path": "model.onnx", "change": "changed", "bytes": [3, 5]}]
    assert (found["spec"], found["metrics"]) == ({"trusted": [None, True]}, {"auc": [0.9, 0.8]})
    assert problem(await client.get("/admin/models/fraud/diff?from=1"))[0] == 400
    assert problem(await client.get("/admin/models/fraud/diff?from=1&to=no-such"))[0] == 404


async def test_gates_are_shown_with_their_version(client: httpx2.AsyncClient, store: Store, tmp_path: Path) -> None:
    await add(client, model(tmp_path))
    for run, outcome in (("a", GateOutcome.FAILED), ("b", GateOutcome.PASSED)):
        row = GateRow(model="fraud", number=1, run=run, gate="load", outcome=outcome, seconds=1.5, details={"why": run}, time=NOW)
        store.registry.add_gates([row])
    (gate,) = (await client.get("/admin/models/fraud/versions/1")).json()["gates"]
    assert gate == {
        "run": "b", "gate": "load", "outcome": "passed", "seconds": 1.5, "details": {"why": "b"}, "time": "2026-09-21T14:13:20Z",
    }  # fmt: skip


async def test_what_a_models_gates_ask_is_checked_when_it_is_put(client: httpx2.AsyncClient) -> None:
    await client.post("/admin/models", json={"name": "fraud"})
    safety = [{"prompt": "how to", "must_refuse": True}]
    put = await client.put("/admin/models/fraud/checks", json={"rules": {"gate_seconds": 5}, "safety": safety})
    assert put.status_code == 200, put.text
    found = (await client.get("/admin/models/fraud/checks")).json()
    assert (found["rules"]["gate_seconds"], found["safety"][0]["prompt"]) == (5.0, "how to")
    assert problem(await client.put("/admin/models/fraud/checks", json={"rulez": {}}))[0] == 400
    assert problem(await client.put("/admin/models/fraud/checks", json={"safety": [{"prompt": "a", "embed": "b"}]}))[0] == 400
    assert problem(await client.put("/admin/models/spam/checks", json={}))[0] == 404
    (entry,) = (await client.get("/admin/models/fraud/events?limit=1")).json()["entries"]
    assert (entry["action"], entry["details"]) == ("model.checks", {"golden": 0, "rows": 0, "safety": 1})


async def test_a_version_is_signed_from_afar(client: httpx2.AsyncClient, tmp_path: Path) -> None:
    version = (await add(client, model(tmp_path)))["version"]
    key = Ed25519PrivateKey.generate()
    body = {"signature": sign(key, "fraud", version["digest"]), "public_key": pem_of(key.public_key())}
    signed = await client.put("/admin/models/fraud/versions/1/signature", json=body)
    assert signed.json()["signed_by"].startswith("ed25519:") and signed.json()["trusted"] is False
    wrong = {**body, "signature": sign(key, "spam", version["digest"])}
    assert "is not of this content" in problem(await client.put("/admin/models/fraud/versions/1/signature", json=wrong))[1]


async def test_what_is_deployed_is_neither_retired_nor_deleted(client: httpx2.AsyncClient, store: Store, tmp_path: Path) -> None:
    await add(client, model(tmp_path))
    did = AuditRow(time=NOW, actor="control", action="x", subject="fraud")
    row = DeploymentRow(model="fraud", state={"champion": 1}, versions=(1,), updated=NOW, actor="control")
    store.control.commit(deployments=[row], audits=[did])
    assert problem(await client.post("/admin/models/fraud/versions/1/retire", json={})) == (409, "fraud@1 is deployed")
    assert problem(await client.delete("/admin/models/fraud/versions/1")) == (409, "fraud@1 is deployed")
    assert store.registry.version("fraud", 1).stage is Stage.STAGED


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "uri: is missing"),
        ({"uri": "/nowhere/at/all"}, 400, "there is nothing at /nowhere/at/all"),
        ({"uri": "/x", "metrics": {"auc": "good"}}, 400, r"metrics[...]: Expected `float`, got `str`"),
        ({"uri": "/x", "colour": 1}, 400, "colour: is not known"),
        ({"uri": "/x", "parent": "fraud@"}, 400, "'fraud@' names no version"),
        ({"uri": "/x", "public_key": "none", "signature": "none"}, 400, "`public_key` is no Ed25519 public key in PEM"),
        ({"uri": "nosuch://x"}, 400, "cannot read nosuch://x"),
    ],
)
async def test_what_cannot_be_added_is_a_problem_in_words(client: httpx2.AsyncClient, body: Any, status: int, words: str) -> None:
    found = problem(await client.post("/admin/models/fraud/versions", json=body))
    assert found[0] == status and words in found[1]


@pytest.mark.parametrize("path", ["/admin/models/.x", "/admin/models/fr%20aud/versions/1", "/admin/models/fraud/versions/7x!"])
async def test_names_that_are_none_are_told(client: httpx2.AsyncClient, path: str) -> None:
    assert problem(await client.get(path))[0] == 400


def test_the_operations_are_a_valid_openapi_document(routes: RegistryRoutes) -> None:
    described = document(routes.operations, {})
    OpenAPIV31SpecValidator(json.loads(msgspec.json.encode(described))).validate()
    body = described["paths"]["/admin/models/{model}/versions"]["post"]["requestBody"]["content"]
    assert list(body) == ["application/json", "application/x-tar"]


# Uploads


async def test_a_tar_that_is_larger_than_other_bodies_is_taken_as_it_comes(routes: RegistryRoutes, store: Store) -> None:
    content = bytes(range(256)) * 4096  # 1 MiB, of a port whose bodies have 64 KiB

    async def pieces() -> AsyncIterator[bytes]:
        tar = packed({"model.yaml": b"batching: {max_batch_size: 2}", "sub/x.txt": b"y", "model.onnx": content})
        for start in range(0, len(tar), 100_000):
            yield tar[start : start + 100_000]

    async with served(routes) as (client, _):
        about = json.dumps({"git_commit": "abc", "source": "a laptop"})
        answer = await client.post("/admin/models/fraud/versions", params={"about": about}, content=pieces(), headers=TAR)
        assert answer.status_code == 200, answer.text
        version = answer.json()["version"]
        assert version["provenance"] == {"who": "boss", "source": "a laptop", "git_commit": "abc"}
        assert version["bytes"] == len(content) + 1
        again = await client.post("/admin/models/fraud/versions", content=packed({"model.onnx": b"z"}), headers=TAR)
        assert (again.json()["version"]["version"], again.json()["version"]["provenance"]["source"]) == (2, "upload")
        assert (await client.post("/admin/models", content=b"x" * (1 << 17))).status_code == 413
    row = store.registry.version("fraud", 1)
    folder = routes.registry.fetch(row)
    assert (folder / "model.onnx").read_bytes() == content and (folder / "sub" / "x.txt").read_bytes() == b"y"
    assert sorted(each.name for each in folder.parent.iterdir()) == ["1", "2"]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def folder(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


def pipe(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.FIFOTYPE
    return member


ONE = packed({"model.onnx": b"x" * 3000})
LONG = tarfile.TarInfo("x")
LONG.type, LONG.size = tarfile.XHDTYPE, 1 << 30


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (packed({"../up": b"x"}), 400, "whose path is not taken: '../up'"),
        (packed({"a/../../up": b"x"}), 400, "whose path is not taken"),
        (packed({"model.onnx": b"x", "l": link("l", "/etc/passwd")}), 400, "'l'"),
        (packed({"l": link("l", "model.onnx")}), 400, "'l', which is no plain file"),
        (packed({"model.onnx": b"x", "l": link("l", "model.onnx", tarfile.LNKTYPE)}), 400, "'l', which is no plain file"),
        (packed({"p": pipe("p")}), 400, "p"),
        (packed({"model.onnx": b"x"})[:1024] + packed({"model.onnx": b"y"}), 400, "holds 'model.onnx' twice"),
        (packed({"model.onnx": b"x", "model.onnx/y": b"y"}), 400, "holds 'model.onnx/y' twice"),
        (packed({"model.onnx": b"x", "folder": folder("model.onnx")}), 400, "holds 'model.onnx' twice"),
        (packed({"x" * 256: b"x"}), 400, "cannot be kept: File name too long"),
        (b"", 400, "is no tar, or is cut off"),
        (b"PK\x03\x04" + bytes(1000), 400, "is no tar"),
        (ONE[:2000], 400, "is cut off"),
        (ONE[:3000], 400, "is cut off"),
        (LONG.tobuf(tarfile.USTAR_FORMAT), 400, "of more than 1 MiB"),
        (packed({"model.onnx": bytes((1 << 22) + 1)}), 413, "more than a version may have"),
        (packed({"readme.md": b""}), 400, "the upload holds no artefact"),
        (packed({"model.yaml": b"nope: 1", "model.onnx": b"x"}), 400, "the upload/model.yaml:1: unknown key `nope`"),
        (packed({"model.yaml": b"name: spam", "model.onnx": b"x"}), 400, "named 'spam', not 'fraud'"),
    ],
)  # fmt: skip
async def test_a_tar_that_is_none_or_leaves_its_folder_leaves_nothing(
    routes: RegistryRoutes, store: Store, tmp_path: Path, body: bytes, status: int, words: str
) -> None:
    async with served(routes) as (client, _):
        answer = await client.post("/admin/models/fraud/versions", content=body, headers=TAR)
        found = problem(answer)
        assert found[0] == status and words in found[1], found
        assert (await client.get("/admin/models")).status_code == 200
    assert store.registry.models() == ()
    assert [*(tmp_path / "data" / "registry").rglob("*")] == [tmp_path / "data" / "registry" / "fraud"]
    assert not (tmp_path / "data" / "up").exists() and not (tmp_path / "up").exists()


def test_a_full_disk_is_not_the_uploads_fault() -> None:
    with pytest.raises(Unreachable, match="No space left"):
        unpack(BufferedReader(_Full()), Path(), 1 << 20)


class _Full(RawIOBase):
    """As where a file is written while the disk is full."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_what_a_models_gates_ask_is_read_beside_the_event_loop(store: Store, tmp_path: Path) -> None:
    threads = []

    def now() -> float:
        threads.append(threading.get_ident())
        return NOW

    routes = RegistryRoutes(Registry(store, RegistrySettings(), cache_folder=tmp_path / "cache", now=now))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app_of(routes)), base_url="http://server") as client:
        await client.post("/admin/models", json={"name": "fraud"})
        threads.clear()
        assert (await client.put("/admin/models/fraud/checks", json={})).status_code == 200
    assert threads and threading.get_ident() not in threads
    routes.close()


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(routes: RegistryRoutes, store: Store, tmp_path: Path) -> None:
    # Whole members: a reader that only looked at the archive might take it for the end.
    half = packed({"model.onnx": bytes(50_000)})[:512] + bytes(50_176)
    async with served(routes) as (client, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /admin/models/fraud/versions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-tar\r\ncontent-length: {len(half) + 1024}\r\n\r\n"
        writer.write(head.encode() + half)
        await writer.drain()
        folder = tmp_path / "data" / "registry" / "fraud"
        async with asyncio.timeout(SECONDS):
            while not [*folder.glob(".adding-*/model.onnx")]:  # it is being unpacked
                await asyncio.sleep(0.005)
            writer.close()
            while [*folder.iterdir()]:
                await asyncio.sleep(0.005)
        assert (await client.get("/admin/models")).json() == {"models": []}
    assert store.registry.models() == () and reader is not None


async def test_a_refused_client_reads_why_while_it_sends(routes: RegistryRoutes) -> None:
    async with served(routes) as (_, server):
        sock = socket.create_connection(("127.0.0.1", server.port), SECONDS)
        with sock:
            sock.sendall(b"POST /admin/models/fraud/versions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer wrong\r\n"
                         b"content-type: application/x-tar\r\ntransfer-encoding: chunked\r\n\r\n200\r\n" + bytes(512) + b"\r\n")  # fmt: skip
            said = await asyncio.to_thread(sock.recv, 4096)
        assert said.startswith(b"HTTP/1.1 401 ") and b"connection: close" in said.lower()
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
            sock.sendall(b"POST /admin/models/fraud/versions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n" % (1 << 40))
            said = await asyncio.to_thread(sock.recv, 4096)
        assert said.startswith(b"HTTP/1.1 413 ")


async def test_no_more_versions_are_added_at_a_time_than_there_are_threads_for(routes: RegistryRoutes, tmp_path: Path) -> None:
    source = model(tmp_path)
    async with served(routes) as (client, server):
        waiting = []
        for number in range(MAX_ADDING):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = f"POST /admin/models/m{number}/versions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-tar\r\ncontent-length: 10240\r\n\r\n"
            writer.write(head.encode())
            await writer.drain()
            waiting.append(writer)
        async with asyncio.timeout(SECONDS):
            while len([*(tmp_path / "data" / "registry").glob("*/.adding-*")]) < MAX_ADDING:
                await asyncio.sleep(0.005)
            refused = await client.post("/admin/models/fraud/versions", json={"uri": str(source)})
            assert problem(refused) == (503, f"{MAX_ADDING} versions are being added already")
            for writer in waiting:
                writer.close()
            while (answer := await client.post("/admin/models/fraud/versions", json={"uri": str(source)})).status_code == 503:
                await asyncio.sleep(0.005)
        assert answer.json()["new"] is True


async def test_an_upload_is_a_tar_and_nothing_else(client: httpx2.AsyncClient) -> None:
    path = "/admin/models/fraud/versions"
    assert problem(await client.post(path, content=b"x", headers={**TAR, "content-encoding": "gzip"}))[0] == 501
    assert problem(await client.post(path, content=b"x", headers=TAR, params={"about": '{"in_place": true}'}))[0] == 400
    assert problem(await client.post(path, content=b"x", headers=TAR, params={"about": '{"uri": "/x"}'})) == (400, "uri: is not known")
    assert problem(await client.post(path, content=b"x", headers={"content-type": "application/zip"}))[0] == 400


async def test_a_tar_goes_to_a_registry_on_another_file_system(store: Store, tmp_path: Path) -> None:
    registry = Registry(store, RegistrySettings(url="memory://uploads"), cache_folder=tmp_path / "cache")
    routes = RegistryRoutes(registry)
    async with served(routes) as (client, _):
        answer = await client.post("/admin/models/fraud/versions", content=packed({"model.onnx": b"x"}), headers=TAR)
        assert answer.json()["version"]["location"] == "memory://uploads/fraud/1"
        assert (await client.get("/admin/models")).json()["models"][0]["loaded"] is None
    routes.close()
    assert [*(tmp_path / "cache").iterdir()] == []
    assert (registry.fetch(store.registry.version("fraud", 1)) / "model.onnx").read_bytes() == b"x"
    registry.place.fs.rm("/uploads", recursive=True)
