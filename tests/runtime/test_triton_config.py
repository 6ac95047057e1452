"""Triton's config.pbtxt and ModelConfig JSON, held against protobuf's own reader and served."""

import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from structlog.testing import capture_logs
from tritonclient.grpc import model_config_pb2

from fairlead.api.kserve.metadata import model_config
from fairlead.core.errors import ConfigError, InvalidRequest, LoadError
from fairlead.core.request import Request
from fairlead.core.specs import (
    BatchingSpec,
    InstancesSpec,
    ModelSpec,
    QueuePolicy,
    Sample,
    TensorSpec,
    TimeoutAction,
    VersionPolicy,
    WarmupSpec,
)
from fairlead.observe.metrics import Metrics
from fairlead.runtime.pbtxt import Field, parse
from fairlead.runtime.repository import Control, ModelRepository, RepositorySettings
from fairlead.runtime.source import Source
from fairlead.runtime.triton_config import spec_from_pbtxt, spec_from_triton, triton_config

ModelConfig = model_config_pb2.ModelConfig


def read(text: str) -> ModelSpec:
    return spec_from_pbtxt(text, "config.pbtxt")


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return caught.value.message


# The text format, held against protobuf's

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
}


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return st.text(max_size=8)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
            return st.floats(width=32)
        case FieldDescriptor.TYPE_ENUM:
            return st.sampled_from([value.number for value in field.enum_type.values])
    return _INTEGERS[field.type]


@st.composite
def messages(draw: Any, descriptor: Descriptor = ModelConfig.DESCRIPTOR, names: tuple[str, ...] = (), depth: int = 0) -> dict[str, Any]:
    """A random message as the JSON-like dict that ParseDict takes."""
    fields = [field for field in descriptor.fields if not names or field.name in names]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=5, unique_by=lambda field: field.name)) if fields else []
    message, taken = {}, set()
    for field in chosen:
        if field.containing_oneof is not None:
            if field.containing_oneof.name in taken:
                continue
            taken.add(field.containing_oneof.name)
        if field.message_type is not None and depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            keys = draw(st.lists(scalars(key).filter(bool), max_size=2, unique=True))
            message[field.name] = {k: draw(values(value, depth)) for k in keys}
        elif field.is_repeated:
            message[field.name] = draw(st.lists(values(field, depth), max_size=3))
        else:
            message[field.name] = draw(values(field, depth))
    return message


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    return messages(field.message_type, depth=depth + 1) if field.message_type is not None else scalars(field)


def fill(message: Message, fields: list[Field]) -> Message:
    """Set a message from parsed fields, as its descriptor says."""
    for parsed in fields:
        field, value = message.DESCRIPTOR.fields_by_name[parsed.name], parsed.value
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = {"value": ""} | {part.name: part.value for part in value}
            if field.message_type.fields_by_name["value"].message_type is not None:
                fill(target[entry["key"]], entry["value"] or [])
            else:
                target[entry["key"]] = entry["value"]
        elif field.message_type is not None:
            (target.add() if field.is_repeated else target).SetInParent()
            fill(target[-1] if field.is_repeated else target, value)
        else:
            if field.enum_type is not None:
                value = field.enum_type.values_by_name[value].number
            elif field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
                value = float(value)
            if field.is_repeated:
                target.append(value)
            else:
                setattr(message, field.name, value)
    return message


def message_of(values: dict[str, Any]) -> Message:
    """By the message's own constructor, which takes NaN and enum numbers as they are."""
    return ModelConfig(**values)


@settings(max_examples=150, deadline=None)
@given(messages(), st.booleans(), st.booleans(), st.booleans())
def test_what_protobuf_prints_is_read_as_it_was_meant(values, one_line, utf8, pointy):
    message = message_of(values)
    text = text_format.MessageToString(
        message, as_one_line=one_line, as_utf8=utf8, pointy_brackets=pointy, use_short_repeated_primitives=one_line
    )
    again = fill(ModelConfig(), parse(text, "config.pbtxt"))
    assert text_format.MessageToString(again) == text_format.MessageToString(message)  # NaN differs from itself


