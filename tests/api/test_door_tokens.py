"""The doors of a server whose callers show tokens of an issuer, or certificates."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
import pytest_asyncio
from joserfc.jwk import ECKey
from tritonclient.grpc import service_pb2 as pb

from fairlead.core.policy import Scope
from fairlead.runtime.upstream.fake import Fake
from tests.api.http_fake import until
from tests.api.keyed import SERVICE, House, Refusal, bearer, chat, grpc_row, house, number, row, wire_to
from tests.gateway.identity.authority import Authority
from tests.gateway.identity.issuers import AUDIENCE, LocalIssuer

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = "the key, token or certificate that was shown is not valid"
DOORS: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "infer": ("POST", "/v2/models/identity/infer", row(), {}),
    "events": ("POST", "/v2/models/count/infer", number(), {"accept": "text/event-stream"}),
    "metadata": ("GET", "/v2/models/identity", None, {}),
    "chat": ("POST", "/v1/chat/completions", chat(), {}),
    "chat elsewhere": ("POST", "/v1/chat/completions", chat("far-chat"), {}),
    "events elsewhere": ("POST", "/v1/chat/completions", chat("far-chat", stream=True), {}),
}


async def ask(client: httpx2.AsyncClient, name: str, headers: dict[str, str]) -> httpx2.Response:
    method, path, body, more = DOORS[name]
    return await client.request(method, path, content=None if body is None else json.dumps(body).encode(), headers={**more, **headers})


# Tokens


@pytest.fixture(scope="module")
def issuer() -> Iterator[LocalIssuer]:
    issuer = LocalIssuer()
    yield issuer
    issuer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(issuer: LocalIssuer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    far = await Fake().start()
    auth = f"required: true, oidc: [{{issuer: '{issuer.url}', audience: {AUDIENCE}}}]"
    gateway = f"  models: {{far-chat: {{upstreams: [{{url: '{far.url}'}}]}}}}"
    async with house(tmp_path_factory.mktemp("house"), auth=auth, gateway=gateway) as running:
        yield running
    await far.stop()


@pytest.fixture
def new_kid(home: House, issuer: LocalIssuer) -> str:
    """A key of the issuer's that the server has not read yet, and may read at once."""
    kid = f"key-{len(issuer.keys)}"
    issuer.keys[kid] = ECKey.generate_key()
    assert home.server.identity._tokens is not None
    for each in home.server.identity._tokens.issuers.values():
        each._tried = float("-inf")
    return kid


@pytest.mark.parametrize("name", DOORS)
async def test_a_token_whose_key_must_be_read_first_opens_the_door(home: House, issuer: LocalIssuer, new_kid: str, name: str) -> None:
    before = issuer.num_reads
    token = issuer.token(time.time(), kid=new_kid)
    response = await ask(home.http, name, bearer(token))
    assert response.status_code == 200, response.text
    assert issuer.num_reads > before
    read = issuer.num_reads
    assert (await ask(home.http, name, bearer(token))).status_code == 200
    assert issuer.num_reads == read


async def test_the_same_of_calls(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    token = issuer.token(time.time(), kid=new_kid, roles="operator")
    answered = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, token)
    assert answered.model_name == "identity"


