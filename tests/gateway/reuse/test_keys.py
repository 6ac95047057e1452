"""What makes two requests equal, and what must never do so."""

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from fairlead.core.generation import Detokenize, Embed, Generate, Sampling, Score, Tokenize
from fairlead.core.policy import CacheSettings
from fairlead.core.request import Request
from fairlead.core.tensors import DTYPES
from fairlead.gateway.reuse.keys import NOTHING_ASKED, CacheControl, cache_control, question_of, request_key
from tests.gateway.reuse.questions import GREEDY, POLICY, chat, envelope, raw, tensors

MINUTE = CacheControl(max_age=60.0)


def key(request: Request, version: str = "1", **policy: Any) -> bytes | None:
    return request_key(request, version, structs.replace(POLICY, **policy))


# Equal


def test_the_callers_id_and_how_urgent_it_is_make_no_difference():
    plain = tensors()
    assert key(plain) == key(tensors(id="7", priority=3, timeout=1.0, trace="00-1", session="s", arrived=5.0, qos_class="batch"))
    assert key(plain) is not None and len(key(plain)) == 32  # type: ignore[arg-type]


def test_an_answer_in_pieces_and_a_whole_one_are_the_same():
    assert key(chat("hello", stream=True)) == key(chat("hello"))


def test_the_order_of_inputs_and_of_parameters_makes_no_difference():
    x, y = np.zeros(2, np.float32), np.ones(3, np.int64)
    one = tensors(inputs={"x": x, "y": y}, parameters={"a": 1, "b": {"c": 2, "d": 3}})
    other = tensors(inputs={"y": y, "x": x}, parameters={"b": {"d": 3, "c": 2}, "a": 1})
    assert key(one) == key(other)


def test_how_a_tensor_lies_in_memory_makes_no_difference():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert key(tensors(inputs={"x": array})) == key(tensors(inputs={"x": np.asfortranarray(array)}))
    assert key(tensors(inputs={"x": array.T})) == key(tensors(inputs={"x": np.ascontiguousarray(array.T)}))


