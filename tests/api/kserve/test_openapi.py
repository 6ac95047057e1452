"""The OpenAPI document: valid, complete, and its examples work."""

import asyncio
import re

import msgspec
import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from starlette.applications import Starlette
from starlette.routing import Route

from fairlead.api.data import data_app
from fairlead.api.openapi import examples_of
from fairlead.core.specs import ModelSpec
from fairlead.runtime.repository import Control
from tests.api.served import Served, served

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory):
    async with served(tmp_path_factory.mktemp("models"), "identity", "shout", "count", "failing", control=Control.NONE) as running:
        yield running


async def document_of(port: Served) -> dict:
    return (await port.client.get("/openapi.json")).json()


def operations(document: dict) -> list[tuple[str, str, dict]]:
    return [(method.upper(), path, operation) for path, methods in document["paths"].items() for method, operation in methods.items()]


async def test_the_document_is_openapi_3_1(port):
    document = await document_of(port)
    assert document["openapi"] == "3.1.0"
    validate(document)


async def test_every_route_is_described_and_everything_described_is_a_route(port):
    app = data_app(port.repository)
    assert isinstance(app, Starlette)
    routed = {
        (method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods or () if method != "HEAD"
    }
    assert {(method, path) for method, path, _ in operations(await document_of(port))} == routed


async def test_every_operation_has_a_name_of_its_own(port):
    names = [operation["operationId"] for _, _, operation in operations(await document_of(port))]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() for name in names)


async def test_every_example_works(port):
    tried = set()
    for method, path, operation in operations(await document_of(port)):
        media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        examples = {model: example["value"] for model, example in media.get("examples", {}).items()}
        if "example" in media:
            examples["identity"] = media["example"]
        for model, body in examples.items():
            accept = "text/event-stream" if model == "count" else "application/json"
            url = path.format(model=model, version="1") if "{" in path else path
            answer = await port.client.request(method, url, json=body, headers={"Accept": accept})
            assert answer.status_code == 200, (url, answer.text)
            tried.add((operation["operationId"], model))
    assert {
        ("modelInfer", "identity"),
        ("modelVersionInfer", "shout"),
        ("modelGenerate", "failing"),
        ("modelGenerateStream", "count"),
        ("repositoryIndex", "identity"),
    } <= tried
    assert ("modelGenerate", "count") not in tried


async def test_answers_are_as_described(port):
    """Every GET that has an answer, held against the schema of its 200."""
    document = await document_of(port)
    for method, path, operation in operations(document):
        if method != "GET" or "200" not in operation["responses"] or path == "/v1/models/{model}":  # that one is of engines
            continue
        if set(re.findall(r"{(\w+)}", path)) - {"model", "version"}:  # of what a test of its own must make first
            continue
        answer = await port.client.get(path.format(model="identity", version="1"))
        assert answer.status_code == 200, path
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())


async def test_infer_tells_of_the_binary_extension_and_of_events(port):
    infer = (await document_of(port))["paths"]["/v2/models/{model}/infer"]["post"]
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert set(infer["responses"]["200"]["content"]) == {"application/json", "application/octet-stream", "text/event-stream"}
    assert "Inference-Header-Content-Length" in {parameter["name"] for parameter in infer["parameters"]}


async def test_a_model_without_a_json_form_or_too_large_for_a_page_has_no_example():
    def spec(datatype: str, *shape: int) -> ModelSpec:
        return msgspec.convert({"name": "m", "inputs": [{"name": "x", "datatype": datatype, "shape": shape}]}, ModelSpec)

    assert examples_of([spec("BF16", -1, 4), spec("FP32", -1, 224, 224, 3), ModelSpec(name="none")]) == {}
    assert examples_of([spec("INT8", -1, 2)])["modelInfer"]["m"] == {
        "inputs": [{"name": "x", "datatype": "INT8", "shape": [1, 2], "data": [0, 0]}]
    }


async def test_a_fuzzer_finds_no_answer_that_is_not_described(port):
    """Schemathesis over all operations: no 500, no undescribed status, every answer as its schema says."""
    document = await document_of(port)
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                # Names that exist, else nearly everything would be a 404.
                parameter["schema"] = {"model": {"enum": ["identity", "shout", "nobody"]}, "version": {"enum": ["1", "2"]}}.get(
                    parameter["name"], parameter["schema"]
                )
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = f"http://{port.address}"

    @given(case=schema.as_strategy())
    @settings(
        max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def fuzz(case):
        answer = case.call()
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKS)

    await asyncio.to_thread(fuzz)
