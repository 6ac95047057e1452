"""Triton's ModelConfig, as `config.pbtxt` or as JSON, read into a ModelSpec.

What changes answers and is not served is an error that names the field and, in a file, the line. What only hints at
how to run is taken without effect and named in one log line.

Two readings differ from Triton's on purpose. Without `dynamic_batching` Triton runs each request alone; here rows of
several requests still run together, which changes no answer. Without a queue policy Triton ignores the timeout that a
request brings; here it counts, as it does for every other model. A policy that is written is taken literally, with
Triton's default of `allow_timeout_override: false`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import msgspec
import structlog
from msgspec import Struct, field
from msgspec import inspect as types

from fairlead.backends import BACKENDS
from fairlead.core.errors import ConfigError
from fairlead.core.specs import (
    BatchingSpec,
    Count,
    Datatype,
    Dimension,
    InstancesSpec,
    ModelSpec,
    Positive,
    QueuePolicy,
    Sample,
    TensorSpec,
    TimeoutAction,
    VersionPolicy,
    WarmupSpec,
)
from fairlead.runtime.pbtxt import Field, parse

log = structlog.get_logger("fairlead.repository")

CONFIG_FILE = "config.pbtxt"


_ANYTHING = types.AnyType()

# The schema: what is read of each message. `Any` is what is refused or not used whatever it holds.


class _Reshape(Struct, frozen=True):
    shape: list[int] = []


class _Tensor(Struct, frozen=True):
    name: str = ""
    data_type: str = "TYPE_INVALID"
    dims: list[Dimension] = []
    reshape: _Reshape | None = None
    is_shape_tensor: bool = False
    is_non_linear_format_io: bool = False


class _Input(_Tensor, frozen=True):
    format: str = "FORMAT_NONE"
    allow_ragged_batch: bool = False
    optional: bool = False


class _Output(_Tensor, frozen=True):
    label_filename: str = ""


class _Latest(Struct, frozen=True):
    num_versions: Count = 0


class _All(Struct, frozen=True):
    pass


class _Specific(Struct, frozen=True):
    versions: list[Positive] = []


class _VersionPolicy(Struct, frozen=True):
    latest: _Latest | None = None
    all: _All | None = None
    specific: _Specific | None = None


class _QueuePolicy(Struct, frozen=True):
    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout_microseconds: Count = 0
    allow_timeout_override: bool = False
    max_queue_size: Count = 0


class _DynamicBatching(Struct, frozen=True):
    preferred_batch_size: list[Positive] = []
    max_queue_delay_microseconds: Count = 0
    preserve_ordering: bool = False
    priority_levels: Count = 0
    default_priority_level: Count = 0
    default_queue_policy: _QueuePolicy | None = None
    priority_queue_policy: dict[int, _QueuePolicy] = {}


class _InstanceGroup(Struct, frozen=True):
    name: str = ""
    kind: Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"] = "KIND_AUTO"
    count: Count = 0
    gpus: list[Count] = []
    rate_limiter: Any = None
    secondary_devices: list[Any] = []
    profile: list[Any] = []
    passive: bool = False
    host_policy: str = ""


class _Parameter(Struct, frozen=True):
    string_value: str = ""


class _WarmupInput(Struct, frozen=True):
    data_type: str = "TYPE_INVALID"
    dims: list[Positive] = []
    zero_data: bool = False
    random_data: bool = False
    input_data_file: str = ""


class _Warmup(Struct, frozen=True):
    name: str = ""
    batch_size: Count = 0
    inputs: dict[str, _WarmupInput] = {}
    count: Count = 0


class _TransactionPolicy(Struct, frozen=True):
    decoupled: bool = False


class _ModelConfig(Struct, frozen=True):
    name: str = ""
    platform: str = ""
    backend: str = ""
    version_policy: _VersionPolicy | None = None
    max_batch_size: Count | None = None
    input: list[_Input] = []
    output: list[_Output] = []
    dynamic_batching: _DynamicBatching | None = None
    instance_group: list[_InstanceGroup] = []
    default_model_filename: str = ""
    parameters: dict[str, _Parameter] = {}
    model_warmup: list[_Warmup] = []
    model_transaction_policy: _TransactionPolicy | None = None
    # refused
    runtime: str = ""
    batch_input: list[Any] = []
    batch_output: list[Any] = []
    sequence_batching: Any = None
    ensemble_scheduling: Any = None
    cc_model_filenames: Any = None
    model_operations: Any = None
    model_repository_agents: Any = None
    response_cache: Any = None
    # not used
    optimization: Any = None
    metric_tags: Any = None
    model_metrics: Any = None


_REFUSED = {
    "runtime": "the backend runs by its own library; leave it out",
    "batch_input": "no tensors are made from the batch; give the model what it needs as an input",
    "batch_output": "outputs are split by rows only",
    "sequence_batching": "requests of one sequence are not kept on one instance",
    "ensemble_scheduling": "models are not chained; call them one after the other, or join them in one model.py or ONNX graph",
    "cc_model_filenames": "one artefact serves every device; name it in `default_model_filename`",
    "model_operations": "custom operator libraries are not loaded",
    "model_repository_agents": "artefacts are served as they lie there",
    "response_cache": "every request is computed",
}
_NOT_USED = ("optimization", "metric_tags", "model_metrics")
_REFUSED_OF_GROUPS = ("rate_limiter", "secondary_devices", "profile", "passive")
_REFUSED_OF_TENSORS = ("is_shape_tensor", "is_non_linear_format_io", "allow_ragged_batch")

_DATATYPES: dict[str, Datatype] = {
    **{f"TYPE_{name}": name for name in cast(tuple[Datatype, ...], Datatype.__args__) if name != "BYTES"},  # type: ignore[attr-defined]
    "TYPE_STRING": "BYTES",
}
_KINDS = {name: name for name in BACKENDS} | {
    "onnxruntime": "onnx",
    "onnxruntime_onnx": "onnx",
    "pytorch": "torchscript",
    "pytorch_libtorch": "torchscript",
}
_FIL_KINDS = {"xgboost": "xgboost", "xgboost_json": "xgboost", "xgboost_ubj": "xgboost", "lightgbm": "lightgbm"}
_FIL_FILES = {"xgboost": "xgboost.model"}
"""Where the suffix would not tell."""
_THREADS = {"onnx": "intra_op_thread_count", "torchscript": "INTRA_OP_THREAD_COUNT", "torch_export": "INTRA_OP_THREAD_COUNT"}


class _Origin(Struct):
    """Where a configuration comes from, and which of its fields had no effect."""

    source: str
    lines: Mapping[str, int]
    read: Callable[[str], str] | None
    unused: list[str] = field(default_factory=list)

    def error(self, place: str, message: str) -> ConfigError:
        """`place`: a path such as `input[0].dims[1]`; the line is its own or that of the nearest message around it."""
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        line = self.lines.get(place)
        return ConfigError(f"{self.source}:{line}: {message}" if line else f"{self.source}: {message}")


def spec_from_pbtxt(text: str, source: str, read: Callable[[str], str] | None = None) -> ModelSpec:
    """Raises ConfigError as `source:line: what is wrong`. `read` gives the text of a file in the model's folder, or a ConfigError."""
    config, lines = read_pbtxt(text, source)
    return spec_from_triton(config, source, lines=lines, read=read)


