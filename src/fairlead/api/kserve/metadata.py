"""What the server and its models say of themselves, in the shapes that REST and gRPC share.

The configuration is Triton's ModelConfig as protobuf-JSON: original field names, enums as names, defaults
printed, 64-bit integers as numbers.
"""

from typing import Any, TypedDict

import msgspec

from fairlead import __version__
from fairlead.core.errors import NotFound, Unavailable
from fairlead.core.specs import BatchingSpec, InstancesSpec, ModelSpec, QueuePolicy, Sample, TensorSpec, VersionPolicy, WarmupSpec
from fairlead.runtime.repository import ModelRepository
from fairlead.runtime.version import Version

EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def server_metadata() -> ServerMetadata:
    return {"name": "fairlead", "version": __version__, "extensions": list(EXTENSIONS)}


def model_ready(repository: ModelRepository, model: str, version: str) -> bool:
    """Raises NotFound for what no repository has."""
    try:
        return repository.find(model, version).ready
    except Unavailable:
        return False
    except NotFound:
        if not any(entry.name == model and (not version or entry.version == version) for entry in repository.index()):
            raise
        return False


def model_metadata(repository: ModelRepository, version: Version) -> ModelMetadata:
    """`versions` are all that are loaded; shapes are whole, with a leading -1 where the model batches."""
    spec = version.spec
    return {
        "name": spec.name,
        "versions": repository.versions(spec.name),
        "platform": version.platform or spec.backend,
        "inputs": [_tensor_metadata(tensor) for tensor in spec.inputs],
        "outputs": [_tensor_metadata(tensor) for tensor in spec.outputs],
    }


def model_config(version: Version) -> dict[str, Any]:
    """Parses as `inference.ModelConfig` with `google.protobuf.json_format.ParseDict`."""
    spec = version.spec
    batches = spec.batches
    config: dict[str, Any] = {
        "name": spec.name,
        "platform": version.platform,
        "backend": spec.backend,
        "runtime": "",
        "version_policy": _version_policy(spec.version_policy),
        "max_batch_size": spec.batching.max_batch_size,
        "input": [_input(tensor, batches=batches) for tensor in spec.inputs],
        "output": [_output(tensor, batches=batches) for tensor in spec.outputs],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [_instance_group(spec.name, spec.instances)],
        "default_model_filename": spec.file,
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {name: {"string_value": _text(value)} for name, value in spec.parameters.items()},
        "model_warmup": [_warmup(spec, warmup, f"warmup_{number}") for number, warmup in enumerate(spec.warmup)],
        "model_transaction_policy": {"decoupled": spec.streams},
    }
    if batches and not spec.streams:
        config["dynamic_batching"] = _dynamic_batching(spec.batching)
    return config


def _tensor_metadata(spec: TensorSpec) -> TensorMetadata:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _version_policy(policy: VersionPolicy) -> dict[str, Any]:
    if policy.all:
        return {"all": {}}
    if policy.specific:
        return {"specific": {"versions": list(policy.specific)}}
    return {"latest": {"num_versions": policy.latest or 1}}


def _dims(spec: TensorSpec, *, batches: bool) -> list[int]:
    return list(spec.shape[1:] if batches else spec.shape)


def _input(spec: TensorSpec, *, batches: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec.datatype),
        "format": "FORMAT_NONE",
        "dims": _dims(spec, batches=batches),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": spec.optional,
        "is_non_linear_format_io": False,
    }


def _output(spec: TensorSpec, *, batches: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec.datatype),
        "dims": _dims(spec, batches=batches),
        # Labels stand in model.yaml itself, there is no file to name.
        "label_filename": "",
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def _instance_group(model: str, spec: InstancesSpec) -> dict[str, Any]:
    kind, _, number = spec.device.partition(":")
    return {
        "name": model,
        "kind": "KIND_CPU" if kind == "cpu" else "KIND_GPU",
        "count": spec.count,
        "gpus": [] if kind == "cpu" else [int(number or 0)],
        "secondary_devices": [],
        "profile": [],
        "passive": False,
        "host_policy": "",
    }


def _dynamic_batching(spec: BatchingSpec) -> dict[str, Any]:
    return {
        "preferred_batch_size": list(spec.preferred_batch_sizes),
        "max_queue_delay_microseconds": _microseconds(spec.max_queue_delay),
        "preserve_ordering": spec.preserve_ordering,
        "priority_levels": spec.priority_levels,
        "default_priority_level": spec.default_priority,
        "default_queue_policy": _queue_policy(spec.queue_policy),
        "priority_queue_policy": {str(level): _queue_policy(policy) for level, policy in spec.priority_queue_policies.items()},
    }


def _queue_policy(policy: QueuePolicy) -> dict[str, Any]:
    return {
        "timeout_action": policy.timeout_action.value,
        "default_timeout_microseconds": _microseconds(policy.default_timeout),
        "allow_timeout_override": policy.allow_timeout_override,
        "max_queue_size": policy.max_queue_size,
    }


def _warmup(spec: ModelSpec, warmup: WarmupSpec, name: str) -> dict[str, Any]:
    shapes = {input: _sample_shape(spec.input(input), sample) for input, sample in warmup.inputs.items()}
    return {
        "name": name,
        "batch_size": next((shape[0] for shape in shapes.values() if shape), 1) if spec.batches else 0,
        "inputs": {
            input: _sample(spec.input(input), sample, shapes[input][1:] if spec.batches else shapes[input])
            for input, sample in warmup.inputs.items()
        },
        "count": warmup.count,
    }


def _sample_shape(tensor: TensorSpec | None, sample: Sample) -> tuple[int, ...]:
    return sample.shape or (tuple(1 if d == -1 else d for d in tensor.shape) if tensor else ())


def _sample(tensor: TensorSpec | None, sample: Sample, dims: tuple[int, ...]) -> dict[str, Any]:
    described: dict[str, Any] = {"data_type": _data_type(tensor.datatype) if tensor else "TYPE_INVALID", "dims": list(dims)}
    # Values that are written out in model.yaml have no form in Triton's schema.
    if sample.data is None:
        described["zero_data" if sample.fill == "zeros" else "random_data"] = True
    return described
