"""`NAME:ADAPTER` in the place of a model's name, through every door of language models."""

import json
from pathlib import Path

import pytest
import pytest_asyncio

from tests.api.openai.served import engines

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAY = [{"role": "user", "content": "ahoy"}]


def put_adapter(folder: Path, name: str) -> None:
    (folder / "loras" / name).mkdir(parents=True)
    (folder / "loras" / name / "adapter_config.json").write_text("{}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for model in ("talker", "with:colon", "embedder"):
        put_adapter(folder / model / "1", "french")
    (folder / "talker" / "1" / "loras" / "no adapter").mkdir()
    specs = {"talker": "", "with:colon": "", "with": "", "embedder": "llm: {task: embed}", "none": "llm: {lora_bytes: 0}"}
    for model in ("talker", "with:colon", "embedder"):
        (folder / model).rename(folder / f".{model}")
    async with engines(folder, "identity", **specs) as running:
        for model in ("talker", "with:colon", "embedder"):
            (folder / f".{model}" / "1" / "loras").rename(folder / model / "1" / "loras")
        yield running


async def chat(port, model: str, **fields):
    return await port.client.post("/v1/chat/completions", json={"model": model, "messages": SAY, **fields})


@pytest.mark.parametrize("model", ["talker:french", "talker@1:french", "with:colon:french"])
async def test_a_name_with_an_adapter_asks_the_model_with_it(port, model):
    answer = (await chat(port, model)).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (model, "<french> ahoy")
    streamed = await chat(port, model, stream=True)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == "<french> ahoy"
    completed = await port.client.post("/v1/completions", json={"model": model, "prompt": ["ahoy", "there"]})
    assert [choice["text"] for choice in completed.json()["choices"]] == ["<french> ahoy", "<french> there"]


async def test_who_names_none_gets_none(port):
    for model in ("talker", "talker@1", "with:colon", "with"):
        assert (await chat(port, model)).json()["choices"][0]["message"]["content"] == "ahoy"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("talker:german", "no adapter 'german'"),
        ("talker@1:german", "no adapter 'german'"),
        ("talker:no adapter", "no adapter 'no adapter'"),
        ("talker:../french", "no adapter '../french'"),
        ("none:french", "no adapter 'french'"),
        ("talker:", "'talker:' does not exist"),
        ("talker@1:", "version 1: is not found"),
        ("nobody:french", "'nobody:french' does not exist"),
        ("talker@7:french", "version 7 is not found"),
    ],
)
async def test_an_adapter_that_is_not_there_is_a_404(port, model, says):
    answer = await chat(port, model)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert says in error["message"]


async def test_what_does_not_generate_has_no_adapters(port):
    answer = await port.client.post("/v1/embeddings", json={"model": "embedder:french", "input": "ahoy"})
    assert answer.status_code == 400 and "has no adapters" in answer.json()["error"]["message"]
    answer = await port.client.post("/v1/moderations", json={"model": "identity:french", "input": "ahoy"})
    assert answer.status_code == 404


async def test_one_tokenizer_serves_all_adapters(port):
    asked = {"model": "talker:french", "prompt": "to be"}
    assert (await port.client.post("/v1/tokenize", json=asked)).json()["count"] == 2


async def test_adapters_are_listed_with_their_model(port):
    listed = {model["id"]: model for model in (await port.client.get("/v1/models")).json()["data"]}
    assert {"talker", "talker:french", "with:colon:french"} <= listed.keys()
    assert not {"embedder:french", "talker:no adapter"} & listed.keys()
    assert (listed["talker:french"]["parent"], listed["talker:french"]["root"]) == ("talker", "talker")
    assert listed["talker"]["parent"] is None
    one = (await port.client.get("/v1/models/talker@1:french")).json()
    assert (one["id"], one["parent"]) == ("talker@1:french", "talker@1")
    assert (await port.client.get("/v1/models/talker:german")).status_code == 404
    # and those that come while the server runs, too
    put_adapter(port.folder / "talker" / "1", "german")
    assert (await port.client.get("/v1/models/talker:german")).status_code == 200
    assert (await chat(port, "talker:german")).json()["choices"][0]["message"]["content"] == "<german> ahoy"
    listed = {model["id"] for model in (await port.client.get("/v1/models")).json()["data"]}
    assert "talker:german" in listed


async def test_the_access_log_has_the_model_and_the_timeline_the_adapter(port):
    answer = await chat(port, "talker:french")
    while (line := await port.lines.next())["request_id"] != answer.headers["x-request-id"]:
        pass
    noted = [details for _, event, details in line["timeline"].events if event == "adapted"]
    assert (line["model"], line["version"], noted) == ("talker", "1", [{"adapter": "french"}])