def test_the_order_of_a_bodys_fields_and_labels_without_effect_make_no_difference():
    plain = raw({"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]})
    other = {"messages": [{"role": "user", "content": "hi"}], "user": "u", "metadata": {"x": "y"}, "temperature": 0, "model": "m"}
    assert key(plain) == key(raw(other)) == key(raw(other | {"stream": False, "safety_identifier": "z"}))


def test_shared_answers_are_the_same_for_every_tenant():
    assert key(tensors("a"), shared=True) == key(tensors("b"), shared=True)
    assert key(chat("hi", tenant="a"), shared=True) == key(chat("hi", tenant="b"), shared=True)


# Different


def test_no_tenant_gets_the_answer_of_another():
    assert key(tensors("a")) != key(tensors("b"))
    assert key(chat("hi", tenant="a")) != key(chat("hi", tenant="b"))
    assert key(tensors("a")) != key(tensors("a"), shared=True)
    assert key(tensors("")) != key(tensors("a"), shared=True) != key(tensors("="), shared=False)


def test_another_model_or_version_is_another_request():
    assert len({key(tensors()), key(tensors(model="n")), key(tensors(), version="2")}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model": "ab"}, {"model": "a"}),
        ({"inputs": {"xy": np.zeros(1, np.float32)}}, {"inputs": {"x": np.zeros(1, np.float32)}}),
        ({"outputs": ("ab",)}, {"outputs": ("a", "b")}),
        ({"outputs": None}, {"outputs": ()}),
        ({"parameters": {"a": 1}}, {"parameters": {"a": "1"}}),
        ({"parameters": {"a": 1}}, {"parameters": {"a": True}}),
        ({"parameters": {"a": 1}}, {"parameters": {"a": 1.0}}),
        ({"parameters": {"a": "b,c"}}, {"parameters": {"a": "b", "c": ""}}),
    ],
)
def test_what_runs_together_when_written_side_by_side_is_told_apart(one: dict[str, Any], other: dict[str, Any]):
    assert key(tensors(**one)) != key(tensors(**other))


def test_the_border_between_model_version_and_tenant_does_not_move():
    keys = {
        request_key(tensors(tenant, model=model), version, POLICY)
        for tenant, model, version in [("c", "a", "b"), ("bc", "a", ""), ("c", "ab", ""), ("", "abc", ""), ("", "a", "bc"), ("abc", "", "")]
    }
    assert len(keys) == 6


def test_strings_of_a_tensor_cannot_be_split_otherwise():
    def of(*strings: bytes) -> bytes | None:
        return key(tensors(inputs={"x": np.array(strings, object)}))

    assert len({of(b"ab", b"c"), of(b"a", b"bc"), of(b"", b"abc"), of(b"abc", b""), of(b"abc"), of(b"ab\0c")}) == 6


def test_the_same_bytes_in_another_type_or_shape_are_another_tensor():
    data = bytes(range(16))
    keys = [key(tensors(inputs={"x": np.frombuffer(data, dtype)})) for name, dtype in DTYPES.items() if name not in ("BYTES", "BOOL")]
    keys += [key(tensors(inputs={"x": np.frombuffer(data, np.uint8).reshape(shape)})) for shape in ((4, 4), (2, 8), (16, 1), (1, 16))]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(tensors(inputs={"x": np.zeros((0, 3), np.float32)})) != key(tensors(inputs={"x": np.zeros((3, 0), np.float32)}))
    assert key(tensors(inputs={"x": np.array(1.0)})) != key(tensors(inputs={"x": np.array([1.0])}))
    assert key(tensors(inputs={"x": np.zeros(2, ml_dtypes.bfloat16)})) != key(tensors(inputs={"x": np.zeros(2, np.float16)}))


def test_minus_zero_and_every_kind_of_nan_are_values_of_their_own():
    quiet, signalling, negative = (struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (0x7FC00000, 0x7FC00001, 0xFFC00000))

    def of(bits: int) -> bytes | None:
        return key(tensors(inputs={"x": np.array([bits], np.uint32).view(np.float32)}))

    assert quiet != signalling != negative
    assert len({of(0x7FC00000), of(0x7FC00001), of(0xFFC00000), of(0x7F800001), of(0), of(0x80000000)}) == 6
    assert of(0x7FC00000) == of(0x7FC00000)  # though it is not equal to itself
    assert key(tensors(parameters={"a": 0.0})) != key(tensors(parameters={"a": -0.0}))


def test_another_endianness_and_strings_of_fixed_width_are_not_guessed_at():
    assert key(tensors(inputs={"x": np.zeros(2, ">f4")})) is None
    assert key(tensors(inputs={"x": np.array([b"ab"])})) is None
    assert key(tensors(inputs={"x": np.array(["ab"])})) is None
    assert key(tensors(inputs={"x": np.array([b"a", 7], object)})) is None


def test_what_has_no_canonical_form_is_not_stored():
    assert key(tensors(parameters={"a": 1 << 70})) is None
    assert key(tensors(parameters={"a": object()})) is None


def test_a_prompt_is_told_from_tensors_and_from_other_prompts():
    prompts = [
        Generate(text="a", sampling=GREEDY),
        Generate(text="a", sampling=GREEDY, add_special_tokens=False),
        Generate(text="a", sampling=Sampling(temperature=0.0, max_tokens=5)),
        Generate(token_ids=[97], sampling=GREEDY),
        Embed(text="a"),
        Embed(text="a", dimensions=8),
        Score(text="a", pair="b"),
        Score(text="a", pair="b", raw=True),
        Tokenize(text="a"),
        Detokenize(token_ids=[97]),
    ]
    keys = {key(Request(model="m", prompt=prompt)) for prompt in prompts} | {key(tensors(inputs={}))}
    assert len(keys) == 11 and None not in keys
    assert key(chat("hi", "you", "are")) != key(chat("hi", "youare", "")) != key(chat("hi"))


def test_a_body_below_its_top_level_must_be_the_same_byte_for_byte():
    # Two readers of JSON may disagree which of two equal keys counts.
    trap = b'{"model":"m","temperature":0,"messages":[{"role":"user","content":"evil","content":"good"}]}'
    good = b'{"model":"m","temperature":0,"messages":[{"role":"user","content":"good"}]}'
    evil = b'{"model":"m","temperature":0,"messages":[{"role":"user","content":"evil"}]}'
    assert len({key(raw(trap)), key(raw(good)), key(raw(evil))}) == 3


def test_how_a_body_is_asked_for_is_part_of_it():
    body = {"model": "m", "temperature": 0, "messages": []}
    requests = [
        raw(body),
        raw(body, path="/v1/completions"),
        raw(body, content_type="text/plain"),
        raw(body, max_tokens=7),
        raw(body | {"stream": True}, stream=True),
        raw(body | {"stream": True, "stream_options": {"include_usage": True}}, stream=True),
        structs.replace(raw(body), envelope=envelope(accept="text/event-stream")),
    ]
    assert len({key(request) for request in requests}) == len(requests)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=3),
            st.text(max_size=3),
            st.text(max_size=3),
            st.dictionaries(st.text(max_size=2), st.lists(st.integers(0, 3), max_size=3), max_size=2),
            st.none() | st.lists(st.text(max_size=2), max_size=2),
            st.dictionaries(st.text(max_size=2), st.none() | st.booleans() | st.integers(0, 2) | st.text(max_size=2), max_size=2),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_requests_have_one_key_exactly_if_they_are_the_same(parts: list[Any]):
    by_key: dict[bytes | None, str] = {}
    for tenant, model, version, inputs, outputs, parameters in parts:
        arrays = {name: np.array(values, np.int32) for name, values in inputs.items()}
        request = tensors(tenant, model, inputs=arrays, outputs=None if outputs is None else tuple(outputs), parameters=parameters)
        meant = repr((tenant, model, version, sorted(inputs.items()), outputs, sorted((k, repr(v)) for k, v in parameters.items())))
        assert by_key.setdefault(request_key(request, version, POLICY), meant) == meant
    assert len(by_key) == len(set(by_key.values()))


