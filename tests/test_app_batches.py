"""Batches on a whole server: what the gateway, its keys and its limits have to say of them."""

import asyncio
import json
import time
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fairlead.gateway.identity.keys import NewKey
from fairlead.gateway.signing import sign
from tests.api.keyed import SECONDS, House, bearer, chat, house

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    gateway = "  models:\n    chat: {require_signature: true}\n"
    async with house(tmp_path_factory.mktemp("batches"), gateway=gateway) as running:
        running.new_tenant("free")
        yield running


async def sent(home: House, key: NewKey, method: str, path: str, *, signed: bool = False, **body: Any) -> httpx2.Response:
    request = home.http.build_request(method, path, headers=bearer(key), **body)
    if signed:
        secret = {"keyid": key.id, "secret": bytes.fromhex(key.signing_key), "now": time.time()}
        request.headers.update(sign(method, str(request.url), await request.aread(), **secret))
    return await home.http.send(request)


async def handed_in(home: House, key: NewKey, model: str, *, num_lines: int = 2, signed: bool = False) -> dict[str, Any]:
    lines = (
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": chat(model, max_tokens=2)} for n in range(num_lines)
    )
    files = {"file": ("in.jsonl", "\n".join(map(json.dumps, lines)).encode())}
    file = await sent(home, key, "POST", "/v1/files", signed=signed, files=files, data={"purpose": "batch"})
    wish = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return (await sent(home, key, "POST", "/v1/batches", signed=signed, json=wish)).json()


async def ended(home: House, key: NewKey, id: str) -> dict[str, Any]:
    async with asyncio.timeout(SECONDS):
        while (batch := (await sent(home, key, "GET", f"/v1/batches/{id}")).json())["status"] not in ENDED:
            await asyncio.sleep(0.02)  # between looks at what the server does
    return batch


async def test_lines_for_a_model_that_takes_signed_requests_alone(home: House) -> None:
    key = home.new_key(tenant="free")
    refused = await ended(home, key, (await handed_in(home, key, "chat"))["id"])
    assert refused["status"] == "failed"
    assert [(error["code"], error["line"]) for error in refused["errors"]["data"]] == [("signature_required", 1), ("signature_required", 2)]
    assert "'chat'" in refused["errors"]["data"][0]["message"]
    done = await ended(home, key, (await handed_in(home, key, "chat", signed=True))["id"])
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 2)
    unsigned = await ended(home, key, (await handed_in(home, key, "secret-chat"))["id"])
    assert unsigned["request_counts"]["completed"] == 2


async def test_a_line_that_needs_more_than_its_key_ever_may_is_refused(home: House) -> None:
    key = home.new_key(tenant="free", limits={"output_tokens_per_minute": 1})
    batch = await ended(home, key, (await handed_in(home, key, "secret-chat", num_lines=1))["id"])
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 1, "completed": 0, "failed": 1})
    refused = await sent(home, key, "GET", f"/v1/files/{batch['error_file_id']}/content")
    assert refused.json()["response"]["status_code"] == 429 and "ask for less" in refused.text


async def test_files_batches_and_lines_are_requests_of_their_key(home: House) -> None:
    key, other = home.new_key(tenant="free", limits={"requests_per_day": 4}), home.new_key(tenant="free")
    batch = await handed_in(home, key, "secret-chat")
    assert (await ended(home, other, batch["id"]))["request_counts"]["completed"] == 2
    refused = await sent(home, key, "GET", f"/v1/batches/{batch['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert refused.headers["x-fairlead-reason"] == "budget-requests" and refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert home.count("fairlead_gateway_refused_total", "", "budget-requests") == 1
    assert home.count("fairlead_api_batches_total", "completed") >= 1