SERVED = (
    "name",
    "backend",
    "version_policy",
    "max_batch_size",
    "input",
    "output",
    "dynamic_batching",
    "instance_group",
    "default_model_filename",
    "parameters",
    "model_warmup",
    "model_transaction_policy",
    "optimization",
    "metric_tags",
)


def outcome(reading: Any) -> object:
    try:
        return reading()
    except ConfigError:
        return ConfigError  # which of several wrong map entries is named first depends on their order


@settings(max_examples=150, deadline=None)
@given(messages(names=SERVED), st.booleans())
def test_a_file_and_the_json_of_the_same_message_mean_the_same(values, original_names):
    message = message_of(values)
    config = json_format.MessageToDict(message, preserving_proto_field_name=original_names)
    from_text = outcome(lambda: spec_from_pbtxt(text_format.MessageToString(message), "config.pbtxt"))
    assert from_text == outcome(lambda: spec_from_triton(config, "config"))


@given(st.text(alphabet="ab:{}[]<>,;\"'\\\n#-01.xe ", max_size=40))
def test_any_text_is_read_or_refused_with_its_line(text):
    try:
        parse(text, "config.pbtxt")
    except ConfigError as error:
        assert error.message.startswith("config.pbtxt:")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1 # one\n", 1),
        ("a: - 0x1F", -31),
        ("a: 017", 15),
        ("a: 1.5f", 1.5),
        ("a: 2.", 2.0),
        ("a: .5e-1;", 0.05),
        ("a: true,", True),
        ("a: TYPE_FP32", "TYPE_FP32"),
        ("a: -inf", "-inf"),
        (r"a: 'it\'s' " + '"\\303\\251\\xe2\\x82\\xac\\u00e9\\n"', "it'sé€é\n"),
        ("a <>", []),
        ("a: [{b: 1}]", [Field("b", 1, 1)]),
    ],
)
def test_every_way_of_writing_a_value_is_known(text, value):
    (field,) = parse(text, "config.pbtxt")
    assert field.value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb @", "config.pbtxt:2: unexpected '@'"),
        ("a {\n  b: 1\n", "config.pbtxt:3: expected '}', but the text ends"),
        ("a {\n  b: 1\n>", "config.pbtxt:3: expected a field name, got '>'"),
        ("a\n: [1 2]", "config.pbtxt:2: expected ',' or ']', got '2'"),
        ("a: [1,\n]", "config.pbtxt:2: expected a value, got ']'"),
        ("a [1]", "config.pbtxt:1: expected ':' or '{', got '1'"),
        ("a:\n\n}", "config.pbtxt:3: expected a value, got '}'"),
        ("a: 09", "config.pbtxt:1: a number with a leading 0 is octal, got '09'"),
        (f"a: {'9' * 5000}", "config.pbtxt:1: the number is too large"),
        (r'a: "\q"', "config.pbtxt:1: unknown escape \\q"),
        (r'a: "\377"', "config.pbtxt:1: a string is not UTF-8"),
        ('a: "open\n', "config.pbtxt:1: unexpected '\"'"),
        ("a {" * 100_000, "config.pbtxt:1: messages are nested too deep"),
    ],
)
def test_a_slip_of_the_pen_is_said_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text, "config.pbtxt")
    assert caught.value.message.startswith(message)


# What a configuration means

DENSE = """
name: "digits"                      # a typical file
platform: "onnxruntime_onnx"
max_batch_size: 16
input [
  {
    name: "image"
    data_type: TYPE_FP32
    format: FORMAT_NCHW
    dims: [ 1, 28, -1 ]
    reshape { shape: [ 1, 28, -1 ] }
  },
  { name: "note" data_type: TYPE_STRING dims: 1 optional: true }
]
output { name: "scores" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }
version_policy: { specific { versions: [1, 3] } }
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 1500
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 250000 max_queue_size: 7 }
  priority_queue_policy { key: 1 value: { allow_timeout_override: true } }
}
instance_group [ { count: 2 kind: KIND_CPU }, { name: "more" kind: KIND_CPU } ]
default_model_filename: "net.onnx"
parameters { key: "intra_op_thread_count" value { string_value: "3" } }
parameters: [ { key: "site", value: { string_value: "caf\\303\\251" } } ]
model_warmup [
  {
    name: "one"
    batch_size: 2
    inputs { key: "image" value: { data_type: TYPE_FP32 dims: [ 1, 28, 28 ] random_data: true } }
    inputs { key: "note" value: { data_type: TYPE_STRING dims: 1 zero_data: true } }
    count: 3
  }
]
model_transaction_policy { decoupled: false }
response_cache { enable: false }
optimization { input_pinned_memory { enable: true } cuda { graphs: true } }
metric_tags { key: "team" value: "vision" }
"""


