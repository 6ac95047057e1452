"""Requests and results as the store keeps them: what goes in comes out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from msgspec import structs

from fairlead.core.errors import InvalidRequest, ModelError, QueueFull, Unavailable
from fairlead.core.generation import Chat, Delta, Embed, Generate, Lora, Message, Paint, Picture, Progress, Sampling, Usage
from fairlead.core.jobs import Artifact
from fairlead.core.request import Raw, Request, Response
from fairlead.core.tensors import DTYPES, object_array
from fairlead.jobs.stored import Collected, pack, trace_of, unpack
from tests.gateway.house import ACME

KEPT = {"model", "version", "prompt", "inputs", "raw", "outputs", "parameters", "qos_class", "session", "signed_by", "priority"}
ANEW = {"caller", "log_id", "booked", "arrived", "num_rows", "timeline", "trace"}
"""Of the try, not of the wish."""
NOT_KEPT = {"envelope", "id", "timeout", "num_requests"}
"""Of the HTTP request that handed it in: a job has no line to wait in but its own, and is always one request."""


def test_every_field_of_a_request_is_kept_or_has_a_reason_not_to_be() -> None:
    assert set(Request.__struct_fields__) == KEPT | ANEW | NOT_KEPT


@pytest.mark.parametrize(
    "prompt",
    [
        Generate(chat=Chat(messages=[Message(role="user", content="hé")]), sampling=Sampling(max_tokens=3, stop=("x",)), salt="acme"),
        Generate(token_ids=[1, 2, 3]),
        Embed(text="a text", dimensions=8),
        Paint(text="a seven", negative="an eight", seed=1 << 40, image=b"\x89PNG", loras=(Lora(name="ink", scale=0.5),), tenant="acme"),
    ],
)
def test_prompts_of_all_kinds(prompt: Any) -> None:
    request = Request(model="m", version="2", prompt=prompt, caller=ACME, qos_class="fast", session="s", signed_by="k", priority=1)
    again = unpack(pack(request))
    assert again.prompt == prompt and type(again.prompt) is type(prompt)
    assert {name: getattr(again, name) for name in KEPT} == {name: getattr(request, name) for name in KEPT}


def test_the_trace_that_it_belongs_to_is_read_without_the_rest() -> None:
    request = Request(model="m", inputs={"x": np.zeros(1000, np.float32)}, trace="what came")
    packed = pack(request, "what goes on")
    assert trace_of(packed) == unpack(packed).trace == "what goes on"
    assert trace_of(pack(request)) == "" and b"what goes on" not in pack(request)


def test_another_servers_body_is_kept_to_the_byte() -> None:
    body = b'{"model": "far",  "n":1}'
    raw = Raw(path="/v1/chat/completions", body=memoryview(body), max_tokens=7, prompt_chars=5, prefix=b"\xff")
    again = unpack(pack(Request(model="far", raw=raw))).raw
    assert again is not None and structs.replace(again, body=b"") == structs.replace(raw, body=b"") and bytes(again.body) == body


@given(st.data(), st.sampled_from([name for name in DTYPES if name not in ("BYTES", "BF16")]))
@settings(max_examples=60, deadline=None)
def test_tensors_of_any_type_and_shape(data: st.DataObject, datatype: str) -> None:
    array = data.draw(arrays(DTYPES[datatype], array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    again = unpack(pack(Request(model="m", inputs={"x": array}))).inputs["x"]
    assert again.dtype == array.dtype and again.shape == array.shape and again.tobytes() == array.tobytes()


def test_tensors_of_bytes_and_bfloat16_and_of_foreign_order() -> None:
    texts = object_array([b"a", b"", "é".encode()], (3, 1))
    halves = np.array([1.5, -2.0], np.float32).astype(DTYPES["BF16"])
    turned = np.arange(6, dtype=np.int32).reshape(2, 3).T
    again = unpack(pack(Request(model="m", inputs={"t": texts, "h": halves, "f": turned}))).inputs
    assert again["t"].tolist() == texts.tolist() and again["h"].tolist() == [1.5, -2.0]
    assert again["f"].tolist() == turned.tolist()


def test_pictures_and_progress_are_no_choices() -> None:
    collected = Collected()
    made = Picture(data=b"png", content_type="image/png", width=8, height=8, seed=1, num_steps=1, guidance=1.0, scheduler="euler")
    for delta in (Delta(progress=Progress(step=1, num_steps=2)), Delta(picture=made, usage=Usage(megapixels=1.0))):
        collected.take(Response(model="m", version="3", delta=delta))
    for index in (1, 0):
        collected.artifacts[index] = Artifact(key=f"k{index}", content_type="image/png", num_bytes=1, sha256="")
    result = collected.result()
    assert [each.key for each in result.artifacts] == ["k0", "k1"]
    assert result.choices == () and result.usage == Usage(megapixels=1.0) and result.version == "3"


def test_a_model_that_answers_with_tensors_again_and_again_is_refused() -> None:
    collected = Collected()
    collected.take(Response(model="m", version="1", outputs={"y": np.zeros(1, np.float32)}))
    with pytest.raises(ModelError, match="several responses"):
        collected.take(Response(model="m", version="1", outputs={"y": np.zeros(1, np.float32)}))


@pytest.mark.parametrize(
    ("status", "error"), [(400, InvalidRequest), (404, InvalidRequest), (429, QueueFull), (503, Unavailable), (500, ModelError)]
)
def test_another_servers_error_is_an_error(status: int, error: type[Exception]) -> None:
    collected = Collected()
    for part in (b"what ", b"it says"):
        collected.take(Response(model="far", version="", raw=part, status=status))
    with pytest.raises(error, match=f"answers {status}: what it says") as raised:
        collected.result()
    assert type(raised.value) is error