def spec_from_triton(
    config: Mapping[str, Any], source: str, *, lines: Mapping[str, int] | None = None, read: Callable[[str], str] | None = None
) -> ModelSpec:
    """A ModelConfig in the shape of protobuf's JSON: original or camelCase names, 64-bit numbers also as strings.

    Raises ConfigError, naming the field.
    """
    origin = _Origin(source, lines or {}, read)
    try:
        triton = msgspec.convert(_named(config, types.type_info(_ModelConfig), "", origin), _ModelConfig, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).replace(" | null", "").partition(" - at ")
        place = path.strip("`").removeprefix("$").removeprefix(".")
        raise origin.error(place, f"{message}{f' (at {place})' if place else ''}") from None
    _refuse(triton, origin)
    backend, file, parameters, threads = _backend(triton, origin)
    batches = bool(triton.max_batch_size)
    spec = ModelSpec(
        name=triton.name,
        backend=backend,
        file=file,
        inputs=tuple(_tensor(tensor, f"input[{i}]", batches, origin) for i, tensor in enumerate(triton.input)),
        outputs=tuple(_tensor(tensor, f"output[{i}]", batches, origin) for i, tensor in enumerate(triton.output)),
        batching=_batching(triton, origin),
        instances=_instances(triton, threads, origin),
        version_policy=_version_policy(triton.version_policy, origin),
        warmup=tuple(_warmup(triton, warmup, f"model_warmup[{i}]", origin) for i, warmup in enumerate(triton.model_warmup)),
        parameters=parameters,
        streams=triton.model_transaction_policy is not None and triton.model_transaction_policy.decoupled,
    )
    if origin.unused:
        log.info("model configuration has fields without effect here", source=source, fields=origin.unused)
    return spec


