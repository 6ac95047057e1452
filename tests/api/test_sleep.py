"""A language model of the real engine that sleeps and wakes, through the whole server and the command."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from click.testing import CliRunner

from fairlead.cli.models import models
from fairlead.store.rows import AuditQuery
from tests.api.keyed import House, house
from tests.llm.tiny import tiny_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")
BUDGET = 1 << 22
SPEC = "llm: {dtype: float32, kernels: torch, max_model_len: 96, max_num_seqs: 4}\n"
SLEEP = "/admin/models/tiny/sleep"
WAKE = "/admin/models/tiny/wake"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    tiny_checkpoint(folder / "models" / "tiny" / "1")
    (folder / "models" / "tiny" / "model.yaml").write_text(SPEC)
    async with house(folder, auth="required: false") as opened:
        yield opened


async def said(home: House) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "three sailors"}], "temperature": 0.0, "max_tokens": 16}
    answer = await home.http.post("/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


async def samples(home: House) -> dict[str, float]:
    text = (await home.ops.get("/metrics")).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if 'model="tiny"' in line or line.startswith("fairlead_kv_budget"))
    return {name: float(value) for name, value in pairs}


async def test_its_greedy_tokens_are_the_same_before_it_sleeps_and_when_a_request_has_woken_it(home: House) -> None:
    before = await said(home)
    told = await samples(home)
    held = told['fairlead_kv_bytes{model="tiny",version="1"}']
    assert 0 < held <= told['fairlead_kv_budget_bytes{device="cpu"}']
    answer = await home.ops.post(SLEEP, json={"timeout": 30})
    assert answer.json() == {"model": "tiny", "versions": [{"version": "1", "state": "asleep", "level": 2, "wakes": 0}]}
    (entry,) = [each for each in (await home.http.post("/v2/repository/index")).json() if each["name"] == "tiny"]
    assert (entry["state"], entry["reason"]) == ("READY", "asleep")
    told = await samples(home)
    assert told['fairlead_replicas{model="tiny",state="asleep",version="1"}'] == 1
    assert 'fairlead_kv_bytes{model="tiny",version="1"}' not in told
    assert (await home.http.get("/v2/models/tiny/ready")).status_code == 200, "it wakes for whoever asks"
    first, second = await asyncio.gather(said(home), said(home))
    assert first == second == before != ""
    told = await samples(home)
    assert told['fairlead_wakes_total{model="tiny",version="1"}'] == 1
    assert told['fairlead_kv_bytes{model="tiny",version="1"}'] == held


async def test_at_level_1_its_process_stays_and_its_tokens_are_the_same(home: House) -> None:
    before, wakes = await said(home), (await samples(home))['fairlead_wakes_total{model="tiny",version="1"}']

    def pid() -> int | None:
        return home.server.repository.find("tiny").instances[0].pid

    process = pid()
    answer = await home.ops.post(SLEEP, json={"level": 1})
    (told,) = answer.json()["versions"]
    assert (told["state"], told["level"]) == ("asleep", 1) and pid() == process
    found = await samples(home)
    assert found['fairlead_replicas{model="tiny",state="asleep",version="1"}'] == 1
    assert 'fairlead_kv_bytes{model="tiny",version="1"}' not in found
    assert await said(home) == before and pid() == process
    assert (await samples(home))['fairlead_wakes_total{model="tiny",version="1"}'] == wakes + 1
    await home.ops.post(SLEEP, json={"level": 1})
    (told,) = (await home.ops.post(SLEEP, json={"level": 2})).json()["versions"]
    assert told["level"] == 2 and pid() is None, "it sleeps deeper"
    assert await said(home) == before


async def test_who_did_it_is_in_the_audit_log(home: House) -> None:
    assert (await home.ops.post(SLEEP)).status_code == 200
    assert (await home.ops.post(WAKE, json={"version": "1"}, timeout=60)).json()["versions"][0]["state"] == "awake"
    did: set[tuple[str, str]] = set()
    async with asyncio.timeout(60):
        while not {("model.sleep", "tiny"), ("model.wake", "tiny")} <= did:
            await asyncio.sleep(0.02)
            did = {(row.action, row.subject) for row in await asyncio.to_thread(home.store.audit, AuditQuery(), 50, None)}


@pytest.mark.parametrize(
    ("model", "body", "status", "said"),
    [
        ("nobody", {}, 404, "unknown model: 'nobody'"),
        ("identity", {}, 501, "only those with an engine of Fairlead's own can"),
        ("tiny", {"version": "9"}, 404, "version 9 is not found"),
        ("tiny", {"level": 3}, 400, "level"),
        ("tiny", {"depth": 1}, 400, "depth"),
    ],
)
async def test_what_cannot_sleep_is_told_so(home: House, model: str, body: Any, status: int, said: str) -> None:
    answer = await home.ops.post(f"/admin/models/{model}/sleep", json=body)
    assert answer.status_code == status and said in answer.text


async def test_the_commands(home: House) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(models, [*arguments, "--url", str(home.ops.base_url)], catch_exceptions=False)

    done = await asyncio.to_thread(run, "sleep", "tiny@1", "--timeout", "5", "--level", "1")
    assert done.output.splitlines()[-1] == "tiny@1 is asleep at level 1"
    done = await asyncio.to_thread(run, "wake", "tiny", "--json")
    assert msgspec.json.decode(done.output.splitlines()[-1])["versions"][0]["state"] == "awake"
