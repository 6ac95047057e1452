"""Models of other engines through the whole server: byte for byte, beside our own engine, with limits and errors of ours."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from msgspec import structs

from fairlead.core.policy import TenantPolicy
from fairlead.core.routes import Routes, Shares
from fairlead.core.specs import EngineSpec, ModelSpec
from fairlead.runtime.repository import Hosted
from fairlead.runtime.upstream.fake import Fake, Script, text_of
from tests.api.keyed import House, bearer, chat, house

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
SPEC = "backend: vllm\nengine: {{url: '{url}', model: theirs, timeout: 0.5}}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far() -> AsyncIterator[Fake]:
    fake = await Fake(Script(models=("theirs",))).start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(far: Fake, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    (folder / "models" / "engine").mkdir(parents=True)
    (folder / "models" / "engine" / "model.yaml").write_text(SPEC.format(url=far.url))
    async with house(folder, auth="required: false") as opened:
        yield opened


@pytest.fixture(autouse=True)
def well(far: Fake) -> None:
    far.script = Script(chunks=6, models=("theirs",))
    far.received.clear()


async def direct(fake: Fake, path: str, body: dict[str, Any]) -> bytes:
    async with httpx2.AsyncClient(base_url=fake.url, timeout=20) as client:
        return (await client.post(path, json=body)).content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("engine", seed=7, unheard_of=[1, {"a": None}])),
        (CHAT, chat("engine", stream=True, stream_options={"include_usage": True})),
        ("/v1/completions", {"model": "engine", "prompt": ["once", "twice"], "max_tokens": 5}),
        ("/v1/embeddings", {"model": "engine", "input": ["a", "b"]}),
    ],
)
async def test_its_answers_pass_byte_for_byte(home: House, far: Fake, path: str, body: dict[str, Any]) -> None:
    answer = await home.http.post(path, json=body)
    sent = json.loads(far.received[-1].body)
    assert sent == body | {"model": "theirs"}
    expected = await direct(far, path, sent)
    assert answer.status_code == 200
    assert len(answer.content) == len(expected)
    assert answer.content == expected or not body.get("stream")  # whole answers differ in their ids alone


async def test_it_is_listed_counted_and_described(home: House) -> None:
    before = (await home.ops.get("/metrics")).text
    listed = (await home.http.get("/v1/models")).json()["data"]
    assert {"id": "engine", "owned_by": "fairlead"}.items() <= next(each for each in listed if each["id"] == "engine").items()
    assert (await home.http.get("/v2/models/engine")).json()["platform"] == "vllm"
    assert (await home.http.get("/v2/models/engine/ready")).status_code == 200
    await home.http.post(CHAT, json=chat("engine"))
    (after,) = (
        line
        for line in (await home.ops.get("/metrics")).text.splitlines()
        if line.startswith('fairlead_generated_tokens_total{model="engine"')
    )
    assert after.endswith('version="1"} ' + after.split()[-1]) and after not in before


async def test_what_other_doors_ask_it_is_told_in_its_words(home: House, far: Fake) -> None:
    answer = await home.http.post("/v2/models/engine/generate", json={"text_input": "once", "parameters": {"max_tokens": 3}})
    assert answer.json()["text_output"] == "once" + text_of(3)
    assert far.received[-1].target == "/v1/completions"
    refused = await home.http.post("/v1/tokenize", json={"model": "engine", "prompt": "once"})
    assert refused.status_code in (400, 501) and CHAT in refused.json()["error"]["message"]


async def test_a_stream_that_stops_in_the_middle_ends_with_an_error_event(home: House, far: Fake) -> None:
    far.script = Script(chunks=6, models=("theirs",), fault="stall", times=1, after=3)
    answer = await home.http.post(CHAT, json=chat("engine", stream=True))
    *pieces, last = [event for event in answer.text.split("\n\n") if event.startswith("data: ")]
    assert len(pieces) == 3 and "[DONE]" not in answer.text
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and error["message"].endswith("its answer ends here")
    assert (await home.http.post(CHAT, json=chat("engine"))).status_code == 200


@pytest.mark.parametrize("fault", ["endless", "headers"])
async def test_an_answer_without_bounds_is_none(home: House, far: Fake, fault: Any) -> None:
    far.script = Script(chunks=6, models=("theirs",), fault=fault)
    answer = await home.http.post(CHAT, json=chat("engine", stream=True))
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("the server that computes model 'engine'")
    far.script = Script(chunks=6, models=("theirs",))
    assert (await home.http.post(CHAT, json=chat("engine"))).status_code == 200


async def test_a_stream_that_it_answers_in_one_piece_passes_as_it_is(home: House, far: Fake) -> None:
    far.script = Script(chunks=2, models=("theirs",), fault="whole", times=1)
    answer = await home.http.post(CHAT, json=chat("engine", stream=True))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["choices"][0]["message"]["content"] == text_of(2)


async def test_a_stream_that_it_ends_twice_passes_byte_for_byte(home: House, far: Fake) -> None:
    far.script = Script(chunks=2, models=("theirs",), fault="twice", times=1)
    asked = chat("engine", stream=True, stream_options={"include_usage": True})
    answer = await home.http.post(CHAT, json=asked)
    assert answer.content == await direct(far, CHAT, json.loads(far.received[-1].body)) + b"data: [DONE]\n\n"


async def test_limits_by_tokens_hold_for_it(home: House) -> None:
    home.new_tenant("small", TenantPolicy(limits={"tokens_per_minute": 30.0}))
    key = home.new_key(tenant="small")
    answers = [await home.http.post(CHAT, json=chat("engine"), headers=bearer(key)) for _ in range(4)]
    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429 and answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


async def test_it_can_be_the_canary_of_our_own_engine(home: House, far: Fake, tmp_path: Path) -> None:
    repository, dispatch = home.server.repository, home.server.dispatch
    engine = EngineSpec(url=far.url, model="theirs")
    specs = {1: ModelSpec(name="both", backend="fake_engine"), 2: ModelSpec(name="both", backend="openai", engine=engine)}
    for number, spec in specs.items():
        await repository.host("both", number, Hosted(spec, lambda: tmp_path, str(number)), 30.0)
    repository.prefer("both", 1)
    try:

        async def answered(path: str, body: dict[str, Any], shares: Shares = ()) -> dict[str, Any]:
            dispatch.routes = structs.replace(Routes(), shares={"both": shares} if shares else {})
            far.received.clear()
            answer = await home.http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json(), far=sum(each.method == "POST" for each in far.received))  # not looks at its health

        assert (await answered(CHAT, chat("both")))["far"] == 0
        theirs = await answered(CHAT, chat("both"), (("1", 0.0), ("2", 1.0)))
        assert (theirs["far"], theirs["model"], theirs["choices"][0]["message"]["content"]) == (1, "theirs", text_of(6))
        assert (await answered(CHAT, chat("both"), (("1", 1.0), ("2", 0.0))))["far"] == 0
        assert (await answered(CHAT, chat("both@2", unheard_of=1)))["far"] == 1
        vector = {"model": "both", "input": "once"}
        assert (await answered("/v1/embeddings", vector, (("1", 0.0), ("2", 1.0))))["data"][0]["embedding"] == [0.6, 0.8]
        several = {"model": "both", "prompt": ["once", "twice"], "max_tokens": 2}
        both = await answered("/v1/completions", several, (("1", 0.0), ("2", 1.0)))
        assert both["far"] == 2 and [each["text"] for each in both["choices"]] == [text_of(2)] * 2
    finally:
        dispatch.routes = Routes()
        for number in specs:
            repository.release("both", number)