# Which may share


@pytest.mark.parametrize(
    ("sampling", "mode", "control", "reusable"),
    [
        (Sampling(temperature=0.0), "deterministic", NOTHING_ASKED, True),
        (Sampling(temperature=1.0, seed=7), "deterministic", NOTHING_ASKED, True),
        (Sampling(temperature=1.0), "deterministic", NOTHING_ASKED, False),
        (Sampling(), "deterministic", NOTHING_ASKED, False),  # what the model does then is not known here
        (Sampling(temperature=1.0), "deterministic", MINUTE, False),
        (Sampling(temperature=1.0), "all", NOTHING_ASKED, False),
        (Sampling(temperature=1.0), "all", MINUTE, True),
        (Sampling(temperature=0.0), "all", NOTHING_ASKED, True),
        (Sampling(temperature=0.0), "all", CacheControl(no_store=True, max_age=60.0), False),
        (Sampling(temperature=0.0), "off", NOTHING_ASKED, False),
    ],
)
def test_answers_that_were_drawn_at_random_are_shared_with_those_who_said_so(
    sampling: Sampling, mode: Any, control: CacheControl, reusable: bool
):
    policy = CacheSettings(mode=mode)
    assert (request_key(chat("hi", sampling=sampling), "1", policy, control) is not None) is reusable
    body = {"temperature": sampling.temperature, "seed": sampling.seed, "messages": []}
    assert (request_key(raw(body), "1", policy, control) is not None) is reusable
    parameters = {name: value for name, value in body.items() if name != "messages" and value is not None}
    form = tensors(inputs={"text_input": np.array([b"hi"], object)}, parameters=parameters)
    assert (request_key(form, "1", policy, control) is not None) is reusable


def test_single_flight_alone_needs_keys_too():
    assert request_key(tensors(), "1", CacheSettings(single_flight=True)) is not None


def test_sequences_and_streams_of_tensors_are_not_shared():
    assert key(tensors(parameters={"sequence_id": 7})) is None
    assert key(tensors(parameters={"stream": True})) is None
    text = np.array([b"hi"], object)
    assert key(tensors(inputs={"text_input": text, "stream": np.array([True])}, parameters={"temperature": 0})) is None
    assert key(tensors(inputs={"text_input": text, "sampling_parameters": np.array([b'{"temperature": 0}'], object)})) is not None
    assert key(tensors(inputs={"text_input": text, "sampling_parameters": np.array([b"{"], object)})) is None


