"""`/v1/rerank` and `/v1/score`: by a model that scores pairs, and by one that embeds."""

from typing import Any

import pytest
import pytest_asyncio

from tests.api.openai.served import engines

DOCUMENTS = ["bread and butter", "to be or not", "not to be seen", "nothing"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    specs = {
        "judge": "llm: {task: score, max_model_len: 40}",
        "embedder": "llm: {task: embed}",
        "talker": "llm: {task: generate}",
    }
    async with engines(tmp_path_factory.mktemp("models"), "identity", **specs) as running:
        yield running


async def ask(port: Any, path: str, *, status: int = 200, **body: Any) -> Any:
    answer = await port.client.post(f"/v1/{path}", json={"model": "judge", **body})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


async def test_the_best_comes_first(port):
    ranking = await ask(port, "rerank", query="to be or not", documents=DOCUMENTS)
    assert [(each["index"], each["relevance_score"]) for each in ranking["results"]] == [(1, 1.0), (2, 0.75), (0, 0.0), (3, 0.0)]
    assert ranking["results"][0]["document"] == {"text": "to be or not"}
    assert ranking["model"] == "judge"
    assert ranking["usage"] == {"prompt_tokens": 4 * 4 + 12, "total_tokens": 4 * 4 + 12}


async def test_only_the_best_and_only_their_numbers(port):
    documents = [{"text": text} for text in DOCUMENTS]
    ranking = await ask(port, "rerank", query="to be or not", documents=documents, top_n=2, return_documents=False)
    assert ranking["results"] == [{"index": 1, "relevance_score": 1.0}, {"index": 2, "relevance_score": 0.75}]


async def test_an_embedder_ranks_by_the_cosine_of_vectors(port):
    ranking = await ask(port, "rerank", model="embedder", query="to be or not", documents=DOCUMENTS)
    assert ranking["results"][0]["index"] == 1
    assert ranking["results"][0]["relevance_score"] == pytest.approx(1.0)
    # a text that stands there twice is computed once
    assert ranking["usage"]["prompt_tokens"] == 4 + 3 + 4 + 1
    scores = await ask(port, "score", model="embedder", text_1="to be", text_2=["to be", "bread"])
    assert [each["score"] for each in scores["data"]] == [pytest.approx(1.0), pytest.approx(scores["data"][1]["score"])]
    assert scores["data"][1]["score"] < 0.9


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("to be", "to see", [0.5]),
        ("to be", ["to be", "be", "x"], [1.0, 0.5, 0.0]),
        (["to be", "bread"], ["to", "bread"], [0.5, 1.0]),
    ],
)
async def test_one_with_each_or_each_with_its_own(port, first, second, expected):
    scores = await ask(port, "score", text_1=first, text_2=second)
    assert [(each["index"], each["score"], each["object"]) for each in scores["data"]] == [
        (index, score, "score") for index, score in enumerate(expected)
    ]
    assert scores["object"] == "list"


async def test_the_number_before_its_activation_and_what_is_cut(port):
    assert (await ask(port, "score", text_1="to be", text_2="to be", use_activation=False))["data"][0]["score"] == 2.0
    long = {"text_1": "to be", "text_2": "x " * 60 + "to be"}
    assert (await ask(port, "score", status=400, **long))["code"] == "context_length_exceeded"
    cut = await ask(port, "score", **long, truncate_prompt_tokens=-1)
    assert (cut["data"][0]["score"], cut["usage"]["prompt_tokens"]) == (0.0, 40)


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents[0].title"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "max_chunks_per_doc": 1}, "max_chunks_per_doc"),
        ("rerank", {"documents": ["b"]}, "query"),
        ("rerank", {"query": "a", "documents": ["b"], "model": "talker"}, "model"),
        ("rerank", {"query": "a", "documents": ["b"], "model": "identity"}, "model"),
        ("rerank", {"query": "a", "documents": ["b"], "model": "embedder", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
async def test_what_is_wrong_is_named(port, path, body, parameter):
    error = await ask(port, path, status=400, **body)
    assert error["param"] == parameter
    if parameter == "model":
        assert repr(body["model"]) in error["message"]


async def test_a_model_that_scores_does_nothing_else(port):
    assert "judge" in [each["id"] for each in (await port.client.get("/v1/models")).json()["data"]]
    assert "does not embed" in (await ask(port, "embeddings", status=400, input="x"))["message"]
    assert "does not generate" in (await ask(port, "completions", status=400, prompt="x"))["message"]


async def test_it_is_asked_with_tensors_too(port):
    inputs = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [text]} for name, text in (("text_input", "to be"), ("text_pair", "to"))
    ]
    answer = await port.client.post("/v2/models/judge/infer", json={"inputs": inputs})
    assert [(each["name"], each["shape"], each["data"]) for each in answer.json()["outputs"]] == [("score", [1], [0.5])]
