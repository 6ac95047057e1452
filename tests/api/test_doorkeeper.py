"""Every door of a server that asks for keys: who comes in, who does not, and what each of them is told."""

import asyncio
import contextlib
import gzip
import http.client
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import httpx2
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from msgspec import Struct, structs
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.doorkeeper import MAX_UNPROVED_BYTES, Acquaintance
from fairlead.api.exchange import DIRECT_BYTES
from fairlead.core.errors import Unauthenticated
from fairlead.core.policy import Scope, TenantPolicy
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.gateway.signing import sign
from fairlead.runtime.upstream.fake import Fake
from tests.api.http_fake import Wire
from tests.api.keyed import (
    AUDIT,
    HEALTH,
    SERVICE,
    STREAM_INFER,
    HealthRequest,
    HealthResponse,
    House,
    Refusal,
    bearer,
    chat,
    fields_of,
    grpc_number,
    grpc_row,
    house,
    number,
    row,
    wire_to,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS = {"accept": "text/event-stream"}
GATEWAY = """\
    signers: {{require_signature: true}}
    vip: {{class: interactive, classes: [standard, batch], models: ['*']}}
  models:
    far-chat: {{upstreams: [{{url: '{far}'}}]}}
    secret-far-chat: {{upstreams: [{{url: '{far}'}}]}}
    far-tensor: {{upstreams: [{{url: '{far}', protocol: kserve}}]}}
    secret-far-tensor: {{upstreams: [{{url: '{far}', protocol: kserve}}]}}
    spare: {{require_signature: true}}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far() -> AsyncIterator[Fake]:
    """Another server, which computes the models `far-...`."""
    fake = await Fake().start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(far: Fake, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with house(tmp_path_factory.mktemp("house"), gateway=GATEWAY.format(far=far.url)) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def key(home: House) -> NewKey:
    return home.new_key()


class Door(Struct):
    """One way to ask over HTTP; `{model}` in path and body stands for a model."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = {}
    model: str = ""
    secret: str = ""
    """One of the same kind that `acme` may not see."""
    scope: Scope = Scope.INFER

    @property
    def openai(self) -> bool:
        return self.path.startswith("/v1/")

    async def ask(self, home: House, headers: dict[str, str], model: str = "") -> httpx2.Response:
        path, body = self.put(model or self.model)
        content = None if body is None else body.encode()
        return await home.http.request(self.method, path, content=content, headers={**self.headers, **headers})

    def put(self, model: str) -> tuple[str, str | None]:
        body = None if self.body is None else json.dumps(self.body).replace("{model}", model)
        return self.path.replace("{model}", model), body


NAMED = {
    "infer": Door("POST", "/v2/models/{model}/infer", row(), {}, "identity", "secret"),
    "infer of a version": Door("POST", "/v2/models/{model}/versions/1/infer", row(), {}, "identity", "secret"),
    "infer of no version": Door("POST", "/v2/models/{model}/versions/9/infer", row(), {}, "", "secret"),
    "infer of raw bytes": Door("POST", "/v2/models/{model}/infer", row(), {"inference-header-content-length": "0"}, "", "secret"),
    "infer of classes": Door(
        "POST",
        "/v2/models/{model}/infer",
        {**row(), "outputs": [{"name": "y", "parameters": {"classification": 1}}]},
        {},
        "identity",
        "secret",
    ),
    "infer with events": Door("POST", "/v2/models/{model}/infer", number(), EVENTS, "count", "secret"),
    "generate": Door("POST", "/v2/models/{model}/generate", {"text": "hello"}, {}, "shout", "secret"),
    "generate_stream": Door("POST", "/v2/models/{model}/generate_stream", {"text": "hello"}, {}, "shout", "secret"),
    "infer elsewhere": Door("POST", "/v2/models/{model}/infer", row(), {}, "far-tensor", "secret-far-tensor"),
    "metadata": Door("GET", "/v2/models/{model}", None, {}, "identity", "secret"),
    "metadata of a version": Door("GET", "/v2/models/{model}/versions/1", None, {}, "identity", "secret"),
    "readiness": Door("GET", "/v2/models/{model}/ready", None, {}, "identity", "secret"),
    "config": Door("GET", "/v2/models/{model}/config", None, {}, "identity", "secret"),
    "statistics": Door("GET", "/v2/models/{model}/stats", None, {}, "identity", "secret"),
    "load": Door("POST", "/v2/repository/models/{model}/load", {}, {}, "identity", "secret", Scope.REPOSITORY),
    "unload": Door("POST", "/v2/repository/models/{model}/unload", {}, {}, "identity", "secret", Scope.REPOSITORY),
    "load back": Door("POST", "/v2/repository/models/{model}/load", {}, {}, "identity", "secret", Scope.REPOSITORY),
    "an OpenAI model": Door("GET", "/v1/models/{model}", None, {}, "chat", "secret-chat"),
    "an OpenAI model elsewhere": Door("GET", "/v1/models/{model}", None, {}, "far-chat", "secret-far-chat"),
    "chat": Door("POST", "/v1/chat/completions", chat("{model}"), {}, "chat", "secret-chat"),
    "chat with a version": Door("POST", "/v1/chat/completions", chat("{model}@9"), {}, "", "secret-chat"),
    "chat with events": Door("POST", "/v1/chat/completions", chat("{model}", stream=True), {}, "chat", "secret-chat"),
    "chat of tensors": Door("POST", "/v1/chat/completions", chat("{model}"), {}, "", "secret"),
    "completions": Door("POST", "/v1/completions", {"model": "{model}", "prompt": "a b"}, {}, "chat", "secret-chat"),
    "embeddings": Door("POST", "/v1/embeddings", {"model": "{model}", "input": "a b"}, {}, "chat", "secret-chat"),
    "tokenize": Door("POST", "/v1/tokenize", {"model": "{model}", "prompt": "a b"}, {}, "chat", "secret-chat"),
    "detokenize": Door("POST", "/v1/detokenize", {"model": "{model}", "tokens": []}, {}, "chat", "secret-chat"),
    "moderations": Door("POST", "/v1/moderations", {"model": "{model}", "input": "a b"}, {}, "", "secret-chat"),
    "rerank": Door("POST", "/v1/rerank", {"model": "{model}", "query": "a", "documents": ["b"]}, {}, "chat", "secret-chat"),
    "score": Door("POST", "/v1/score", {"model": "{model}", "text_1": "a", "text_2": "b"}, {}, "chat", "secret-chat"),
    "messages": Door("POST", "/v1/messages", chat("{model}"), {}, "chat", "secret-chat"),
    "messages with events": Door("POST", "/v1/messages", chat("{model}", stream=True), {}, "chat", "secret-chat"),
    "counting a message": Door(
        "POST", "/v1/messages/count_tokens", {"model": "{model}", "messages": chat("")["messages"]}, {}, "chat", "secret-chat"
    ),
    "chat elsewhere": Door("POST", "/v1/chat/completions", chat("{model}"), {}, "far-chat", "secret-far-chat"),
    "events elsewhere": Door("POST", "/v1/chat/completions", chat("{model}", stream=True), {}, "far-chat", "secret-far-chat"),
    "embeddings elsewhere": Door("POST", "/v1/embeddings", {"model": "{model}", "input": "a b"}, {}, "far-chat", "secret-far-chat"),
}
GENERAL = {
    "the server": Door("GET", "/v2"),
    "all statistics": Door("GET", "/v2/models/stats"),
    "the index": Door("POST", "/v2/repository/index", {}),
    "OpenAI's models": Door("GET", "/v1/models"),
    "the document": Door("GET", "/openapi.json"),
}
DOORS = {**NAMED, **GENERAL}
CALLS: dict[str, tuple[Any, Any]] = {
    "ModelInfer": (grpc_row("MODEL"), pb.ModelInferResponse),
    "ServerMetadata": (pb.ServerMetadataRequest(), pb.ServerMetadataResponse),
    "ModelReady": (pb.ModelReadyRequest(name="MODEL"), pb.ModelReadyResponse),
    "ModelMetadata": (pb.ModelMetadataRequest(name="MODEL"), pb.ModelMetadataResponse),
    "ModelConfig": (pb.ModelConfigRequest(name="MODEL"), pb.ModelConfigResponse),
    "ModelStatistics": (pb.ModelStatisticsRequest(name="MODEL"), pb.ModelStatisticsResponse),
    "RepositoryIndex": (pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest(model_name="MODEL"), pb.RepositoryModelLoadResponse),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest(model_name="MODEL"), pb.RepositoryModelUnloadResponse),
}
CHANGES = ("RepositoryModelLoad", "RepositoryModelUnload")
WHO = "this server must know who asks"
INVALID = "the key, token or certificate that was shown is not valid"