async def test_the_same_of_streams(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    (answered,) = await home.stream(grpc_row(), key=issuer.token(time.time(), kid=new_kid))
    assert answered.infer_response.model_name == "identity"


async def test_the_same_of_calls_that_wait(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    token = issuer.token(time.time(), kid=new_kid, roles="operator")
    load = pb.RepositoryModelLoadRequest(model_name="identity")
    assert not isinstance(await home.call("RepositoryModelLoad", load, pb.RepositoryModelLoadResponse, token), Refusal)


async def test_the_same_of_the_administration(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    token = issuer.token(time.time(), kid=new_kid, roles="admin")
    assert (await home.ops.get("/admin/tenants", headers=bearer(token))).status_code == 200


@pytest.mark.parametrize("name", DOORS)
async def test_a_token_learned_for_another_purpose_opens_nothing(home: House, issuer: LocalIssuer, new_kid: str, name: str) -> None:
    now = time.time()
    wrong = {
        "no scope": (issuer.token(now, kid=new_kid, roles="nothing of ours"), 403),
        "expired": (issuer.token(now - 1000, kid=new_kid), 401),
        "another audience": (issuer.token(now, kid=new_kid, aud="other"), 401),
        "another key": (issuer.token(now, kid="first", header={"kid": new_kid, "alg": "RS256"}), 401),
        "truncated": (issuer.token(now, kid=new_kid)[:-2], 401),
    }
    for kind, (token, status) in wrong.items():
        response = await ask(home.http, name, bearer(token))
        assert response.status_code == status, kind
        error = response.json()["error"]
        said = error if isinstance(error, str) else error["message"]
        assert said == (INVALID if status == 401 else "this key has no scope 'infer'")


async def test_such_calls_are_refused_too(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    nothing = issuer.token(time.time(), kid=new_kid, roles="nothing of ours")
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, nothing)
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert (await home.stream(key=nothing)).code is grpc.StatusCode.PERMISSION_DENIED
    expired = issuer.token(time.time() - 1000, kid=new_kid)
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, expired)
    assert (refused.code, refused.message) == (grpc.StatusCode.UNAUTHENTICATED, INVALID)


async def test_a_key_and_a_token_are_both_good_and_a_token_may_come_as_x_api_key(home: House, issuer: LocalIssuer) -> None:
    assert (await ask(home.http, "infer", bearer(home.new_key()))).status_code == 200
    assert (await ask(home.http, "infer", {"x-api-key": issuer.token(time.time())})).status_code == 200


async def test_requests_behind_one_whose_token_must_be_learned_are_answered_in_order(
    home: House, issuer: LocalIssuer, new_kid: str
) -> None:
    token, known = issuer.token(time.time(), kid=new_kid), home.new_key().secret
    text = ""
    for shown in (token, known, "fl_nobody", token):
        body = json.dumps(row())
        text += f"POST /v2/models/identity/infer HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {shown}\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    async with wire_to(home) as connection:
        await connection.send(text.encode())
        assert [(await connection.receive())[0] for _ in range(3)] == [200, 200, 401]
        assert await connection.ended() == b""  # what comes after a refusal is not read


async def test_a_client_that_leaves_while_its_issuer_is_asked_leaves_nothing_behind(home: House, issuer: LocalIssuer, new_kid: str) -> None:
    for method, path, body, _ in (DOORS["infer"], DOORS["chat elsewhere"], DOORS["chat"]):
        text = json.dumps(body)
        before = home.server.http.num_connections
        async with wire_to(home) as connection:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {issuer.token(time.time(), kid=new_kid)}\r\n"
            connection.writer.write(f"{head}content-length: {len(text)}\r\n\r\n{text}".encode())
            await until(lambda before=before: home.server.http.num_connections > before)
        await until(lambda before=before: home.server.http.num_connections == before)
    assert (await ask(home.http, "infer", bearer(issuer.token(time.time(), kid=new_kid)))).status_code == 200


async def test_while_the_issuer_does_not_answer_known_tokens_go_on_and_new_keys_are_refused(
    home: House, issuer: LocalIssuer, new_kid: str
) -> None:
    good = issuer.token(time.time())
    assert (await ask(home.http, "infer", bearer(good))).status_code == 200
    issuer.broken = True
    try:
        assert (await ask(home.http, "infer", bearer(good))).status_code == 200
        for name in ("infer", "chat", "chat elsewhere"):
            assert (await ask(home.http, name, bearer(issuer.token(time.time(), kid=new_kid)))).status_code == 401
    finally:
        issuer.broken = False


# Certificates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ours")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def safe(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """One that speaks TLS, and heeds certificates."""
    certificate, private_key = authority.server()
    tls = f"certificate: '{certificate}', private_key: '{private_key}', client_ca: '{authority.path}'"
    context = trusting(authority)
    async with house(tmp_path_factory.mktemp("safe"), auth="required: true, mtls: true", tls=tls, tls_context=context) as running:
        yield running


def trusting(authority: Authority, client: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.path))
    if client is not None:
        context.load_cert_chain(*client)
    return context


def browser(home: House, authority: Authority, client: tuple[str, str] | None) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=f"https://127.0.0.1:{home.port}", verify=trusting(authority, client), timeout=20)