def test_a_typical_file_says_all_that_a_model_yaml_can():
    with capture_logs() as logs:
        spec = spec_from_pbtxt(DENSE, "config.pbtxt", {"labels.txt": "zero\none\ntwo\n"}.__getitem__)
    assert spec == ModelSpec(
        name="digits",
        backend="onnx",
        file="net.onnx",
        inputs=(
            TensorSpec(name="image", datatype="FP32", shape=(-1, 1, 28, -1)),
            TensorSpec(name="note", datatype="BYTES", shape=(-1, 1), optional=True),
        ),
        outputs=(TensorSpec(name="scores", datatype="FP32", shape=(-1, 10), labels=("zero", "one", "two")),),
        batching=BatchingSpec(
            max_batch_size=16,
            preferred_batch_sizes=(4, 8),
            max_queue_delay=0.0015,
            priority_levels=2,
            default_priority=2,
            queue_policy=QueuePolicy(
                timeout_action=TimeoutAction.DELAY, default_timeout=0.25, allow_timeout_override=False, max_queue_size=7
            ),
            priority_queue_policies={1: QueuePolicy(allow_timeout_override=True)},
        ),
        instances=InstancesSpec(count=3, threads=3),
        version_policy=VersionPolicy(specific=(1, 3)),
        warmup=(WarmupSpec(inputs={"image": Sample(shape=(2, 1, 28, 28), fill="random"), "note": Sample(shape=(2, 1))}, count=3),),
        parameters={"site": "café"},
    )
    (line,) = logs
    assert line["fields"] == ["optimization", "metric_tags", "parameters[site]", "input[0].format"]


def test_the_file_is_also_what_protobuf_takes_it_for():
    assert text_format.Parse(DENSE, ModelConfig()) == fill(ModelConfig(), parse(DENSE, "config.pbtxt"))


def test_without_a_batch_the_dims_are_the_whole_shape():
    spec = read('input { name: "x" data_type: TYPE_BF16 dims: [3, 4] } max_batch_size: 0')
    assert spec.inputs[0].shape == (3, 4)
    assert not spec.batches
    assert not read('input { name: "x" data_type: TYPE_INT8 dims: 4 }').batches, "dims are whole where no max_batch_size is written"


def test_a_file_that_says_nothing_of_tensors_leaves_them_to_the_artefact():
    assert read('backend: "onnxruntime"') == ModelSpec(backend="onnx")
    assert read("") == ModelSpec()


def test_rows_run_together_even_where_triton_would_run_each_request_alone():
    spec = read("max_batch_size: 8")
    assert spec.batching == BatchingSpec(max_batch_size=8)
    assert read("max_batch_size: 8 dynamic_batching { }") == spec


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ('backend: "onnxruntime"', "onnx"),
        ('backend: "onnxruntime" platform: "onnxruntime_onnx"', "onnx"),
        ('platform: "pytorch_libtorch"', "torchscript"),
        ('backend: "pytorch"', "torchscript"),
        ('backend: "pytorch" default_model_filename: "m.pt2"', "torch_export"),
        ('backend: "python"', "python"),
        ('backend: "fil"', "xgboost"),
        ('backend: "fil" parameters { key: "model_type" value { string_value: "xgboost_ubj" } }', "xgboost"),
        ('backend: "fil" parameters { key: "model_type" value { string_value: "lightgbm" } }', "lightgbm"),
        ('backend: "catboost" platform: "anything"', "catboost"),
    ],
)
def test_tritons_backends_have_their_counterparts(text, backend):
    assert read(text).backend == backend


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("", InstancesSpec()),
        ("instance_group { count: 4 }", InstancesSpec(count=4)),
        ("instance_group { kind: KIND_MODEL }", InstancesSpec()),
        ("instance_group { kind: KIND_GPU }", InstancesSpec(device="cuda")),
        ("instance_group { kind: KIND_GPU gpus: 1 count: 2 } instance_group { gpus: [ 1 ] }", InstancesSpec(count=3, device="cuda:1")),
    ],
)
def test_instance_groups_are_instances_on_one_device(text, instances):
    assert read(text).instances == instances


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("version_policy { latest { } }", VersionPolicy(latest=0)),
        ("version_policy { latest { num_versions: 3 } }", VersionPolicy(latest=3)),
        ("version_policy: { all {} }", VersionPolicy(all=True)),
        ("version_policy { specific { versions: 2 versions: 5 } }", VersionPolicy(specific=(2, 5))),
    ],
)
def test_version_policies_are_kept(text, policy):
    assert read(text).version_policy == policy