def message(name: str, model: str) -> Any:
    """That of CALLS about a model."""
    asked = type(CALLS[name][0])()
    asked.CopyFrom(CALLS[name][0])
    for field in ("name", "model_name"):
        if field in asked.DESCRIPTOR.fields_by_name:
            setattr(asked, field, model)
    return asked


def complaint(door: Door, response: httpx2.Response) -> str:
    """What it says is wrong, in the shape of the door's protocol."""
    body = response.json()
    if door.path.startswith("/v1/messages"):
        assert (list(body), list(body["error"])) == (["error", "request_id", "type"], ["type", "message"]), body
        assert response.headers["request-id"] == body["request_id"]
        return str(body["error"]["message"])
    if not door.openai:
        assert list(body) == ["error"], body
        return str(body["error"])
    assert list(body["error"]) == ["message", "type", "param", "code"], body
    return str(body["error"]["message"])


# Without a key


@pytest.mark.parametrize("name", DOORS)
async def test_whoever_shows_no_key_is_refused_in_the_shape_of_the_protocol_and_told_what_to_send(home: House, name: str) -> None:
    door = DOORS[name]
    response = await door.ask(home, {}, door.model or door.secret)
    assert response.status_code == 401
    assert complaint(door, response).startswith(WHO)
    assert response.headers["www-authenticate"] == 'Bearer realm="fairlead"'
    if door.path.startswith("/v1/messages"):
        assert response.json()["error"]["type"] == "authentication_error"
    elif door.openai:
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("name", CALLS)
async def test_whoever_calls_without_a_key_is_unauthenticated(home: House, name: str) -> None:
    refused = await home.call(name, message(name, "identity"), CALLS[name][1])
    assert (refused.code, refused.message[: len(WHO)]) == (grpc.StatusCode.UNAUTHENTICATED, WHO)
    assert refused.metadata["www-authenticate"] == 'Bearer realm="fairlead"'


async def test_a_stream_without_a_key_ends_before_its_first_message_is_read(home: House) -> None:
    assert (await home.stream()).code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("path", ["/admin/keys", "/admin/tenants", "/admin/usage", "/admin/audit", "/admin/config"])
async def test_the_administration_without_a_key_is_a_problem(home: House, path: str) -> None:
    response = await home.ops.get(path)
    assert (response.status_code, response.headers["content-type"]) == (401, "application/problem+json")
    assert response.json()["detail"].startswith(WHO)
    assert response.headers["www-authenticate"] == 'Bearer realm="fairlead"'


async def test_health_and_metrics_are_open(home: House) -> None:
    for path in ("/healthz", "/healthz/live", "/healthz/ready"):
        assert (await home.http.get(path)).status_code == 200
        assert (await home.ops.get(path)).status_code == 200
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert (await home.http.get(path)).status_code == 200
    assert (await home.ops.get("/metrics")).status_code == 200
    assert (await home.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live
    assert (await home.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready
    assert (await home.call(HEALTH, HealthRequest(), HealthResponse)).status == 1


async def test_a_path_that_is_none_is_unknown_to_everybody(home: House) -> None:
    assert (await home.http.get("/v2/nothing")).status_code == 404
    assert (await home.http.get("/v1/nothing")).json()["error"]["code"] == "unknown_url"
    assert (await home.ops.get("/admin/nothing")).status_code == 404
    assert (await home.call("Nothing", pb.ServerLiveRequest(), pb.ServerLiveResponse)).code is grpc.StatusCode.UNIMPLEMENTED


# With one


@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if name in GENERAL or door.model])
async def test_a_key_opens_every_door_that_its_scopes_are_for(home: House, key: NewKey, name: str) -> None:
    door = DOORS[name]
    if door.scope is not Scope.INFER:
        refused = await door.ask(home, bearer(key))
        assert (refused.status_code, complaint(door, refused)) == (403, f"this key has no scope '{door.scope}'")
        operator = home.new_key(door.scope)
        assert (await door.ask(home, bearer(operator))).status_code == 200
    else:
        response = await door.ask(home, bearer(key))
        assert response.status_code == 200, response.text
        response = await door.ask(home, {"x-api-key": key.secret})
        assert response.status_code == 200, response.text
        other = home.new_key(Scope.REPOSITORY, Scope.ADMIN)
        assert (await door.ask(home, bearer(other))).status_code == 403