def triton_config(text: str) -> dict[str, Any] | None:
    """The ModelConfig that a JSON text holds; None where it is no JSON object, or one in the words of model.yaml."""
    try:
        config = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    keys = {_snake(key) for key in config}
    ours = set(ModelSpec.__struct_fields__)
    if keys - ours:
        return config if not (keys & ours) - set(_ModelConfig.__struct_fields__) else None
    # Only words that both have: Triton's values are messages where model.yaml's are plain.
    policy, parameters = config.get("version_policy"), config.get("parameters")
    messages = isinstance(policy, dict) and any(isinstance(choice, dict) for choice in policy.values())
    messages |= isinstance(parameters, dict) and any(
        isinstance(parameter, dict) and parameter.keys() <= {"string_value", "stringValue"} for parameter in parameters.values()
    )
    triton_only = config.get("backend") in ({"fil"} | _KINDS.keys()) - BACKENDS.keys()
    return config if messages or (triton_only and keys <= set(_ModelConfig.__struct_fields__)) else None


def _named(value: Any, schema: types.Type, place: str, origin: _Origin) -> Any:
    """The value with original field names and without nulls. Raises ConfigError for an unknown field."""
    schema = _without_none(schema)
    match schema:
        case types.StructType() if isinstance(value, Mapping):
            known = {each.name: each.type for each in schema.fields}
            named = {}
            for key, item in value.items():
                name = key if key in known else _snake(key)
                if name not in known:
                    raise origin.error(f"{place}.{key}".lstrip("."), f"unknown field `{key}`{f' (at {place})' if place else ''}")
                if item is not None:
                    named[name] = _named(item, known[name], f"{place}.{key}".lstrip("."), origin)
            return named
        case types.ListType() if isinstance(value, list):
            return [_named(item, schema.item_type, f"{place}[{i}]", origin) for i, item in enumerate(value)]
        case types.DictType() if isinstance(value, Mapping):
            return {key: _named(item, schema.value_type, f"{place}[{key}]", origin) for key, item in value.items()}
    return value


def _without_none(schema: types.Type) -> types.Type:
    return next(each for each in schema.types if not isinstance(each, types.NoneType)) if isinstance(schema, types.UnionType) else schema


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])[A-Z]", lambda match: f"_{match[0].lower()}", name)


def _refuse(triton: _ModelConfig, origin: _Origin) -> None:
    for name, why in _REFUSED.items():
        value = getattr(triton, name)
        # A scheduler is chosen by its message being there at all.
        if _is_set(value) or (value is not None and name in ("sequence_batching", "ensemble_scheduling")):
            raise origin.error(name, f"`{name}` is not supported: {why}")
    origin.unused.extend(name for name in _NOT_USED if _is_set(getattr(triton, name)))


def _is_set(value: Any) -> bool:
    """Whether anything in it differs from protobuf's defaults; an entry of a list does."""
    if isinstance(value, dict):
        # Inside `Any` nothing tells a list of one from its entry.
        return any(_is_set(item) for part in value.values() for item in (part if isinstance(part, list) else [part]))
    return bool(value)


