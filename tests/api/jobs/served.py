"""A whole server in this process whose models make pictures, and whose callers show keys: what the faces of jobs are tested against."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from fairlead.app import Server
from fairlead.backends import fake_engine, fake_painter
from fairlead.backends.table import BACKENDS
from fairlead.core.policy import Scope
from fairlead.core.settings import parse_settings
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.store.rows import KeyRow, TenantRow
from fairlead.store.store import Store
from tests.api import served as http_models
from tests.api.keyed import AUDIT, SECONDS
from tests.stores import new_file

PAINTER = "backend: fake_painter\nparameters: {num_steps: 4, size: 64}\ndiffusion: {max_pixels: 16384, max_steps: 50}\n"
SLOW = "backend: fake_painter\nparameters: {num_steps: 40, size: 64, step_seconds: 0.05}\ndiffusion: {max_num_seqs: 1}\n"
CHAT = "backend: fake_engine\n"
ENGINES = {"painter": PAINTER, "slow": SLOW, "secret": PAINTER, "chat": CHAT}
TENSORS = ("identity", "shout", "count")
USED = "[painter, slow, chat, identity, shout, count]"
"""What the tenants `acme` and `other` may use."""
SECRET = "whsec_" + base64.b64encode(b"a secret of the tests, 32 bytes.").decode()


class Studio:
    def __init__(self, server: Server, store: Store, http: httpx2.AsyncClient, log: io.StringIO) -> None:
        self.server = server
        self.store = store
        self.http = http
        self.log = log
        self.seen: list[dict[str, Any]] = []
        self.key = self.new_key()
        """Of `acme`."""
        self.other = self.new_key(tenant="other")

    @property
    def port(self) -> int:
        return self.server.http.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def new_key(self, *scopes: Scope, tenant: str = "acme") -> NewKey:
        new = new_key()
        row = KeyRow(
            id=new.id,
            tenant=tenant,
            digest=new.digest,
            signing_key=new.signing_key,
            prefix=new.prefix,
            scopes=scopes or (Scope.INFER,),
            created=1.0,
        )
        self.store.add_key(row, AUDIT)
        self.server.keyring.refresh_if_changed()
        return new

    async def ask(self, method: str, path: str, body: Any = None, *, key: NewKey | None = None, **headers: str) -> httpx2.Response:
        """`body`: bytes as they are, else as JSON. Headers with _ for -."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"authorization": f"Bearer {(key or self.key).secret}", **{name.replace("_", "-"): each for name, each in headers.items()}}
        return await self.http.request(method, path, content=content, headers=fields)

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx2.Response:
        return await self.ask("POST", path, body, **more)

    async def get(self, path: str, **more: Any) -> httpx2.Response:
        return await self.ask("GET", path, **more)

    async def submit(self, **body: Any) -> dict[str, Any]:
        """A job of `painter` for `a seven`, unless `body` says otherwise."""
        answer = await self.post("/v1/jobs", {"model": "painter", "input": {"prompt": "a seven"}, **body})
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def ended(self, job: str, *, key: NewKey | None = None) -> dict[str, Any]:
        """A job when it has ended."""
        async with asyncio.timeout(SECONDS):
            while True:
                found: dict[str, Any] = (await self.get(f"/v1/jobs/{job}", key=key)).json()
                if found["ended"] is not None:
                    return found
                await asyncio.sleep(0.01)

    async def until(self, job: str, status: str) -> dict[str, Any]:
        async with asyncio.timeout(SECONDS):
            while (found := (await self.get(f"/v1/jobs/{job}")).json())["status"] != status:
                await asyncio.sleep(0.01)
        assert isinstance(found, dict)
        return found

    async def latest(self) -> str:
        """The id of the job that was handed in last."""
        jobs = (await self.get("/v1/jobs?limit=1")).json()["jobs"]
        return str(jobs[0]["id"]) if jobs else ""

    async def newest(self, *, model: str) -> dict[str, Any]:
        """The job that was handed in last, once there is one that was not seen before."""
        async with asyncio.timeout(SECONDS):
            while True:
                for job in (await self.get(f"/v1/jobs?model={model}&limit=1")).json()["jobs"]:
                    if job["id"] not in {each["id"] for each in self.seen}:
                        self.seen.append(job)
                        return dict(job)
                await asyncio.sleep(0.01)

    async def lines(self, request_id: str, count: int = 1) -> list[dict[str, Any]]:
        """The access log's lines of a request at its door; some ends are written a moment after the answer."""
        async with asyncio.timeout(SECONDS):
            while True:
                self.server.telemetry.finished.flush()
                lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
                found = [line for line in lines if line["request_id"] == request_id and line["protocol"] != "job"]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.005)


@asynccontextmanager
async def studio(folder: Path, *, url: str = "", extra: str = "", webhooks: str = "allow: ['127.0.0.1/32']") -> AsyncIterator[Studio]:
    """`url`: of the store, SQLite's by default. `extra`: sections."""
    root = folder / "models"
    for name, spec in ENGINES.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "nothing").touch()
        (root / name / "model.yaml").write_text(spec)
    for name in TENSORS:
        code, spec = http_models.MODELS[name]
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(code)
        (root / name / "model.yaml").write_text(spec)
    url = url or new_file(folder)
    text = f"""
listen: {{port: 0, grpc_port: 0, ops_port: 0}}
models: {{repositories: ['{root}'], control: explicit, load: ['*']}}
limits: {{max_request_bytes: {4 << 20}, drain_timeout: 5}}
auth: {{required: true}}
store: {{url: '{url}', flush_seconds: 0.1}}
artifacts: {{url: '{folder}/artifacts'}}
webhooks: {{{webhooks}}}
gateway:
  tenants:
    acme: {{models: {USED}}}
    other: {{models: {USED}}}
{extra}
"""
    store = Store.open(url)
    kinds = {kind.name: kind for kind in (fake_engine.KIND, fake_painter.KIND)}
    BACKENDS.update(kinds)
    try:
        for tenant in ("acme", "other"):
            store.add_tenant(TenantRow(name=tenant, created=1.0), AUDIT)
        first = new_key()
        store.add_key(
            KeyRow(id=first.id, tenant="acme", digest=first.digest, signing_key=first.signing_key, prefix=first.prefix, created=1.0), AUDIT
        )
        server = Server(parse_settings(text, "test"), None, text)
        log = server.telemetry.access_log.stream = io.StringIO()
        try:
            await server.start()
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", timeout=SECONDS) as client:
                yield Studio(server, store, client, log)
        finally:
            await server.stop()
            store.close()
    finally:
        for name in kinds:
            BACKENDS.pop(name, None)


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def picture(
    width: int = 64, height: int = 64, *, colour: Any = (200, 30, 30), kind: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height), colour).save(out, kind, **options)
    return out.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