@pytest.mark.parametrize("name", CALLS)
async def test_a_key_opens_every_call_that_its_scopes_are_for(home: House, key: NewKey, name: str) -> None:
    answered = await home.call(name, message(name, "shout" if name in CHANGES else "identity"), CALLS[name][1], key.secret)
    if name not in CHANGES:
        assert not isinstance(answered, Refusal), answered
        return
    assert (answered.code, answered.message) == (grpc.StatusCode.PERMISSION_DENIED, "this key has no scope 'repository'")
    operator = home.new_key(Scope.REPOSITORY)
    assert not isinstance(await home.call(name, message(name, "shout"), CALLS[name][1], operator.secret), Refusal)
    await home.call("RepositoryModelLoad", message("RepositoryModelLoad", "shout"), pb.RepositoryModelLoadResponse, operator.secret)


async def test_a_stream_is_opened_by_a_key_of_the_right_scope(home: House, key: NewKey) -> None:
    answers = await home.stream(grpc_row(), grpc_number(2), key=key.secret)
    assert [answer.infer_response.model_name for answer in answers] == ["identity", "count", "count"]
    refused = await home.stream(key=home.new_key(Scope.ADMIN).secret)
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED


async def test_the_administration_needs_its_scope(home: House, key: NewKey) -> None:
    refused = await home.ops.get("/admin/keys", headers=bearer(key))
    assert (refused.status_code, refused.json()["detail"]) == (403, "this key has no scope 'admin'")
    assert (await home.ops.get("/admin/keys", headers=bearer(home.new_key(Scope.ADMIN)))).status_code == 200


async def test_who_asks_is_in_the_usage_records(home: House) -> None:
    key = home.new_key()
    for name in ("infer", "infer with events", "chat", "chat elsewhere", "events elsewhere", "infer elsewhere"):
        assert (await DOORS[name].ask(home, bearer(key))).status_code == 200
    await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, key.secret)
    admin = bearer(home.new_key(Scope.ADMIN))
    async with asyncio.timeout(20):
        while True:
            records = (await home.ops.get("/admin/usage/records", params={"key": key.id}, headers=admin)).json()["records"]
            if len(records) == 7:
                break
            await asyncio.sleep(0.02)
    assert {(each["tenant"], each["outcome"], each["address"]) for each in records} == {("acme", "success", "127.0.0.1")}
    assert sorted(each["model"] for each in records) == ["chat", "count", "far-chat", "far-chat", "far-tensor", "identity", "identity"]


async def test_a_server_that_asks_nobody_answers_no_page_of_another_site(tmp_path: Path) -> None:
    """A browser sends such a page's POST without asking anyone; where its name was made to point here, it could read the answer, too."""
    async with house(tmp_path, auth="") as home:

        async def asked(path: str, **headers: str) -> tuple[int, bytes]:
            body = json.dumps(row()).encode() if path.endswith("/infer") else b"{}"
            answer = await home.http.post(path, content=body, headers={"content-type": "text/plain", **headers})
            return answer.status_code, answer.content

        key = home.new_key()
        for path, well in (("/v2/models/identity/infer", 200), ("/v2/repository/models/identity/load", 200), ("/v1/chat/completions", 400)):
            assert (await asked(path))[0] == well
            assert (await asked(path, host=f"localhost:{home.port}"))[0] == well
            assert (await asked(path, origin=f"http://{home.authority}"))[0] == well
            for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"host": f"evil.example:{home.port}"}):
                status, answer = await asked(path, **headers)
                assert status == 403, (path, headers)
                assert b"asks for no keys" in answer
                if not path.endswith("/load"):  # who shows a key is a program that was given it
                    assert (await asked(path, **headers, **bearer(key)))[0] == well
        # the same connection again, with another page's name
        assert (await asked("/v2/models/identity/infer"))[0] == 200
        assert (await asked("/v2/models/identity/infer", origin="https://evil.example"))[0] == 403


async def test_records_of_a_server_that_asks_nobody_say_where_requests_came_from(tmp_path: Path) -> None:
    async with house(tmp_path, auth="required: false, trusted_proxies: [127.0.0.0/8]") as home:
        for headers in ({}, {"x-forwarded-for": "192.0.2.7"}):
            assert (await NAMED["infer"].ask(home, headers)).status_code == 200
        await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse)
        async with asyncio.timeout(20):
            while len(records := (await home.ops.get("/admin/usage/records")).json()["records"]) < 3:
                await asyncio.sleep(0.02)
    assert sorted(each["address"] for each in records) == ["127.0.0.1", "127.0.0.1", "192.0.2.7"]


# Another's models