def _backend(triton: _ModelConfig, origin: _Origin) -> tuple[str, str, dict[str, Any], int]:
    """Kind, file, parameters and threads."""
    parameters: dict[str, Any] = {name: parameter.string_value for name, parameter in triton.parameters.items()}
    file = triton.default_model_filename
    if triton.backend == "fil":
        return *_fil(triton, parameters, file, origin), 0
    for name in ("backend", "platform"):
        value = getattr(triton, name)
        if value and value not in _KINDS and not (name == "platform" and triton.backend):
            raise origin.error(name, f"{name} {value!r} is not among those served here: {', '.join([*_KINDS, 'fil'])}")
    kind = _KINDS.get(triton.backend) or _KINDS.get(triton.platform, "")
    if triton.backend and triton.platform and _KINDS.get(triton.platform) != kind:
        if triton.platform in _KINDS:
            raise origin.error("platform", f"platform {triton.platform!r} contradicts backend {triton.backend!r}")
        origin.unused.append("platform")
    if kind == "torchscript" and file.endswith(".pt2"):
        kind = "torch_export"
    if kind == "python" and "EXECUTION_ENV_PATH" in parameters:
        raise origin.error(
            "parameters[EXECUTION_ENV_PATH]",
            "parameter 'EXECUTION_ENV_PATH' is not supported: install what the model imports beside fairlead",
        )
    threads = 0
    option = _THREADS.get(kind)
    if option is not None and option in parameters:
        text = parameters.pop(option)
        if not text.isdecimal():
            raise origin.error(f"parameters[{option}]", f"parameter {option!r} must be a number, not {text!r}")
        threads = int(text)
    if kind not in ("", "python"):
        origin.unused.extend(f"parameters[{name}]" for name in parameters)
    return kind, file, parameters, threads


def _fil(triton: _ModelConfig, parameters: dict[str, Any], file: str, origin: _Origin) -> tuple[str, str, dict[str, Any]]:
    model_type = parameters.get("model_type", "xgboost")
    if model_type not in _FIL_KINDS:
        raise origin.error(
            "parameters[model_type]",
            f"model_type {model_type!r} is not among those served here: {', '.join(_FIL_KINDS)};"
            " save a scikit-learn model with skops and leave `backend` and `model_type` out",
        )
    if parameters.get("threshold", "0.5") not in ("0.5", "0.50"):
        raise origin.error(
            "parameters[threshold]", "parameter 'threshold' is not supported: `predict` decides at 0.5; take `predict_proba`"
        )
    for i, output in enumerate(triton.output):
        if output.name not in ("predict", "predict_proba"):
            raise origin.error(
                f"output[{i}].name",
                f"output {output.name!r} is not there: tree models answer with `predict` and, for classifiers, `predict_proba`; leave `output` out",
            )
    origin.unused.extend(f"parameters[{name}]" for name in parameters if name not in ("model_type", "threshold"))
    return _FIL_KINDS[model_type], file or _FIL_FILES.get(model_type, ""), parameters


def _tensor(tensor: _Input | _Output, place: str, batches: bool, origin: _Origin) -> TensorSpec:
    if not tensor.name:
        raise origin.error(place, f"`{place}` has no name")
    for name in _REFUSED_OF_TENSORS:
        if getattr(tensor, name, False):
            raise origin.error(f"{place}.{name}", f"`{name}` of {tensor.name!r} is not supported")
    if tensor.reshape is not None and tensor.reshape.shape != tensor.dims:
        raise origin.error(f"{place}.reshape", f"`reshape` of {tensor.name!r} is not supported: write the model's own shape as `dims`")
    if 0 in tensor.dims:
        raise origin.error(f"{place}.dims", f"`dims` of {tensor.name!r} must be positive, or -1 where any length goes")
    labels: tuple[str, ...] = ()
    optional = False
    if isinstance(tensor, _Input):
        optional = tensor.optional
        if tensor.format != "FORMAT_NONE":
            origin.unused.append(f"{place}.format")
    elif tensor.label_filename:
        labels = _labels(tensor.label_filename, place, origin)
    return TensorSpec(
        name=tensor.name,
        datatype=_datatype(tensor.data_type, tensor.name, place, origin),
        shape=(-1, *tensor.dims) if batches else tuple(tensor.dims),
        optional=optional,
        labels=labels,
    )


def _datatype(data_type: str, name: str, place: str, origin: _Origin) -> Datatype:
    if data_type not in _DATATYPES:
        raise origin.error(f"{place}.data_type", f"`data_type` of {name!r} must be one of {', '.join(_DATATYPES)}, not {data_type}")
    return _DATATYPES[data_type]


def _labels(filename: str, place: str, origin: _Origin) -> tuple[str, ...]:
    if origin.read is None:
        raise origin.error(f"{place}.label_filename", f"`label_filename` {filename!r} needs the model's folder")
    try:
        return tuple(origin.read(filename).splitlines())
    except ConfigError as error:
        raise origin.error(f"{place}.label_filename", f"`label_filename` {filename!r}: {error.message}") from None


