"""One trace from a door to an engine's steps in another process of another server, as a collector gets it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fairlead.cli import demo_models
from fairlead.observe.tracing.fake_collector import FakeCollector, Seen
from tests.servers import IDENTITY, Serving, serving, write_model

TINY = Path(demo_models.__file__).parent / "tiny" / "chat"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
Key = tuple[str, str]
"""Service and name of a span."""
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4, "temperature": 0, "seed": 7}
TELLS_TRACE = """
import numpy as np
from fairlead.backends.base import requests

class Model:
    example = {"input": np.zeros((1, 4), np.float32)}

    def infer(self, inputs):
        traces = [request.trace for request in requests.get()] or [""]
        return {"trace": np.array([[trace] for trace in traces], object)}
"""


class House:
    """A server with the models, and one before it that has none of them."""

    def __init__(self, collector: FakeCollector, engines: Serving, edge: Serving) -> None:
        self.collector = collector
        self.engines = engines
        self.edge = edge

    def spans(self, trace: str, *keys: Key) -> dict[Key, Seen]:
        """Those of a trace, once all of these have come."""
        seen = self.collector.until(lambda spans: set(keys) <= {key_of(span) for span in spans if span.trace_id == trace})
        return {key_of(span): span for span in seen if span.trace_id == trace}


def key_of(span: Seen) -> Key:
    return str(span.resource["service.name"]), span.name


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("traces")
    models, none = folder / "models", folder / "none"
    none.mkdir()
    shutil.copytree(TINY, models / "tiny" / "1")
    write_model(models, "identity", IDENTITY)
    write_model(models, "telling", TELLS_TRACE, spec="instances: {isolation: process}\n")
    with ExitStack() as stack:
        collector = stack.enter_context(FakeCollector())
        traces = f"traces: {{endpoint: '{collector.url}', interval: 0.05, max_per_second: 0"
        (folder / "engines.yaml").write_text(f"{traces}, service: engines}}\n")
        engines = stack.enter_context(serving(models, "--config", folder / "engines.yaml")).begin()
        upstream = f"gateway: {{models: {{tiny: {{upstreams: [{{url: '{engines.http}'}}]}}}}}}\n"
        (folder / "edge.yaml").write_text(f"{traces}, service: edge}}\n{upstream}")
        edge = stack.enter_context(serving(none, "--config", folder / "edge.yaml")).begin()
        yield House(collector, engines, edge)


def ask(server: Serving, model: str, **headers: str) -> tuple[int, Any]:
    """Headers with _ for -."""
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.get(f"/v2/models/{model}/infer", body={"inputs": [tensor]}, headers=fields)


def parents(spans: dict[Key, Seen]) -> dict[Key, Key]:
    by_id = {span.span_id: key for key, span in spans.items()}
    return {key: by_id[span.parent_id] for key, span in spans.items() if span.parent_id in by_id}


def test_a_chat_is_one_trace_through_two_servers_to_the_engines_steps(house: House) -> None:
    asking = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1", "content-type": "application/json"}
    status, _ = house.edge.get("/v1/chat/completions", body={**ASKED, "stream": True}, headers=asking)
    assert status == 200

    door = ("edge", "POST /v1/chat/completions")
    spans = house.spans(TRACE, door, ("edge", "chat tiny"), ("engines", "prefill"), ("engines", "POST /v1/chat/completions"))
    assert spans[door].parent_id == CALLER
    tree = parents(spans)
    assert tree["edge", "chat tiny"] == door
    assert tree["engines", "POST /v1/chat/completions"] == ("edge", "chat tiny")
    assert tree["engines", "chat tiny"] == ("engines", "POST /v1/chat/completions")
    assert tree["engines", "engine"] == ("engines", "chat tiny")
    assert tree["engines", "prefill"] == tree["engines", "decode"] == ("engines", "engine")
    assert (spans["edge", "chat tiny"].kind, spans["engines", "chat tiny"].kind) == ("client", "internal")
    assert spans["edge", "chat tiny"].attributes["gen_ai.usage.output_tokens"] == 4
    model = spans["engines", "chat tiny"].attributes
    assert (model["gen_ai.request.max_tokens"], model["gen_ai.request.seed"], model["gen_ai.usage.output_tokens"]) == (4, 7, 4)
    assert model["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < float(str(model["gen_ai.response.time_to_first_chunk"])) < 60
    assert {span.state for span in spans.values()} == {"vendor=1"}
    assert all(span.start <= span.end for span in spans.values())


def test_a_python_model_in_a_process_of_its_own_knows_the_span_that_it_computes_for(house: House) -> None:
    trace = "1" * 32
    status, answer = ask(house.engines, "telling", traceparent=f"00-{trace}-{CALLER}-01")

    assert status == 200, answer
    [told] = answer["outputs"][0]["data"]
    spans = house.spans(trace, ("engines", "infer telling"), ("engines", "compute"))
    assert told == f"00-{trace}-{spans['engines', 'infer telling'].span_id}-01"
    assert parents(spans)["engines", "compute"] == ("engines", "infer telling")


def test_a_tensor_request_without_a_trace_begins_one_and_its_batch_is_linked(house: House) -> None:
    ask(house.engines, "identity", x_request_id="begins-one")

    def ours(spans: list[Seen]) -> list[Seen]:
        return [span for span in spans if span.attributes.get("fairlead.request_id") == "begins-one"]

    seen = house.collector.until(lambda spans: bool(ours(spans)))
    [root] = ours(seen)
    [compute] = [span for span in seen if span.trace_id == root.trace_id and span.name == "compute"]
    [batch] = [span for span in seen if span.name == "batch identity" and (root.trace_id, root.span_id) in span.links]
    assert compute.links == ((batch.trace_id, batch.span_id),)
    assert root.parent_id == ""
    while (line := house.engines.wait_for("request"))["request_id"] != "begins-one":
        pass
    assert line["trace_id"] == root.trace_id


def test_an_answer_to_an_unknown_model_is_a_trace_too_and_exporting_is_counted(house: House) -> None:
    trace = "2" * 32
    status, _ = ask(house.engines, "nobody", traceparent=f"00-{trace}-{CALLER}-01")
    assert status == 404
    door = ("engines", "POST /v2/models/{model}/infer")
    root = house.spans(trace, door)[door]
    assert root.attributes["error.type"] == "not-found" and root.error is None

    _, metrics = house.engines.get("/metrics", url=house.engines.ops)
    assert 'fairlead_traces_total{outcome="exported"}' in metrics