def plain(response: httpx2.Response, name: str) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from one to the next."""
    headers = {field: value.replace(name, "MODEL") for field, value in response.headers.items() if field not in ("date", "content-length")}
    return response.status_code, headers, response.text.replace(name, "MODEL")


@pytest.mark.parametrize("name", NAMED)
async def test_a_model_that_a_caller_may_not_use_is_answered_as_one_that_is_not_there(home: House, key: NewKey, name: str) -> None:
    door = NAMED[name]
    shown = bearer(key if door.scope is Scope.INFER else home.new_key(Scope.REPOSITORY), x_request_id="same")
    nobody = "nobody"
    hidden = plain(await door.ask(home, shown, door.secret), door.secret)
    missing = plain(await door.ask(home, shown, nobody), nobody)
    assert hidden == missing
    assert 400 <= hidden[0] < 500


WORSE = (b"", b"{", b"[]", b'{"model": 1}', b'{"inputs": 1}')


@pytest.mark.parametrize("body", [*WORSE, "temperature", "unknown", "tokens", "shape"])
@pytest.mark.parametrize("name", ["infer", "infer elsewhere", "generate", "infer with events", "chat", "chat elsewhere", "load"])
async def test_nor_does_a_bad_body_tell_them_apart(home: House, name: str, body: bytes | str) -> None:
    door, key = NAMED[name], home.new_key(Scope.INFER, Scope.REPOSITORY)
    answers = []
    for model in (door.secret, "nobody"):
        path, text = door.put(model)
        assert text is not None
        changes: dict[Any, Any] = {
            "temperature": {"temperature": "hot"},
            "unknown": {"unknown": 1},
            "tokens": {"max_tokens": -1},
            "shape": {"inputs": [{"name": "x", "shape": [-1], "datatype": "FP32", "data": []}]},
        }
        content = body if isinstance(body, bytes) else json.dumps(json.loads(text) | changes[body]).encode()
        for headers in ({}, {"inference-header-content-length": "nonsense"}, {"content-encoding": "gzip"}, {"content-encoding": "br"}):
            shown = {**door.headers, **bearer(key, x_request_id="same"), **headers}
            answers.append(plain(await home.http.post(path, content=content, headers=shown), model))
    assert answers[:4] == answers[4:]


@pytest.mark.parametrize("name", ["ModelInfer", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", *CHANGES])
async def test_the_same_over_grpc(home: House, name: str) -> None:
    key = home.new_key(Scope.INFER, Scope.REPOSITORY)
    answers = []
    for model in ("secret", "nobody"):
        answered = await home.call(name, message(name, model), CALLS[name][1], key.secret, x_request_id="same")
        assert isinstance(answered, Refusal), answered
        answers.append((answered.code, answered.message.replace(model, "MODEL"), answered.metadata))
    assert answers[0] == answers[1]


async def test_a_wish_for_classes_does_not_tell_them_apart_either(home: House, key: NewKey) -> None:
    answers = []
    for model in ("secret", "nobody"):
        asked = grpc_row(model)
        asked.outputs.add(name="y").parameters["classification"].int64_param = 1
        answered = await home.call("ModelInfer", asked, pb.ModelInferResponse, key.secret, x_request_id="same")
        (streamed,) = await home.stream(asked, key=key.secret)
        answers.append((answered.code, answered.message.replace(model, "MODEL"), streamed.error_message.replace(model, "MODEL")))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("version", ["", "1", "9"])
@pytest.mark.parametrize("in_band", [True, False])
async def test_the_same_in_a_stream(home: House, key: NewKey, version: str, in_band: bool) -> None:
    told = []
    for model in ("secret", "nobody", "secret-far-tensor"):
        answer = await home.stream(grpc_row(model, version), key=key.secret, in_band=in_band)
        said = (None, answer[0].error_message) if in_band else (answer.code, answer.message)
        told.append((said[0], said[1].replace(model, "MODEL")))
    assert told[0] == told[1] == told[2]


async def test_lists_have_only_what_a_caller_may_use(home: House, key: NewKey) -> None:
    listed = json.dumps([(await door.ask(home, bearer(key))).json() for door in GENERAL.values()])
    assert "identity" in listed and "far-chat" in listed
    assert not [words for words in ('"secret', "models/secret", "@secret") if words in listed]
    index = await home.call("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse, key.secret)
    statistics = await home.call("ModelStatistics", pb.ModelStatisticsRequest(), pb.ModelStatisticsResponse, key.secret)
    assert {each.name for each in index.models} == {"identity", "shout", "count", "spare", "chat"}
    assert {each.name for each in statistics.model_stats} <= {"identity", "shout", "count", "spare", "chat"}


async def test_a_key_sees_what_both_its_tenant_and_itself_allow(home: House) -> None:
    narrow = home.new_key(models=("ident*", "secret"))
    assert (await NAMED["infer"].ask(home, bearer(narrow))).status_code == 200
    assert (await NAMED["infer"].ask(home, bearer(narrow), "secret")).status_code == 404
    assert (await NAMED["chat"].ask(home, bearer(narrow))).status_code == 404
    assert (await home.http.get("/v1/models", headers=bearer(narrow))).json()["data"] == []


# Bad credentials


def forged() -> str:
    """A key that nobody has."""
    return new_key().secret


WRONG = {
    "forged": lambda key: forged(),
    "another end": lambda key: key.secret[:-6] + "000000",
    "truncated": lambda key: key.secret[:-1],
    "its id alone": lambda key: f"fl_{key.id}_",
    "somebody else's random part": lambda key: f"fl_{key.id}_{forged().rpartition('_')[2]}",
    "longer": lambda key: key.secret + "0",
    "another case": lambda key: key.secret.swapcase(),
    "bytes": lambda key: "fl_\xff\xfe",
    "not one of ours": lambda key: "sk-123",
    "a token of nobody": lambda key: "e30.e30.e30",
    "very long": lambda key: "fl_" + "x" * 20_000,
}


@pytest.mark.parametrize("kind", WRONG)
async def test_a_wrong_key_is_refused_with_the_same_words_whatever_is_wrong_with_it(home: House, key: NewKey, kind: str) -> None:
    wrong = WRONG[kind](key)
    for headers in ({"authorization": f"Bearer {wrong}"}, {"x-api-key": wrong}, {"api-key": wrong}):
        shown = {name: value.encode("latin-1") for name, value in headers.items()}
        for door in (NAMED["infer"], NAMED["chat"], NAMED["chat elsewhere"], NAMED["infer with events"]):
            response = await door.ask(home, shown)  # type: ignore[arg-type]
            assert response.status_code == 401
            assert complaint(door, response) == INVALID
        response = await home.ops.get("/admin/keys", headers=shown)
        assert (response.status_code, response.json()["detail"]) == (401, INVALID)


async def test_an_expired_and_a_revoked_key_are_refused_like_one_that_never_was(home: House) -> None:
    expired, revoked = home.new_key(expires=time.time() - 1), home.new_key()
    assert (await NAMED["infer"].ask(home, bearer(revoked))).status_code == 200
    home.revoke(revoked)
    answers = []
    for wrong in (expired.secret, revoked.secret, forged()):
        shown = bearer(wrong, x_request_id="same")
        http = [plain(await NAMED[name].ask(home, shown), "x") for name in ("infer", "chat", "chat elsewhere")]
        refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, wrong, x_request_id="same")
        answers.append((http, refused.code, refused.message, refused.metadata))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0][0][0] == 401
    assert home.count("fairlead_auth_failures_total", "expired") and home.count("fairlead_auth_failures_total", "revoked")


async def test_a_connection_remembers_who_came_by_it_only_as_long_as_it_is_true(home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, now = home.server.doorkeeper, time.time()
    assert keeper is not None
    key, other = home.new_key(expires=now + 60), home.new_key()
    last, looked = Acquaintance(), 0
    known = home.server.identity.known

    def counted(*args: Any) -> Any:
        nonlocal looked
        looked += 1
        return known(*args)

    monkeypatch.setattr(home.server.identity, "known", counted)

    def who(shown: NewKey, headers: dict[bytes, bytes] | None = None) -> str:
        fields = {b"authorization": f"Bearer {shown.secret}".encode()} | (headers or {})
        caller = keeper.caller_again(fields, "10.0.0.1", None, last)
        assert caller is not None
        return caller.key

    assert [who(key), who(key), who(key)] == [key.id] * 3 and looked == 1
    assert [who(other), who(key)] == [other.id, key.id] and looked == 3
    with pytest.raises(Unauthenticated):
        who(key, {b"x-api-key": other.secret.encode()})
    assert who(key) == key.id
    monkeypatch.setattr("fairlead.api.doorkeeper.time", SimpleNamespace(time=lambda: now + 61))
    with pytest.raises(Unauthenticated):
        who(key)
    assert who(other) == other.id
    home.revoke(other)
    with pytest.raises(Unauthenticated):
        who(other)


async def test_a_connection_remembers_whoever_shows_nothing_too(tmp_path: Path) -> None:
    async with house(tmp_path, auth="required: false") as home:
        keeper = home.server.doorkeeper
        assert keeper is not None
        last = Acquaintance()

        def anyone(**headers: bytes) -> Any:
            return keeper.caller_again({name.encode(): value for name, value in headers.items()}, "10.0.0.1", None, last)

        first = anyone()
        assert anyone() is first and first.address == "10.0.0.1"
        key = home.new_key()
        assert anyone(authorization=f"Bearer {key.secret}".encode()).key == key.id
        policy = TenantPolicy(limits={"requests_per_minute": 3.0})
        home.store.change_tenant("default", lambda row: structs.replace(row, policy=policy), AUDIT)
        home.refresh()
        later = anyone()
        assert later is not first and later.policy.limits == {"requests_per_minute": 3.0}


async def test_a_stream_does_not_outlive_its_key(home: House) -> None:
    key = home.new_key()
    method = home.channel.stream_stream(STREAM_INFER, lambda each: each.SerializeToString(), pb.ModelStreamInferResponse.FromString)
    call = method(metadata=fields_of(key.secret), timeout=20)
    await call.write(grpc_row())
    assert (await call.read()).infer_response.model_name == "identity"
    home.revoke(key)
    for asked in (grpc_row(), grpc_number()):
        await call.write(asked)
        assert (await call.read()).error_message == INVALID
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_two_different_keys_in_one_request_are_refused_and_the_same_one_twice_is_not(home: House, key: NewKey) -> None:
    for door in (NAMED["infer"], NAMED["chat"], NAMED["chat elsewhere"]):
        refused = await door.ask(home, bearer(key, x_api_key=forged()))
        assert refused.status_code == 401
        assert "show different keys" in complaint(door, refused)
        assert (await door.ask(home, bearer(key, x_api_key=key.secret))).status_code == 200
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, key.secret, x_api_key=forged())
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED and "show different keys" in refused.message


TWICE = ("authorization", "x-api-key", "api-key", "host", "x-fairlead-class", "x-fairlead-session", "x-forwarded-for", "signature-input")


@pytest.mark.parametrize("name", TWICE)
async def test_a_header_that_says_who_somebody_is_must_not_come_twice(home: House, key: NewKey, name: str) -> None:
    value = {"authorization": f"Bearer {key.secret}", "host": home.authority}.get(name, "standard")
    for door in (NAMED["infer"], NAMED["chat"], NAMED["chat elsewhere"], NAMED["metadata"]):
        path, body = door.put(door.model)
        content = (body or "").encode()
        fields = [("host", home.authority), ("authorization", f"Bearer {key.secret}"), (name, value)]
        fields += [(name, value)] if name not in ("host", "authorization") else []
        head = f"{door.method} {path} HTTP/1.1\r\n" + "".join(f"{each}: {what}\r\n" for each, what in fields)
        async with wire_to(home) as connection:
            await connection.send(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            status, _, answer = await connection.receive()
        assert status == 400
        assert f"header '{name}' comes twice" in answer.decode()


async def test_the_same_holds_for_the_metadata_of_calls(home: House, key: NewKey) -> None:
    call = home.channel.unary_unary(SERVICE + "ModelInfer", lambda each: each.SerializeToString(), pb.ModelInferResponse.FromString)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(grpc_row(), metadata=(("authorization", f"Bearer {key.secret}"), ("authorization", "Bearer x")))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "header 'authorization' comes twice"


# The shape of what is refused before a request is anybody's


REFUSED = {
    "too large": (413, "POST {path} HTTP/1.1\r\nhost: x\r\n{key}content-length: 99999999\r\n\r\n"),
    "chunks": (413, "POST {path} HTTP/1.1\r\nhost: x\r\n{key}transfer-encoding: chunked\r\n\r\n500000\r\n" + "x" * 0x500000),
    "no length": (400, "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n"),
    "no header": (400, "POST {path} HTTP/1.1\r\nno header\r\n\r\n"),
    "long head": (431, "POST {path} HTTP/1.1\r\nx: " + "y" * 70_000 + "\r\n\r\n"),
    "no key": (401, "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}"),
    "unknown path": (404, "POST {path}/no/where HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"),
}
OPENAI_PATHS = ("/v1/tokenize", "/v1/chat/completions")
MESSAGES = "/v1/messages"


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("path", [*OPENAI_PATHS, MESSAGES, "/v2/models/identity/infer", "/v2/repository/index", "/admin/keys"])
async def test_what_is_refused_before_it_is_routed_has_the_shape_of_its_path(home: House, path: str, what: str) -> None:
    expected, text = REFUSED[what]
    key = home.new_key(Scope.INFER, Scope.ADMIN)
    port = home.server.ops.port if path.startswith("/admin") else home.port
    connection = Wire(*await asyncio.open_connection("127.0.0.1", port))
    try:
        connection.writer.write(text.format(path=path, key=f"authorization: Bearer {key.secret}\r\n").encode())
        status, headers, body = await connection.receive()
    finally:
        await connection.close()
    assert status == expected
    answer = json.loads(body)
    if path in OPENAI_PATHS:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    elif path == MESSAGES:
        assert (answer["type"], set(answer["error"])) == ("error", {"type", "message"})
    elif path.startswith("/admin"):
        assert (headers["content-type"], answer["status"]) == ("application/problem+json", status)
    else:
        assert isinstance(answer["error"], str)


# Before the body


@pytest.mark.parametrize("name", ["infer", "generate", "chat", "chat elsewhere", "infer elsewhere", "load", "the index"])
async def test_the_refusal_comes_before_the_body(home: House, name: str) -> None:
    door = DOORS[name]
    async with wire_to(home) as connection:
        path, _ = door.put(door.model)
        head = f"POST {path} HTTP/1.1\r\nhost: {home.authority}\r\ncontent-length: {4 << 20}\r\nexpect: 100-continue\r\n\r\n"
        await connection.send(head.encode())
        status, _, _ = await connection.receive()
        assert status == 401
        assert home.server.http.receiving_bytes == 0


@pytest.mark.parametrize("name", ["infer", "generate", "chat", "chat elsewhere", "the index", "load"])
async def test_who_sends_a_large_body_without_a_key_reads_why_it_is_not_taken(home: House, name: str) -> None:
    assert await asyncio.to_thread(refused, home, name, "") == (401, "close")


@pytest.mark.parametrize("name", ["generate", "the index"])
async def test_who_sends_more_than_an_operation_takes_reads_that_too(home: House, key: NewKey, name: str) -> None:
    assert await asyncio.to_thread(refused, home, name, key.secret) == (413, "close")


def refused(home: House, name: str, key: str) -> tuple[int, str | None]:
    """What a client reads who sends all of its 4 MiB before it looks."""
    path, _ = DOORS[name].put(DOORS[name].model)
    connection = http.client.HTTPConnection("127.0.0.1", home.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", path, bytes(4 << 20), bearer(key) if key else {})
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("connection")


async def test_a_call_without_a_key_is_refused_before_its_message(home: House) -> None:
    begun = asyncio.Event()

    async def messages() -> AsyncIterator[Any]:
        await begun.wait()
        yield grpc_row()

    method = home.channel.stream_unary(SERVICE + "ModelInfer", lambda each: each.SerializeToString(), pb.ModelInferResponse.FromString)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await method(messages(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_heads_and_bodies_that_come_too_slowly_are_given_up_with_a_key_too(home: House, key: NewKey) -> None:
    head = f"POST /v2/models/identity/infer HTTP/1.1\r\nhost: {home.authority}\r\nauthorization: Bearer {key.secret}\r\n"
    body = "content-length: 100\r\n\r\n{"
    for path in ("/v2/models/identity/infer", "/v1/chat/completions", "/v1/tokenize", "/v2/models/shout/generate"):
        for text in (head, head + body):
            async with wire_to(home) as connection:
                before = home.server.http.num_connections
                await connection.send(text.replace("/v2/models/identity/infer", path).encode())
                async with asyncio.timeout(20):
                    while home.server.http.num_connections < before or not any(each.stage for each in home.server.http._state.connections):
                        await asyncio.sleep(0.001)
                for each in list(home.server.http._state.connections):
                    each.sweep(time.perf_counter() + 60.0)
                status, _, _ = await connection.receive()
                assert status == 408


async def test_a_head_that_is_too_long_is_refused_before_anybody_is_asked(home: House, key: NewKey) -> None:
    head = f"POST /v2/models/identity/infer HTTP/1.1\r\nhost: {home.authority}\r\nauthorization: Bearer {key.secret}\r\n"
    for num_fields, end in ((100, "content-length: 0\r\n\r\n"), (500, "")):
        async with wire_to(home) as connection:
            fields = "".join(f"x-{each}: {'y' * 1000}\r\n" for each in range(num_fields))
            connection.writer.write((head + fields + end).encode())
            assert (await connection.receive())[0] == 431
    call = home.channel.unary_unary(SERVICE + "ModelInfer", lambda each: each.SerializeToString(), pb.ModelInferResponse.FromString)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(grpc_row(), metadata=(("authorization", f"Bearer {key.secret}"), *((f"x-{each}", "y" * 1000) for each in range(80))))
    assert (await NAMED["infer"].ask(home, bearer(key))).status_code == 200


FRAMES = {
    "both lengths": "content-length: {n}\r\ntransfer-encoding: chunked",
    "two lengths": "content-length: {n}\r\ncontent-length: 0",
    "a sign": "content-length: +{n}",
    "a space": "transfer-encoding : chunked",
    "a fold": "content-length:\r\n {n}\r\ntransfer-encoding:\r\n chunked",
    "another coding": "transfer-encoding: xchunked",
    "chunked in between": "transfer-encoding: chunked, identity",
    "a bare line feed": "content-length: 0\ntransfer-encoding: chunked",
    "nothing": "x-nothing: 1",
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", ["infer", "chat", "chat elsewhere"])
async def test_no_request_is_smuggled_in_behind_another_s_key(home: House, key: NewKey, name: str, frame: str) -> None:
    path, body = NAMED[name].put(NAMED[name].model)
    assert body is not None
    another = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key.secret}\r\n{FRAMES[frame]}\r\n\r\n"
    async with wire_to(home) as connection:
        await connection.send(head.replace("{n}", str(len(another))).encode() + b"0\r\n\r\n" + another.encode())
        connection.writer.write_eof()
        answers = await connection.ended()
    assert b" 200 OK" not in answers


# Signed requests


def signed(home: House, key: NewKey, door: Door, *, model: str = "", ops: bool = False, **more: Any) -> dict[str, str]:
    """The headers of a signature by a key's shared secret."""
    path, body = door.put(model or door.model)
    server = home.server.ops if ops else home.server.http
    content = more.pop("content", (body or "").encode())
    options = {"keyid": key.id, "secret": bytes.fromhex(key.signing_key), "now": time.time(), **more}
    return sign(door.method, f"http://127.0.0.1:{server.port}{path}", content, **options)