def _batching(triton: _ModelConfig, origin: _Origin) -> BatchingSpec:
    rows = triton.max_batch_size
    if rows is None:
        # With neither it nor tensors written, all is left to the artefact; written `dims` are whole shapes then.
        rows = 0 if triton.input or triton.output else BatchingSpec().max_batch_size
    dynamic = triton.dynamic_batching
    if dynamic is None:
        return BatchingSpec(max_batch_size=rows)
    place = "dynamic_batching"
    if any(size > rows for size in dynamic.preferred_batch_size):
        raise origin.error(f"{place}.preferred_batch_size", f"`preferred_batch_size` must be at most `max_batch_size`, {rows}")
    levels, policies = dynamic.priority_levels, dynamic.priority_queue_policy
    if levels:
        if dynamic.default_priority_level > levels:
            raise origin.error(
                f"{place}.default_priority_level", f"`default_priority_level` must be between 1 and `priority_levels`, {levels}"
            )
        for level in policies:
            if not 1 <= level <= levels:
                raise origin.error(
                    f"{place}.priority_queue_policy", f"`priority_queue_policy` names level {level}, there are 1 to {levels}"
                )
    else:
        origin.unused.extend(
            f"{place}.{name} (without priority_levels)"
            for name in ("default_priority_level", "priority_queue_policy")
            if getattr(dynamic, name)
        )
    if dynamic.preserve_ordering:
        if levels > 1:
            raise origin.error(f"{place}.preserve_ordering", "`preserve_ordering` allows only one priority level")
        every = [dynamic.default_queue_policy or _QueuePolicy(), *policies.values()]
        if any(policy.default_timeout_microseconds and policy.timeout_action is TimeoutAction.DELAY for policy in every):
            raise origin.error(f"{place}.preserve_ordering", "`preserve_ordering` does not go with a queue policy of DELAY")
    return BatchingSpec(
        max_batch_size=rows,
        preferred_batch_sizes=tuple(dynamic.preferred_batch_size),
        max_queue_delay=dynamic.max_queue_delay_microseconds / 1e6,
        preserve_ordering=dynamic.preserve_ordering,
        priority_levels=levels,
        default_priority=dynamic.default_priority_level if levels else 0,
        queue_policy=_queue_policy(dynamic.default_queue_policy) if dynamic.default_queue_policy else QueuePolicy(),
        priority_queue_policies={level: _queue_policy(policy) for level, policy in policies.items()} if levels else {},
    )


