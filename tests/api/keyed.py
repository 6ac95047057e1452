"""A whole server in this process, whose doors ask for keys: small models, a store of its own, keys for the asking."""

import asyncio
import io
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
from msgspec import Struct
from tritonclient.grpc import service_pb2 as pb

from fairlead.api.grpc.messages import message_class
from fairlead.app import Server
from fairlead.backends import fake_engine
from fairlead.backends.table import BACKENDS
from fairlead.core.policy import Limits, Scope, TenantPolicy
from fairlead.core.settings import parse_settings
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.store.rows import AuditRow, KeyRow, TenantRow
from fairlead.store.store import Store
from tests.api import served as http_models
from tests.api.http_fake import Wire
from tests.stores import new_store

SERVICE = "/inference.GRPCInferenceService/"
STREAM_INFER = SERVICE + "ModelStreamInfer"
SECRET = """
import numpy as np

class Secret:
    example = {"x": np.zeros((2, 4), np.float32)}

    def infer(self, inputs):
        return {"y": inputs["x"]}
"""
IN_A_THREAD = "instances: {isolation: thread}\n"
MODELS = {
    "identity": http_models.MODELS["identity"],
    "shout": http_models.MODELS["shout"],
    "count": http_models.MODELS["count"],
    "spare": http_models.MODELS["spare"],
    "secret": (SECRET, IN_A_THREAD),
    "secret-spare": (SECRET, IN_A_THREAD),
}
ENGINES = ("chat", "secret-chat")
USED = "[identity, shout, count, spare, chat, 'far-*']"
"""Patterns of what the tenant `acme` may use."""
AUDIT = AuditRow(time=1.0, actor="test", action="test", subject="test")
SECONDS = 20.0
HEALTH = "/grpc.health.v1.Health/Check"
HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")


class Refusal(Struct):
    """A gRPC call that failed."""

    code: grpc.StatusCode
    message: str
    metadata: dict[str, str]


class House(Struct):
    server: Server
    store: Store
    http: httpx2.AsyncClient
    ops: httpx2.AsyncClient
    channel: grpc.aio.Channel
    log: io.StringIO

    @property
    def port(self) -> int:
        return self.server.http.port

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    def new_key(
        self,
        *scopes: Scope,
        tenant: str = "acme",
        models: tuple[str, ...] | None = None,
        limits: Limits | None = None,
        expires: float | None = None,
        public_key: str | None = None,
        qos_class: str | None = None,
    ) -> NewKey:
        """One that counts at once."""
        new = new_key()
        row = KeyRow(
            id=new.id,
            tenant=tenant,
            digest=new.digest,
            signing_key=new.signing_key,
            prefix=new.prefix,
            scopes=scopes or (Scope.INFER,),
            models=models,
            limits=limits or {},
            created=1.0,
            expires=expires,
            public_key=public_key,
            qos_class=qos_class,
        )
        self.store.add_key(row, AUDIT)
        self.refresh()
        return new

    def new_tenant(self, name: str, policy: TenantPolicy | None = None) -> None:
        self.store.add_tenant(TenantRow(name=name, policy=policy, created=1.0), AUDIT)
        self.refresh()

    def revoke(self, key: NewKey) -> None:
        self.store.revoke_key(key.id, AUDIT, force=True)
        self.refresh()

    def refresh(self) -> None:
        """As `follow` does twice a second."""
        self.server.keyring.refresh_if_changed()

    def lines(self) -> list[dict[str, Any]]:
        """What the access log has got since."""
        self.server.telemetry.finished.flush()
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        self.log.seek(0)
        self.log.truncate()
        return lines

    async def line(self, request_id: str) -> dict[str, Any]:
        """The access log's line of a request; some ends are written a moment after the answer."""
        async with asyncio.timeout(SECONDS):
            while True:
                for line in self.lines():
                    if line["request_id"] == request_id:
                        return line
                await asyncio.sleep(0.005)

    def count(self, name: str, *labels: str) -> int:
        return self.server.metrics.counts.get(name, *labels)

    async def call(self, method: str, message: Any, answer: Any, key: str = "", **metadata: str) -> Any:
        """A unary gRPC call: its answer, or a Refusal."""
        call = self.channel.unary_unary(
            method if method.startswith("/") else SERVICE + method, lambda each: each.SerializeToString(), answer.FromString
        )
        return await told(call(message, metadata=fields_of(key, **metadata), timeout=SECONDS))

    async def stream(self, *messages: Any, key: str = "", in_band: bool = True, **metadata: str) -> Any:
        """The answers of one ModelStreamInfer call, or a Refusal. Without messages: what a refusal says before any is sent."""
        method = self.channel.stream_stream(STREAM_INFER, lambda each: each.SerializeToString(), pb.ModelStreamInferResponse.FromString)
        fields = fields_of(key, **metadata) + (() if in_band else (("triton_grpc_error", "true"),))
        call = method(iter(messages) if messages else None, metadata=fields, timeout=SECONDS)

        async def whole() -> Any:
            return [each async for each in call] if messages else await call.read()

        return await told(whole())