SIGNED = (
    "infer",
    "infer with events",
    "generate",
    "metadata",
    "chat",
    "chat with events",
    "chat elsewhere",
    "events elsewhere",
    "infer elsewhere",
)


@pytest.mark.parametrize("name", SIGNED)
async def test_a_signature_alone_says_who_asks_and_counts_once(home: House, key: NewKey, name: str) -> None:
    door = NAMED[name]
    headers = signed(home, key, door)
    assert (await door.ask(home, headers)).status_code == 200
    replayed = await door.ask(home, headers)
    assert replayed.status_code == 401
    assert "nonce was used before" in complaint(door, replayed)
    assert "accept-signature" in replayed.headers and "www-authenticate" in replayed.headers


@pytest.mark.parametrize("name", ["infer", "chat", "chat elsewhere", "infer elsewhere"])
async def test_a_signed_request_that_was_changed_is_refused(home: House, key: NewKey, name: str) -> None:
    door = NAMED[name]
    path, body = door.put(door.model)
    assert body is not None
    changed = body.replace("1.0", "2.0").replace("some words", "other word").encode()
    for content, target in ((changed, path), (body.encode(), path + "?x=1")):
        response = await home.http.post(target, content=content, headers=signed(home, key, door))
        assert response.status_code == 401, target
    wrong = signed(home, new_key(), door)
    assert (await door.ask(home, wrong)).status_code == 401
    forged_signature = signed(home, key, door, secret=b"x" * 32)
    assert (await door.ask(home, forged_signature)).status_code == 401
    late = signed(home, key, door, now=time.time() - 400)
    assert (await door.ask(home, late)).status_code == 401
    assert (await door.ask(home, signed(home, key, door) | {"x-fairlead-class": "standard"})).status_code == 401