def test_a_decoupled_model_is_one_that_streams():
    assert read("model_transaction_policy { decoupled: true }").streams


INPUT = 'input {\n  name: "x"\n  data_type: TYPE_FP32\n  dims: 1\n  %s\n}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nmax_batchsize: 1", "config.pbtxt:2: unknown field `max_batchsize`"),
        (INPUT % "dtype: 1", "config.pbtxt:5: unknown field `dtype` (at input[0])"),
        ("\nmax_batch_size: -1", "config.pbtxt:2: Expected `int` >= 0 (at max_batch_size)"),
        ('max_batch_size: "many"', "config.pbtxt:1: Expected `int`, got `str` (at max_batch_size)"),
        ("name: 'a'\nname: 'b'", "config.pbtxt:2: `name` is given twice"),
        ("input: 5", "config.pbtxt:1: Expected `object`, got `int` (at input[0])"),
        ("parameters {\n  value { } }", "config.pbtxt:1: an entry of `parameters` is written { key: ... value: ... }"),
        ('parameters { key: "a" }\nparameters { key: "a" }', "config.pbtxt:2: `parameters` has 'a' twice"),
        ('\nbackend: "tensorrt"', "config.pbtxt:2: backend 'tensorrt' is not among those served here: python, onnx, xgboost,"),
        ('platform: "tensorrt_plan"', "config.pbtxt:1: platform 'tensorrt_plan' is not among those served here: python, onnx, xgboost,"),
        ('backend: "python"\nplatform: "onnxruntime_onnx"', "config.pbtxt:2: platform 'onnxruntime_onnx' contradicts backend 'python'"),
        (
            'backend: "fil"\nparameters {\n  key: "model_type"\n  value { string_value: "treelite_checkpoint" } }',
            "config.pbtxt:3: model_type 'treelite_checkpoint' is not among those served here: xgboost, xgboost_json, xgboost_ubj, lightgbm;",
        ),
        (
            'backend: "fil"\noutput {\n  name: "output__0" data_type: TYPE_FP32 dims: 1 }',
            "config.pbtxt:3: output 'output__0' is not there: tree models answer with `predict` and, for classifiers, `predict_proba`;",
        ),
        ('backend: "fil" parameters { key: "threshold" value { string_value: "0.7" } }', "config.pbtxt:1: parameter 'threshold' is not"),
        (
            'backend: "python"\nparameters {\n key: "EXECUTION_ENV_PATH" value { string_value: "x" } }',
            "config.pbtxt:3: parameter 'EXECUTION_ENV_PATH' is not supported: install",
        ),
        (
            'backend: "onnxruntime" parameters { key: "intra_op_thread_count" value { string_value: "two" } }',
            "config.pbtxt:1: parameter 'intra_op_thread_count' must be a number, not 'two'",
        ),
        ("input {\n  data_type: TYPE_FP32 }", "config.pbtxt:1: `input[0]` has no name"),
        ('input { name: "x"\n dims: 1 }', "config.pbtxt:1: `data_type` of 'x' must be one of TYPE_BOOL, TYPE_UINT8,"),
        (INPUT % "reshape { shape: [ ] }", "config.pbtxt:5: `reshape` of 'x' is not supported: write the model's own shape as `dims`"),
        (INPUT % "dims: 0", "config.pbtxt:4: `dims` of 'x' must be positive, or -1 where any length goes"),
        (INPUT % "dims: -2", "config.pbtxt:5: Expected `int` >= -1 (at input[0].dims[1])"),
        (INPUT % "is_shape_tensor: true", "config.pbtxt:5: `is_shape_tensor` of 'x' is not supported"),
        (INPUT % "allow_ragged_batch: true", "config.pbtxt:5: `allow_ragged_batch` of 'x' is not supported"),
        ("\nsequence_batching { }", "config.pbtxt:2: `sequence_batching` is not supported: requests of one sequence"),
        (
            "ensemble_scheduling {\n step { model_name: 'a' } }",
            "config.pbtxt:1: `ensemble_scheduling` is not supported: models are not chained;",
        ),
        ("response_cache { enable: true }", "config.pbtxt:1: `response_cache` is not supported: every request is computed"),
        ("model_operations { op_library_filename: 'a.so' }", "config.pbtxt:1: `model_operations` is not supported"),
        ("batch_input { kind: BATCH_ITEM_SHAPE }", "config.pbtxt:1: `batch_input` is not supported"),
        ("cc_model_filenames { key: '7.5' value: 'a' }", "config.pbtxt:1: `cc_model_filenames` is not supported"),
        ("model_repository_agents { agents { name: 'checksum' } }", "config.pbtxt:1: `model_repository_agents` is not supported"),
        ("instance_group {\n rate_limiter { priority: 2 } }", "config.pbtxt:2: `rate_limiter` of an instance group is not supported"),
        ("instance_group { secondary_devices { } }", "config.pbtxt:1: `secondary_devices` of an instance group is not supported"),
        ("instance_group { passive: true }", "config.pbtxt:1: `passive` of an instance group is not supported"),
        ("instance_group { kind: KIND_CPU\n gpus: 0 }", "config.pbtxt:2: an instance group of KIND_CPU cannot have `gpus`"),
        ("instance_group { gpus: [0, 1] }", "config.pbtxt:1: one model runs on one device, not on GPUs [0, 1]"),
        (
            "instance_group { gpus: 0 }\ninstance_group { gpus: 1 }",
            "config.pbtxt:2: one model runs on one device, not on cuda:0 and cuda:1",
        ),
        ("instance_group { kind: KIND_TPU }", "config.pbtxt:1: Invalid enum value 'KIND_TPU' (at instance_group[0].kind)"),
        ("version_policy { all { } latest { } }", "config.pbtxt:1: `version_policy` takes one of latest and all, not several"),
        ("version_policy { specific { } }", "config.pbtxt:1: `version_policy` names no version in `specific`"),
        (
            "max_batch_size: 4\ndynamic_batching {\n preferred_batch_size: 8 }",
            "config.pbtxt:3: `preferred_batch_size` must be at most `max_batch_size`, 4",
        ),
        (
            "dynamic_batching { priority_levels: 2\n default_priority_level: 3 }",
            "config.pbtxt:2: `default_priority_level` must be between 1 and `priority_levels`, 2",
        ),
        (
            "dynamic_batching { priority_levels: 2\n priority_queue_policy { key: 3 value { } } }",
            "config.pbtxt:2: `priority_queue_policy` names level 3, there are 1 to 2",
        ),
        ("dynamic_batching { priority_levels: 2\n preserve_ordering: true }", "config.pbtxt:2: `preserve_ordering` allows only one"),
        (
            "dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }",
            "config.pbtxt:1: `preserve_ordering` does not go with a queue policy of DELAY",
        ),
        (
            "model_warmup {\n inputs { key: 'x'\n value { data_type: TYPE_FP32 input_data_file: 'x' } } }",
            "config.pbtxt:3: `input_data_file` of warm-up 'x' is not supported: use `zero_data` or `random_data`",
        ),
        ("model_warmup { inputs { key: 'x' value { dims: 1 } } }", "config.pbtxt:1: warm-up 'x' needs one of"),
        (
            INPUT % "" + "model_warmup { inputs { key: 'x'\n value { data_type: TYPE_INT8 zero_data: true } } }",
            "config.pbtxt:7: warm-up 'x' is TYPE_INT8, but the input is TYPE_FP32",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_field_and_line(text, message):
    assert refusal(text).startswith(message)


# JSON


def test_the_configuration_that_the_server_shows_loads_again():
    from fairlead.runtime.version import ModelVersion

    with capture_logs():
        spec = spec_from_pbtxt(DENSE, "config.pbtxt", {"labels.txt": ""}.__getitem__)
    shown = ModelVersion.__new__(ModelVersion)
    shown.spec, shown.platform = spec.replace(parameters={}), "onnxruntime_onnx"
    again = spec_from_triton(model_config(shown), "config")
    assert again == shown.spec.replace(instances=InstancesSpec(count=3))


@pytest.mark.parametrize(
    ("text", "is_tritons"),
    [
        ('{"max_batch_size": 4}', True),
        ('{"maxBatchSize": 4}', True),
        ('{"backend": "onnxruntime"}', True),
        ('{"backend": "python", "input": []}', True),
        ('{"version_policy": {"specific": {"versions": ["1"]}}}', True),
        ('{"parameters": {"a": {"string_value": "b"}}}', True),
        ('{"max_batch_sise": 4}', True),
        ('{"version_policy": {"latest": 2}}', False),
        ('{"parameters": {"a": "b"}}', False),
        ('{"backend": "onnx", "batching": {"max_batch_size": 4}}', False),
        ('{"batching": {}, "max_batch_size": 4}', False),
        ("{}", False),
        ("backend: onnx", False),
        ("[" * 100_000, False),
    ],
)
def test_a_json_configuration_is_known_by_its_words(text, is_tritons):
    assert (triton_config(text) is not None) == is_tritons


def test_an_unknown_field_in_json_is_named():
    with pytest.raises(ConfigError, match=r"^config: unknown field `dimz` \(at input\[0\]\)$"):
        spec_from_triton({"input": [{"dimz": []}]}, "config")


# Served


def identity(path: Path) -> None:
    """x, [batch, 2] of floats, comes back as y."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
    )
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)


CONFIG = """
name: "same"
platform: "onnxruntime_onnx"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP32 dims: 2 label_filename: "labels.txt" }
model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 random_data: true } } }
"""


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "models"
    identity(root / "same/1/model.onnx")
    (root / "same/config.pbtxt").write_text(CONFIG)
    (root / "same/labels.txt").write_text("cat\ndog\n")
    return root


@asynccontextmanager
async def repository(root: Path, tmp_path: Path, **fields: Any):
    made = ModelRepository(
        RepositorySettings(sources=(str(root),), cache_folder=tmp_path / "cache", drain_timeout=5.0, **fields), Metrics()
    )
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def ask(of: ModelRepository, name: str, rows: int = 1) -> np.ndarray:
    inputs = {"x": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)}
    (answer,) = [response async for response in of.infer(Request(model=name, inputs=inputs))]
    return answer.outputs["y"]


async def test_a_triton_repository_is_served_as_it_lies_there(root, tmp_path):
    async with repository(root, tmp_path) as models:
        assert models.failures() == {}
        assert (await ask(models, "same", rows=3)).tolist() == [[0, 1], [2, 3], [4, 5]]
        spec = models.find("same").spec
        assert spec.batching.max_batch_size == 4
        assert spec.outputs[0].labels == ("cat", "dog")
        with pytest.raises(InvalidRequest, match="batch-size must be <= 4 for 'same'"):
            await ask(models, "same", rows=5)


async def test_one_triton_model_may_be_served_by_itself(root, tmp_path):
    async with repository(root / "same", tmp_path) as models:
        assert (await ask(models, "same")).tolist() == [[0, 1]]


async def test_a_model_without_version_folders_may_have_a_config_too(tmp_path):
    identity(tmp_path / "flat/model.onnx")
    (tmp_path / "flat/config.pbtxt").write_text('backend: "onnxruntime" max_batch_size: 2')
    (listing,) = Source(str(tmp_path / "flat"), tmp_path / "cache").scan().values()
    assert listing.versions().keys() == {1}
    assert "config.pbtxt" not in listing.versions()[1]
    async with repository(tmp_path / "flat", tmp_path) as models:
        assert models.find("flat").spec.batching.max_batch_size == 2


async def test_a_python_model_takes_its_parameters_from_the_config(tmp_path):
    folder = tmp_path / "models/scaled/1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(
        """