def _queue_policy(policy: _QueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=policy.timeout_action,
        default_timeout=policy.default_timeout_microseconds / 1e6,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


def _instances(triton: _ModelConfig, threads: int, origin: _Origin) -> InstancesSpec:
    """KIND_AUTO and KIND_MODEL mean the CPU unless they name a GPU, as `instances` of model.yaml does."""
    counts: dict[str, int] = {}
    for i, group in enumerate(triton.instance_group):
        place = f"instance_group[{i}]"
        for name in _REFUSED_OF_GROUPS:
            if _is_set(getattr(group, name)):
                raise origin.error(f"{place}.{name}", f"`{name}` of an instance group is not supported")
        if group.host_policy:
            origin.unused.append(f"{place}.host_policy")
        if group.gpus and group.kind in ("KIND_CPU", "KIND_MODEL"):
            raise origin.error(f"{place}.gpus", f"an instance group of {group.kind} cannot have `gpus`")
        if len(set(group.gpus)) > 1:
            raise origin.error(f"{place}.gpus", f"one model runs on one device, not on GPUs {group.gpus}; serve it under a name for each")
        device = f"cuda:{group.gpus[0]}" if group.gpus else "cuda" if group.kind == "KIND_GPU" else "cpu"
        counts[device] = counts.get(device, 0) + (group.count or 1)
    if len(counts) > 1:
        raise origin.error(
            "instance_group[1]", f"one model runs on one device, not on {' and '.join(counts)}; serve it under a name for each"
        )
    for device, count in counts.items():
        return InstancesSpec(count=count, device=device, threads=threads)
    return InstancesSpec(threads=threads)


def _version_policy(policy: _VersionPolicy | None, origin: _Origin) -> VersionPolicy:
    if policy is None:
        return VersionPolicy()
    chosen = [name for name in ("latest", "all", "specific") if getattr(policy, name) is not None]
    if len(chosen) > 1:
        raise origin.error("version_policy", f"`version_policy` takes one of {' and '.join(chosen)}, not several")
    if policy.specific is not None:
        if not policy.specific.versions:
            raise origin.error("version_policy.specific", "`version_policy` names no version in `specific`")
        return VersionPolicy(specific=tuple(policy.specific.versions))
    return VersionPolicy(all=policy.all is not None, latest=policy.latest.num_versions if policy.latest else 0)


def _warmup(triton: _ModelConfig, warmup: _Warmup, place: str, origin: _Origin) -> WarmupSpec:
    declared = {tensor.name: tensor.data_type for tensor in triton.input}
    rows = (warmup.batch_size or 1,) if triton.max_batch_size or warmup.batch_size else ()
    inputs = {}
    for name, sample in warmup.inputs.items():
        where = f"{place}.inputs[{name}]"
        if sample.input_data_file:
            raise origin.error(
                f"{where}.input_data_file", f"`input_data_file` of warm-up {name!r} is not supported: use `zero_data` or `random_data`"
            )
        if sample.zero_data == sample.random_data:
            raise origin.error(where, f"warm-up {name!r} needs one of `zero_data: true` and `random_data: true`")
        if sample.data_type != declared.get(name, sample.data_type):
            raise origin.error(f"{where}.data_type", f"warm-up {name!r} is {sample.data_type}, but the input is {declared[name]}")
        _datatype(sample.data_type, name, where, origin)
        inputs[name] = Sample(shape=(*rows, *sample.dims), fill="zeros" if sample.zero_data else "random")
    return WarmupSpec(inputs=inputs, count=warmup.count or 1)


def read_pbtxt(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A ModelConfig in text format as the JSON that it means, and the line of every place in it. Raises ConfigError."""
    lines: dict[str, int] = {}
    return _arrange(parse(text, source), types.type_info(_ModelConfig), "", lines, source), lines


def _arrange(fields: list[Field], schema: types.Type, prefix: str, lines: dict[str, int], source: str) -> dict[str, Any]:
    """Fields as a dict: lists and maps where the schema has them; what it does not know as it comes."""
    schema = _without_none(schema)
    known = {each.name: each.type for each in schema.fields} if isinstance(schema, types.StructType) else {}
    arranged: dict[str, Any] = {}
    for each in fields:
        name, value, kind = each.name, each.value, known.get(each.name, _ANYTHING)
        place = prefix + name
        if isinstance(kind, types.ListType):
            items = arranged.setdefault(name, [])
            lines.setdefault(place, each.line)
            lines[f"{place}[{len(items)}]"] = each.line
            items.append(_arrange(value, kind.item_type, f"{place}[{len(items)}].", lines, source) if isinstance(value, list) else value)
        elif isinstance(kind, types.DictType):
            entry = {part.name: part for part in value} if isinstance(value, list) else {}
            if not entry.keys() <= {"key", "value"} or "key" not in entry or isinstance(entry["key"].value, list):
                raise ConfigError(f"{source}:{each.line}: an entry of `{name}` is written {{ key: ... value: ... }}")
            key, content = entry["key"].value, entry["value"].value if "value" in entry else []
            entries = arranged.setdefault(name, {})
            if key in entries:
                raise ConfigError(f"{source}:{entry['key'].line}: `{name}` has {key!r} twice")
            lines.setdefault(place, each.line)
            lines[f"{place}[{key}]"] = entry["key"].line
            entries[key] = _arrange(content, kind.value_type, f"{place}[{key}].", lines, source) if isinstance(content, list) else content
        else:
            lines.setdefault(place, each.line)
            item = _arrange(value, kind, f"{place}.", lines, source) if isinstance(value, list) else value
            if name not in arranged:
                arranged[name] = item
            elif name in known and not isinstance(kind, types.AnyType):
                raise ConfigError(f"{source}:{each.line}: `{name}` is given twice")
            elif isinstance(arranged[name], list):
                arranged[name].append(item)
            else:
                arranged[name] = [arranged[name], item]
    return arranged