async def test_what_is_read_before_its_signature_is_held_against_it_is_bounded(home: House, key: NewKey) -> None:
    keeper, door = home.server.doorkeeper, NAMED["generate"]
    _, body = door.put(door.model)
    keeper.unproved_bytes = MAX_UNPROVED_BYTES - len(body or "") + 1
    try:
        assert (await door.ask(home, signed(home, key, door))).status_code == 503
    finally:
        keeper.unproved_bytes -= MAX_UNPROVED_BYTES - len(body or "") + 1
    assert (await door.ask(home, signed(home, key, door))).status_code == 200
    assert keeper.unproved_bytes == 0


async def test_the_administration_takes_signed_requests(home: House) -> None:
    admin = home.new_key(Scope.ADMIN)
    door = Door("POST", "/admin/tenants", {"name": "signed-for"})
    headers = signed(home, admin, door, ops=True)
    path, body = door.put("")
    assert body is not None
    assert (await home.ops.post(path, content=body.encode(), headers=headers)).status_code == 200
    assert (await home.ops.post(path, content=body.encode(), headers=headers)).status_code == 401
    changed = signed(home, admin, door, ops=True)
    assert (await home.ops.post(path, content=body.replace("signed-for", "another").encode(), headers=changed)).status_code == 401
    home.refresh()
    assert {row.name for row in home.store.tenants()} & {"signed-for", "another"} == {"signed-for"}


