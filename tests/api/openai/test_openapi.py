"""The operations under /v1 in the OpenAPI document: as described, whatever is asked."""

import asyncio

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.api.openai.served import engines

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
ASKED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "to be"}], "logprobs": True, "prompt_logprobs": 1, "n": 2},
    "/v1/completions": {"prompt": ["to be", "or not"], "logprobs": 1, "prompt_logprobs": 1, "echo": True},
    "/v1/embeddings": {"input": "to be"},
    "/v1/tokenize": {"prompt": "to be", "return_token_strs": True},
    "/v1/detokenize": {"tokens": [1]},
    "/v1/rerank": {"query": "to be", "documents": ["to", {"text": "be"}]},
    "/v1/score": {"text_1": "to be", "text_2": ["to", "be"]},
    "/v1/messages": {"messages": [{"role": "user", "content": "!reason so !call f {}"}], "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "to be"}]},
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    async with engines(tmp_path_factory.mktemp("models"), "identity", talker="llm: {max_model_len: 32}") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(port):
    whole = (await port.client.get("/openapi.json")).json()
    return {**whole, "paths": {path: operations for path, operations in whole["paths"].items() if path.startswith("/v1/")}}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/talker", *ASKED])
async def test_answers_are_as_described(port, document, path):
    if path in ASKED:
        answer = await port.client.post(path, json={"model": "talker", **ASKED[path]})
        operation = document["paths"][path]["post"]
    else:
        answer = await port.client.get(path)
        operation = document["paths"][path.replace("talker", "{model}")]["get"]
    assert answer.status_code == 200, answer.text
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())


async def test_a_fuzzer_finds_no_answer_that_is_not_described(port, document):
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                parameter["schema"] = {"enum": ["talker", "identity", "nobody"]}
    for name, component in document["components"]["schemas"].items():
        if name.endswith("Body") and "model" in component["properties"]:
            component["properties"]["model"] = {"enum": ["talker", "talker@1", "identity", "nobody"]}
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = f"http://{port.address}"
    statuses = set()

    @given(case=schema.as_strategy())
    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def fuzz(case):
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKS)

    await asyncio.to_thread(fuzz)
    assert {200, 400, 404} <= statuses