class Model:
    def load(self, context):
        self.factor = float(context.parameters["factor"])

    def infer(self, inputs):
        return {"y": inputs["x"] * self.factor}
"""
    )
    (folder.parent / "config.pbtxt").write_text(
        """
backend: "python"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 2 }
output { name: "y" data_type: TYPE_FP64 dims: 2 }
parameters { key: "factor" value { string_value: "3" } }
"""
    )
    async with repository(tmp_path / "models", tmp_path) as models:
        assert models.failures() == {}
        assert (await ask(models, "scaled")).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (CONFIG + "sequence_batching { }", r"same/config\.pbtxt:8: `sequence_batching` is not supported"),
        (CONFIG.replace('"same"', '"other"'), r"config\.pbtxt: the model is named 'other' but its folder 'same'"),
        (CONFIG.replace("labels.txt", "../../secret.txt"), r"config\.pbtxt:6: `label_filename` '\.\./\.\./secret\.txt': .* is not there"),
        (CONFIG.replace('"y"', '"z"'), "declares 'z', but the artefact has 'y'"),
    ],
)
async def test_a_wrong_config_fails_its_model_with_the_reason(root, tmp_path, edit, reason):
    (tmp_path / "secret.txt").write_text("not a label")
    (root / "same/config.pbtxt").write_text(edit)
    async with repository(root, tmp_path) as models:
        assert models.versions("same") == []
        (failure,) = models.failures().values()
        assert re.search(reason, failure)


async def test_two_configurations_are_one_too_many(root, tmp_path):
    (root / "same/model.yaml").write_text("backend: onnx")
    async with repository(root, tmp_path) as models:
        assert "holds both model.yaml and config.pbtxt; keep model.yaml" in models.failures()["same"]


async def test_a_changed_config_reloads_the_version_when_polled(root, tmp_path):
    async with repository(root, tmp_path, control=Control.POLL, poll_seconds=3600.0) as models:
        before = models.find("same")
        (root / "same/config.pbtxt").write_text(CONFIG.replace("max_batch_size: 4", "max_batch_size: 16"))
        (root / "same/labels.txt").write_text("hen\nfox\n")
        await models.poll_once()
        await models.poll_once()
        after = models.find("same")
        assert after is not before
        assert (after.spec.batching.max_batch_size, after.spec.outputs[0].labels) == (16, ("hen", "fox"))


async def test_a_config_may_come_with_the_load_as_tritonclient_sends_it(root, tmp_path):
    async with repository(root, tmp_path, control=Control.EXPLICIT, load=("same",)) as models:
        shown = json_format.MessageToJson(json_format.ParseDict(model_config(models.find("same")), ModelConfig()))
        await models.load("same", config=shown.replace('"maxBatchSize": 4', '"maxBatchSize": 2'))
        assert models.find("same").spec.batching.max_batch_size == 2
        assert (await ask(models, "same", rows=2)).shape == (2, 2)

        await models.load(
            "same", config='{"backend": "onnxruntime", "max_batch_size": 32, "version_policy": {"specific": {"versions": [1]}}}'
        )
        assert models.find("same").spec.batching.max_batch_size == 32

        await models.load("same")
        assert models.find("same").spec.batching.max_batch_size == 4, "its own config holds again"

        artefact = (root / "same/1/model.onnx").read_bytes()
        config = '{"output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [2], "label_filename": "l.txt"}], "max_batch_size": 1}'
        await models.load("same", config=config, files={"1/model.onnx": artefact, "l.txt": b"ant\nbee"})
        assert models.find("same").spec.outputs[0].labels == ("ant", "bee")


async def test_a_wrong_config_of_a_load_leaves_what_serves_alone(root, tmp_path):
    async with repository(root, tmp_path, control=Control.EXPLICIT, load=("same",)) as models:
        with pytest.raises(ConfigError, match="^config: `sequence_batching` is not supported"):
            await models.load("same", config='{"sequence_batching": {}}')
        with pytest.raises(InvalidRequest, match="the config is of model 'other', but 'same' is to be loaded"):
            await models.load("same", config='{"name": "other", "max_batch_size": 4}')
        with pytest.raises(LoadError, match="declares 'z', but the artefact has 'x'"):
            await models.load("same", config='{"input": [{"name": "z", "data_type": "TYPE_FP32", "dims": [2]}], "max_batch_size": 4}')
        assert (await ask(models, "same")).tolist() == [[0, 1]]