async def test_a_large_and_a_compressed_body_are_signed_as_they_are_sent(home: House, key: NewKey) -> None:
    door = Door("POST", "/v2/models/shout/infer", None, {}, "shout")
    texts = ["hello" * 1000] * 64
    body = json.dumps({"inputs": [{"name": "text", "shape": [64, 1], "datatype": "BYTES", "data": texts}]}).encode()
    assert len(body) > DIRECT_BYTES
    response = await home.http.post(door.path, content=body, headers=signed(home, key, door, content=body))
    assert response.status_code == 200
    packed = gzip.compress(body)
    headers = signed(home, key, door, content=packed, headers={"content-encoding": "gzip"})
    assert (await home.http.post(door.path, content=packed, headers={**headers, "content-encoding": "gzip"})).status_code == 200
    uncovered = signed(home, key, door, content=packed)
    assert (await home.http.post(door.path, content=packed, headers={**uncovered, "content-encoding": "gzip"})).status_code == 401


async def test_a_private_key_that_the_server_never_sees_signs_too(home: House) -> None:
    private = Ed25519PrivateKey.generate()
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    own = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    key = home.new_key(public_key=pem)
    for name in ("infer", "chat", "chat elsewhere"):
        assert (await NAMED[name].ask(home, signed(home, key, NAMED[name], secret=own))).status_code == 200


async def test_a_revoked_or_expired_key_signs_nothing(home: House) -> None:
    revoked, expired = home.new_key(), home.new_key(expires=time.time() - 1)
    home.revoke(revoked)
    for key in (revoked, expired):
        for name in ("infer", "chat"):
            refused = await NAMED[name].ask(home, signed(home, key, NAMED[name]))
            assert refused.status_code == 401


async def test_a_signature_by_another_key_than_the_one_that_is_shown_is_refused(home: House, key: NewKey) -> None:
    other = home.new_key()
    for name in ("infer", "chat", "chat elsewhere"):
        refused = await NAMED[name].ask(home, {**signed(home, other, NAMED[name]), **bearer(key)})
        assert (refused.status_code, complaint(NAMED[name], refused)) == (401, "the request is signed by another key than the one it shows")


async def test_a_tenant_that_must_sign_is_served_signed_requests_only(home: House) -> None:
    home.new_tenant("signers")
    key = home.new_key(tenant="signers")
    for name in ("infer", "chat", "metadata", "chat elsewhere", "infer with events"):
        refused = await NAMED[name].ask(home, bearer(key))
        assert refused.status_code == 401
        assert "must be signed" in complaint(NAMED[name], refused)
        assert (await NAMED[name].ask(home, signed(home, key, NAMED[name]))).status_code == 200
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, key.secret)
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED and "must be signed" in refused.message
    assert (await home.stream(key=key.secret)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_model_may_ask_for_signatures_too(home: House, key: NewKey) -> None:
    door = Door("POST", "/v2/models/{model}/infer", row(width=1), {}, "spare")
    refused = await door.ask(home, bearer(key))
    assert refused.status_code == 401 and "must be signed" in complaint(door, refused)
    assert (await door.ask(home, signed(home, key, door))).status_code == 200
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, 1], contents=pb.InferTensorContents(fp32_contents=[1])
    )
    asked = pb.ModelInferRequest(model_name="spare", inputs=[tensor])
    refused = await home.call("ModelInfer", asked, pb.ModelInferResponse, key.secret)
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED


# Classes of service


@pytest.mark.parametrize(
    "name", ["infer", "infer with events", "generate", "chat", "chat with events", "chat elsewhere", "events elsewhere", "infer elsewhere"]
)
async def test_a_class_is_given_only_to_those_who_may_ask_for_it(home: House, key: NewKey, name: str) -> None:
    door = NAMED[name]
    refused = await door.ask(home, bearer(key, x_fairlead_class="interactive"))
    assert refused.status_code == 403
    assert "class `interactive` is not one that this caller may ask for: standard" in complaint(door, refused)
    assert (await door.ask(home, bearer(key, x_fairlead_class="nonsense"))).status_code == 400
    assert (await door.ask(home, bearer(key, x_fairlead_class="standard"))).status_code == 200
    vip = home.new_key(tenant=a_vip(home))
    assert (await door.ask(home, bearer(vip, x_fairlead_class="batch"))).status_code == 200