async def told(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        metadata = {**dict(error.initial_metadata() or ()), **dict(error.trailing_metadata() or ())}
        return Refusal(error.code(), error.details() or "", metadata)


def fields_of(key: str, **metadata: str) -> tuple[tuple[str, str], ...]:
    fields = {name.replace("_", "-"): value for name, value in metadata.items()}
    if key:
        fields["authorization"] = f"Bearer {key}"
    return tuple(fields.items())


def bearer(key: NewKey | str, **headers: str) -> dict[str, str]:
    """Headers; names with _ for -."""
    secret = key if isinstance(key, str) else key.secret
    return {"authorization": f"Bearer {secret}", **{name.replace("_", "-"): value for name, value in headers.items()}}


def row(name: str = "x", width: int = 4, datatype: str = "FP32") -> dict[str, Any]:
    """A KServe body of one row."""
    return {"inputs": [{"name": name, "shape": [1, width], "datatype": datatype, "data": [1.0] * width}]}


def number(n: int = 2) -> dict[str, Any]:
    """One for `count`."""
    return {"inputs": [{"name": "n", "shape": [1], "datatype": "INT32", "data": [n]}]}


def grpc_row(model: str = "identity", version: str = "") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, 4], contents=pb.InferTensorContents(fp32_contents=[1, 2, 3, 4])
    )
    return pb.ModelInferRequest(model_name=model, model_version=version, inputs=[tensor])


def grpc_number(n: int = 2, model: str = "count") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name="n", datatype="INT32", shape=[1], contents=pb.InferTensorContents(int_contents=[n]))
    return pb.ModelInferRequest(model_name=model, inputs=[tensor])


def chat(model: str = "chat", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "some words to say"}], "max_tokens": 8, **more}


def write_models(root: Path) -> None:
    for name, (code, spec) in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(code)
        (root / name / "model.yaml").write_text(spec)
    for name in ENGINES:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "nothing").touch()
        (root / name / "model.yaml").write_text("backend: fake_engine\n")


@asynccontextmanager
async def house(
    folder: Path,
    *,
    auth: str = "required: true",
    gateway: str = "",
    tls: str = "",
    extra: str = "",
    tls_context: ssl.SSLContext | None = None,
) -> AsyncIterator[House]:
    """`auth`, `tls`: in braces; `gateway`: lines, indented by two, after those about the tenant `acme`; `extra`: sections."""
    root = folder / "models"
    write_models(root)
    text = f"""
listen: {{port: 0, grpc_port: 0, ops_port: 0}}
models: {{repositories: ['{root}'], control: explicit, load: ['*']}}
limits: {{max_request_bytes: {4 << 20}, drain_timeout: 5}}
auth: {{{auth}}}
tls: {{{tls}}}
store: {{url: 'sqlite:///{folder}/fairlead.db', flush_seconds: 0.1}}
gateway:
  tenants:
    acme: {{models: {USED}}}
{gateway}
{extra}
"""
    store = new_store(folder)
    with fake_engines():
        store.add_tenant(TenantRow(name="acme", created=1.0), AUDIT)
        store.add_tenant(TenantRow(name="ops", created=1.0), AUDIT)
        first = new_key()
        admin = KeyRow(
            id=first.id,
            tenant="ops",
            digest=first.digest,
            signing_key=first.signing_key,
            prefix=first.prefix,
            scopes=(Scope.ADMIN,),
            created=1.0,
        )
        store.add_key(admin, AUDIT)
        server = Server(parse_settings(text, "test"), None, text)
        log = server.telemetry.access_log.stream = io.StringIO()
        try:
            await server.start()
            scheme = "https" if tls else "http"
            base = f"{scheme}://127.0.0.1:{server.http.port}"
            client = httpx2.AsyncClient(base_url=base, timeout=SECONDS, verify=tls_context or False)
            ops = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.ops.port}", timeout=SECONDS)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.port}")
            async with client, ops, channel:
                yield House(server, store, client, ops, channel, log)
        finally:
            await server.stop()
            store.close()


@contextmanager
def fake_engines() -> Iterator[None]:
    BACKENDS[fake_engine.KIND.name] = fake_engine.KIND
    try:
        yield
    finally:
        BACKENDS.pop(fake_engine.KIND.name, None)


@asynccontextmanager
async def wire_to(home: House) -> AsyncIterator[Wire]:
    """A raw connection to the data port."""
    connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port))
    try:
        yield connection
    finally:
        await connection.close()