def test_bodies_for_kserve_are_shared_unless_they_have_an_id_that_the_answer_would_tell():
    plain = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    assert key(raw(plain, path="/infer")) is not None
    assert key(raw(plain | {"id": "mine"}, path="/infer")) is None
    assert key(raw(plain | {"parameters": {"sequence_id": 1}}, path="/infer")) is None
    binary = b'{"inputs":[]}\x00\x01'
    assert key(raw(binary, path="/infer", header_length="13")) != key(raw(b'{"inputs":[]}\x00\x02', path="/infer", header_length="13"))
    assert key(raw(b'{"id":"x"}\x00\x01', path="/infer", header_length="10")) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"a"', b"\xff", b'{"temperature":0', b'{"temperature":"0"}', b'{"temperature":false}'])
def test_bodies_that_cannot_be_read_are_not_shared(body: bytes):
    assert key(raw(body)) is None


def test_paths_that_are_not_known_are_not_shared():
    assert key(raw({"temperature": 0}, path="/v1/responses")) is None
    assert key(raw({"temperature": 0}, path="/v1/images/generations")) is None
    assert key(raw({"input": "x"}, path="/v1/embeddings")) is not None


# Cache-Control


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("", CacheControl()),
        ("no-store", CacheControl(no_store=True)),
        ("No-Cache , MAX-AGE=5", CacheControl(no_cache=True, max_age=5.0)),
        ('max-age="5"', CacheControl(max_age=5.0)),
        ("max-age=60, max-age=5", CacheControl(max_age=5.0)),
        ("max-age=5, max-age=60", CacheControl(max_age=5.0)),
        ("only-if-cached,,", CacheControl(only_if_cached=True)),
        # what is no number of seconds is none at all
        ("max-age", CacheControl(max_age=0.0)),
        ("max-age=-1", CacheControl(max_age=0.0)),
        ("max-age=1e9", CacheControl(max_age=0.0)),
        ("max-age=inf", CacheControl(max_age=0.0)),
        ("max-age=99999999999999999999", CacheControl(max_age=0.0)),
        ('max-age="²"', CacheControl(max_age=0.0)),
        ("max-age=٣", CacheControl(no_store=True)),
        # directives that are not ours, with ours inside of their values
        ('x="no-store, max-age=3", community="a\\"b, only-if-cached"', CacheControl()),
        ("x-no-store", CacheControl()),
        # smuggled: what is not read for certain shares nothing
        ('x="no-store', CacheControl(no_store=True)),
        ("max-age=60\r\nonly-if-cached", CacheControl(no_store=True)),
        ("max-age=60\x00", CacheControl(no_store=True)),
        ("max-age=60; only-if-cached", CacheControl(no_store=True)),
        ("max-age = 60", CacheControl(no_store=True)),
        ("a," * 600, CacheControl(no_store=True)),
    ],
)
def test_cache_control_is_read_as_the_standard_says_and_strictly(value: str, meant: CacheControl):
    headers = {b"cache-control": value.encode("latin-1" if value.isascii() or "²" in value else "utf-8")} if value else {}
    assert cache_control(structs.replace(envelope(), headers=headers)) == meant


def test_a_request_without_a_message_of_its_own_asks_for_nothing():
    assert cache_control(None) == CacheControl()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='abn-ostre=",\\ 0123456789maxgly;²³é', max_size=60))
def test_any_cache_control_can_be_read(value: str):
    cache_control(envelope(cache_control=value))


# Nearly the same question


def bucket(request: Request) -> bytes | None:
    question = question_of(request, "1")
    return None if question is None else question.bucket


def test_only_the_last_message_may_differ():
    plain = chat("I am a cook", "Hello, cook", "How do I boil an egg?")
    assert bucket(plain) == bucket(chat("I am a cook", "Hello, cook", "How are eggs boiled?"))
    assert bucket(plain) != bucket(chat("I am a smith", "Hello, cook", "How do I boil an egg?"))
    assert bucket(plain) != bucket(chat("I am a cook", "Hello, cook", "x", sampling=Sampling(temperature=0.0, max_tokens=3)))
    question = question_of(plain, "1")
    assert question is not None and question.text == "How do I boil an egg?"
    assert question_of(plain, "2") != question


def test_questions_never_meet_those_of_another_tenant():
    assert bucket(chat("hi", tenant="a")) != bucket(chat("hi", tenant="b"))


def test_numbers_must_be_the_same():
    assert bucket(chat("What is 2 + 2?")) != bucket(chat("What is 2 + 3?"))
    assert bucket(chat("In 1990, why?")) == bucket(chat("Why, in 1990?"))
    assert bucket(chat("at 10:30")) != bucket(chat("at 10 or 30"))


def test_bodies_have_questions_too():
    def body(*messages: dict[str, Any], **fields: Any) -> Request:
        return raw({"model": "m", "messages": list(messages), **fields})

    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "boil an egg"}
    assert bucket(body(system, user)) == bucket(body(system, {"role": "user", "content": "how to cook eggs"}))
    assert bucket(body(system, user)) != bucket(body(user))
    assert bucket(body(system, user)) != bucket(body(system, user, max_tokens=7))
    assert bucket(body(user, system)) is None
    assert bucket(body({"role": "user", "content": [{"type": "image_url"}]})) is None
    assert bucket(body({"role": "user", "content": "x", "name": "n"})) is None
    assert bucket(raw(b'{"messages": 3}')) is None and bucket(raw(b"{}")) is None


def test_what_is_no_question_of_a_user_has_none():
    assert question_of(tensors(), "1") is None
    assert question_of(Request(model="m", prompt=Generate(text="hi", sampling=GREEDY)), "1") is None
    assert bucket(chat("")) is None