def a_vip(home: House) -> str:
    if "vip" not in {row.name for row in home.store.tenants()}:
        home.new_tenant("vip")
    return "vip"


async def test_a_priority_is_no_way_round_the_classes(home: House, key: NewKey) -> None:
    body = {**row(), "parameters": {"priority": 1}}
    refused = await home.http.post("/v2/models/identity/infer", json=body, headers=bearer(key))
    assert refused.status_code == 403 and "x-fairlead-class" in refused.json()["error"]
    refused = await home.http.post("/v1/chat/completions", json=chat(priority=1), headers=bearer(key))
    assert refused.status_code == 403 and "x-fairlead-class" in refused.json()["error"]["message"]
    asked = grpc_row()
    asked.parameters["priority"].int64_param = 1
    assert (await home.call("ModelInfer", asked, pb.ModelInferResponse, key.secret)).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_class_is_asked_for_in_the_metadata_of_calls_too(home: House, key: NewKey) -> None:
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, key.secret, x_fairlead_class="interactive")
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    (answer,) = await home.stream(grpc_row(), key=key.secret, x_fairlead_class="interactive")
    assert "may ask for" in answer.error_message
    vip = home.new_key(tenant=a_vip(home))
    answered = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, vip.secret, x_fairlead_class="batch")
    assert not isinstance(answered, Refusal)


# Limits


LIMITED = (
    "infer",
    "infer with events",
    "generate",
    "chat",
    "chat with events",
    "completions",
    "embeddings",
    "chat elsewhere",
    "events elsewhere",
    "infer elsewhere",
)


@pytest.mark.parametrize("name", LIMITED)
async def test_answers_say_how_much_is_left_and_refusals_when_to_come_again(home: House, name: str) -> None:
    door, key = NAMED[name], home.new_key(limits={"requests_per_minute": 2, "tokens_per_minute": 1e6})
    for left in (1, 0):
        headers = (await door.ask(home, bearer(key))).headers
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", str(left))
        assert headers["x-ratelimit-reset-requests"].endswith("s")
        assert '"key-requests_per_minute";q=2;w=60' in headers["ratelimit-policy"]
        assert f'"key-requests_per_minute";r={left}' in headers["ratelimit"]
    refused = await door.ask(home, bearer(key))
    assert refused.status_code == 429
    assert refused.headers["x-fairlead-reason"] == "limit-requests"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "limit of 2 requests per minute is reached" in complaint(door, refused)
    if door.openai:
        assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_a_used_up_budget_is_an_insufficient_quota_to_openai_s_clients(home: House) -> None:
    key = home.new_key(limits={"requests_per_day": 1})
    assert (await NAMED["chat"].ask(home, bearer(key))).status_code == 200
    for name in ("chat", "chat elsewhere", "events elsewhere"):
        refused = await NAMED[name].ask(home, bearer(key))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert refused.headers["x-fairlead-reason"] == "budget-requests"


async def test_the_same_in_the_metadata_of_calls(home: House) -> None:
    key = home.new_key(limits={"requests_per_minute": 1})
    call = home.channel.unary_unary(SERVICE + "ModelInfer", lambda each: each.SerializeToString(), pb.ModelInferResponse.FromString)
    under_way = call(grpc_row(), metadata=(("authorization", f"Bearer {key.secret}"),))
    await under_way
    told = {**dict(await under_way.initial_metadata()), **dict(await under_way.trailing_metadata())}
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("1", "0")
    refused = await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, key.secret)
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.metadata["x-fairlead-reason"] == "limit-requests"
    assert int(refused.metadata["retry-after"]) > 0
    assert refused.metadata["x-ratelimit-remaining-requests"] == "0"
    for model, asked in (("identity", grpc_row()), ("count", grpc_number())):
        stream = home.channel.stream_stream(STREAM_INFER, lambda each: each.SerializeToString(), pb.ModelStreamInferResponse.FromString)
        opened = stream(metadata=fields_of(home.new_key(limits={"requests_per_minute": 5}).secret), timeout=20)
        await opened.write(asked)
        assert (await opened.read()).infer_response.model_name == model
        assert dict(await opened.initial_metadata())["x-ratelimit-remaining-requests"] == "4"
        opened.cancel()
    refused = await home.stream(grpc_row(), key=key.secret, in_band=False)
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.metadata["x-fairlead-reason"] == "limit-requests"
    (answer,) = await home.stream(grpc_row(), key=key.secret)
    assert "limit of 1 requests per minute is reached" in answer.error_message


# The log


async def test_every_refusal_has_its_line_in_the_access_log(home: House, key: NewKey) -> None:
    asked = (
        ("infer", {}, "identity", 401),
        ("chat", {}, "", 401),
        ("chat elsewhere", {}, "", 401),
        ("metadata", {}, "", 401),
        ("load", bearer(key), "", 403),
        ("infer", bearer(key, x_fairlead_class="interactive"), "identity", 403),
        ("chat", bearer(key, x_fairlead_class="interactive"), "chat", 403),
    )
    for turn, (name, headers, model, status) in enumerate(asked):
        response = await NAMED[name].ask(home, {**headers, "x-request-id": f"refused-{turn}"})
        line = await home.line(f"refused-{turn}")
        assert (line["status"], line["model"], line["level"]) == (status, model, "warning")
        assert (response.status_code == status and line["error"] in response.json()["error"]) or NAMED[name].openai
        assert response.headers["x-request-id"] == f"refused-{turn}"
    for name in ("infer", "infer with events", "generate", "chat"):
        await NAMED[name].ask(home, bearer(key, x_request_id="hidden"), NAMED[name].secret)
        assert (await home.line("hidden"))["status"] == 404
    await home.call("ModelInfer", grpc_row(), pb.ModelInferResponse, x_request_id="refused-grpc")
    line = await home.line("refused-grpc")
    assert (line["protocol"], line["status"]) == ("grpc", grpc.StatusCode.UNAUTHENTICATED.value[0])


async def test_no_key_is_ever_in_the_log(home: House, key: NewKey) -> None:
    home.lines()
    for name in ("infer", "chat", "chat elsewhere"):
        await NAMED[name].ask(home, bearer(key))
        await NAMED[name].ask(home, bearer(key, x_api_key=forged()))
        await NAMED[name].ask(home, bearer(key.secret[:-1]))
    assert key.secret[16:] not in json.dumps(home.lines())