async def call(home: House, authority: Authority, client: tuple[str, str] | None, key: str = "") -> Any:
    """ModelInfer over TLS."""
    root = Path(authority.path).read_bytes()
    pair = (Path(client[1]).read_bytes(), Path(client[0]).read_bytes()) if client else (None, None)
    channel = grpc.aio.secure_channel(f"127.0.0.1:{home.server.grpc.port}", grpc.ssl_channel_credentials(root, *pair))
    async with channel:
        method = channel.unary_unary(SERVICE + "ModelInfer", lambda each: each.SerializeToString(), pb.ModelInferResponse.FromString)
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        try:
            return await method(grpc_row(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return Refusal(error.code(), error.details() or "", {})


async def test_a_certificate_says_who_calls_at_every_door(safe: House, authority: Authority) -> None:
    ada = authority.client(["acme"], ["ada"])
    async with browser(safe, authority, ada) as client:
        for name in ("infer", "events", "metadata", "chat"):
            assert (await ask(client, name, {})).status_code == 200, name
        hidden = await client.get("/v2/models/secret")
        assert hidden.status_code == 404
        refused = await client.post("/v2/repository/models/identity/load", json={})
        assert (refused.status_code, refused.json()["error"]) == (403, "this key has no scope 'repository'")
    assert (await call(safe, authority, ada)).model_name == "identity"


async def test_without_a_certificate_a_key_is_asked_for(safe: House, authority: Authority) -> None:
    async with browser(safe, authority, None) as client:
        for name in ("infer", "events", "chat"):
            refused = await ask(client, name, {})
            assert refused.status_code == 401 and "a client certificate" in refused.text
            assert (await ask(client, name, bearer(safe.new_key()))).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
    refused = await call(safe, authority, None)
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED
    assert (await call(safe, authority, None, safe.new_key().secret)).model_name == "identity"


async def test_a_certificate_of_a_revoked_key_is_refused_on_connections_that_are_open(safe: House, authority: Authority) -> None:
    key = safe.new_key(Scope.INFER, Scope.REPOSITORY)
    client_pair = authority.client(["acme"], [key.id])
    async with browser(safe, authority, client_pair) as client:
        assert (await ask(client, "infer", {})).status_code == 200
        assert (await client.post("/v2/repository/models/identity/load", json={})).status_code == 200
        safe.revoke(key)
        for name in ("infer", "events", "chat"):
            assert (await ask(client, name, {})).status_code == 401
    assert (await call(safe, authority, client_pair)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_strangers_certificate_and_one_of_another_tenant_open_nothing(safe: House, authority: Authority, folder: Path) -> None:
    key = safe.new_key()
    async with browser(safe, authority, authority.client(["ops"], [key.id])) as client:
        assert (await ask(client, "infer", {})).status_code == 401
    stranger = Authority(folder, "strangers")
    with pytest.raises(httpx2.TransportError):
        async with browser(safe, authority, stranger.client(["acme"], ["ada"])) as client:
            await ask(client, "infer", {})
    assert (await call(safe, authority, stranger.client(["acme"], ["ada"]))).code is grpc.StatusCode.UNAVAILABLE


async def test_large_bodies_and_answers_go_through_tls(safe: House, authority: Authority) -> None:
    texts = ["hello" * 1000] * 64
    body = {"inputs": [{"name": "text", "shape": [64, 1], "datatype": "BYTES", "data": texts}]}
    async with browser(safe, authority, authority.client(["acme"], ["ada"])) as client:
        answer = await client.post("/v2/models/shout/infer", json=body)
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["data"][63] == "HELLO" * 1000


async def test_who_does_not_speak_tls_is_sent_away(safe: House) -> None:
    with pytest.raises((httpx2.TransportError, OSError)):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{safe.port}", timeout=20) as client:
            await client.get("/healthz")
    async with asyncio.timeout(20):
        assert (await safe.ops.get("/healthz")).status_code == 200
