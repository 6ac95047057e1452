"""What the server says of its models, read back by Triton's own schema."""

import json

import msgspec
import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from fairlead import __version__
from fairlead.api.kserve.metadata import model_config, model_metadata, server_metadata
from fairlead.core.specs import ModelSpec
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import ModelRepository, RepositorySettings
from fairlead.runtime.version import ModelVersion

IRIS = {
    "name": "iris",
    "backend": "onnx",
    "file": "model.onnx",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "note", "datatype": "BYTES", "shape": [-1, 1], "optional": True},
    ],
    "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
}


def loaded(**changes: object) -> ModelVersion:
    spec = msgspec.convert({**IRIS, **changes}, ModelSpec)
    return ModelVersion(spec, "3", "onnxruntime_onnx", [])


def parsed(version: ModelVersion) -> model_config_pb2.ModelConfig:
    """The configuration, after a journey as JSON."""
    return json_format.ParseDict(json.loads(msgspec.json.encode(model_config(version))), model_config_pb2.ModelConfig())


def test_the_server_lists_only_the_extensions_it_has():
    assert server_metadata() == {
        "name": "fairlead",
        "version": __version__,
        "extensions": [
            "classification",
            "model_repository",
            "schedule_policy",
            "model_configuration",
            "binary_tensor_data",
            "parameters",
            "statistics",
        ],
    }


async def test_metadata_shows_whole_shapes():
    repository = ModelRepository(RepositorySettings(sources=()), Metrics())
    assert model_metadata(repository, loaded()) == {
        "name": "iris",
        "versions": [],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}, {"name": "note", "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
    }


async def test_a_config_leaves_the_batch_dimension_out():
    config = parsed(loaded())
    assert (config.name, config.platform, config.backend, config.default_model_filename) == (
        "iris",
        "onnxruntime_onnx",
        "onnx",
        "model.onnx",
    )
    assert config.max_batch_size == 64
    assert [(t.name, t.data_type, list(t.dims), t.optional) for t in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [4], False),
        ("note", model_config_pb2.TYPE_STRING, [1], True),
    ]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("y", model_config_pb2.TYPE_INT64, [])]
    assert config.version_policy.latest.num_versions == 1
    assert not config.model_transaction_policy.decoupled


async def test_a_config_tells_how_requests_wait():
    config = parsed(
        loaded(
            batching={
                "max_batch_size": 8,
                "preferred_batch_sizes": [4, 8],
                "max_queue_delay": 0.0005,
                "preserve_ordering": True,
                "priority_levels": 2,
                "default_priority": 1,
                "queue_policy": {"timeout_action": "DELAY", "default_timeout": 1.5, "allow_timeout_override": False, "max_queue_size": 7},
                "priority_queue_policies": {2: {"max_queue_size": 3}},
            }
        )
    )
    batching = config.dynamic_batching
    assert config.max_batch_size == 8
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds, batching.preserve_ordering) == ([4, 8], 500, True)
    assert (batching.priority_levels, batching.default_priority_level) == (2, 1)
    policy = batching.default_queue_policy
    assert (policy.timeout_action, policy.default_timeout_microseconds) == (policy.DELAY, 1_500_000)
    assert (policy.allow_timeout_override, policy.max_queue_size) == (False, 7)
    assert batching.priority_queue_policy[2].max_queue_size == 3


async def test_a_model_that_takes_one_request_at_a_time_has_no_dynamic_batching():
    config = parsed(loaded(batching={"max_batch_size": 0}))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 4]
    assert not config.HasField("dynamic_batching")


async def test_a_streaming_model_is_decoupled():
    config = parsed(loaded(streams=True))
    assert config.model_transaction_policy.decoupled
    assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize(("device", "kind", "gpus"), [("cpu", "KIND_CPU", []), ("cuda", "KIND_GPU", [0]), ("cuda:2", "KIND_GPU", [2])])
async def test_instances_stand_on_their_device(device, kind, gpus):
    (group,) = parsed(loaded(instances={"count": 3, "device": device})).instance_group
    assert (group.name, group.count, group.Kind.Name(group.kind), list(group.gpus)) == ("iris", 3, kind, gpus)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"latest": 3}, {"latest": {"num_versions": 3}}),
        ({"all": True}, {"all": {}}),
        ({"specific": [1, 4]}, {"specific": {"versions": [1, 4]}}),
    ],
)
async def test_the_version_policy_is_told(policy, told):
    version = loaded(version_policy=policy)
    assert model_config(version)["version_policy"] == told
    assert parsed(version).version_policy.WhichOneof("policy_choice") == next(iter(told))


async def test_parameters_are_strings_as_triton_has_them():
    parameters = parsed(loaded(parameters={"mode": "fast", "depth": 3, "steps": [1, 2]})).parameters
    assert {name: value.string_value for name, value in parameters.items()} == {"mode": "fast", "depth": "3", "steps": "[1,2]"}


async def test_warm_up_samples_are_told():
    warmup = [
        {"inputs": {"x": {"shape": [8, 4], "fill": "random"}, "note": {"data": [["a"]], "shape": [8, 1]}}, "count": 2},
        {"inputs": {"x": {}}},
    ]
    first, second = parsed(loaded(warmup=warmup)).model_warmup
    assert (first.batch_size, first.count, list(first.inputs["x"].dims), first.inputs["x"].random_data) == (8, 2, [4], True)
    assert (first.inputs["note"].data_type, first.inputs["note"].WhichOneof("input_data_type")) == (model_config_pb2.TYPE_STRING, None)
    assert (second.batch_size, second.count, list(second.inputs["x"].dims), second.inputs["x"].zero_data) == (1, 1, [4], True)


async def test_every_default_is_written_out_and_large_integers_are_numbers():
    config = model_config(loaded())
    assert config["input"][0] == {
        "name": "x",
        "data_type": "TYPE_FP32",
        "format": "FORMAT_NONE",
        "dims": [4],
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
        "is_non_linear_format_io": False,
    }
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert config["dynamic_batching"]["default_queue_policy"]["timeout_action"] == "REJECT"
