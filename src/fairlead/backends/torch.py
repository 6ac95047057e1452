"""TorchScript (`.pt`) and torch.export (`.pt2`)."""

import base64
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import lines, over_example, overlay, renamed, spec_of
from fairlead.backends.table import torch_kind
from fairlead.backends.tabular import reason
from fairlead.core.errors import LoadError, ModelError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors, datatype_of

DATATYPES: dict[Any, Datatype] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
    torch.bfloat16: "BF16",
}
FAILURES = (RuntimeError, TypeError, IndexError, ValueError, torch.jit.Error)
"""What a program raises on inputs that it cannot take."""
BF16 = np.dtype(ml_dtypes.bfloat16)
EXAMPLE = "fairlead.json"
"""The member of a TorchScript archive that carries the example."""


def save_torchscript(module: Any, path: str | Path, example: Mapping[str, Any]) -> None:
    """Save a traced or scripted module with an example of its inputs, by name and in the order of `forward`.

    The example's datatypes and shapes become the served model's inputs, so that no model.yaml is needed.
    """
    arrays = {name: _to_array(value) if isinstance(value, torch.Tensor) else np.asarray(value) for name, value in example.items()}
    inputs = [
        {"name": name, "datatype": datatype_of(array), "shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}
        for name, array in arrays.items()
    ]
    with _without_deprecation():
        torch.jit.save(module, str(path), _extra_files={EXAMPLE: json.dumps({"inputs": inputs})})


class TorchBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        device = _device(spec.instances.device)
        torch.set_num_threads(threads)
        words = [declared.name for declared in (*spec.inputs, *spec.outputs) if declared.datatype == "BYTES"]
        if words:
            raise LoadError(f"{words[0]!r} is declared as BYTES, but torch has no tensors of strings")
        load = _script if torch_kind(artefact) == "torchscript" else _export
        return load(artefact, spec, device)


class TorchExecutable(Executable):
    def __init__(self, call: Callable[..., Any], device: torch.device, platform: str) -> None:
        self._call, self._device, self.platform = call, device, platform
        self._inputs: list[str] = []
        """Names by position."""
        self._rename: dict[str, str] = {}
        """Declared names of outputs that the program only has positions for."""
        self._least_rows = 1

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        arrays = [inputs[name] for name in self._inputs]
        rows = len(arrays[0]) if self._least_rows > 1 else 1
        if rows < self._least_rows:
            # torch.export specialises on 1, so a program may insist on 2 rows: give it the last one again
            arrays = [np.concatenate([array, *[array[-1:]] * (self._least_rows - rows)]) for array in arrays]
            return {name: array[:rows] for name, array in self.compute(arrays, outputs).items()}
        return self.compute(arrays, outputs)

    def compute(self, arrays: Sequence[np.ndarray], outputs: frozenset[str] | None = None) -> Tensors:
        with torch.inference_mode():
            results = _named(self._call(*(_to_tensor(array, self._device) for array in arrays)))
            names = self._rename
            return {
                names.get(name, name): _to_array(value)
                for name, value in results.items()
                if outputs is None or names.get(name, name) in outputs
            }

    def name_outputs(self, found: list[TensorSpec], declared: tuple[TensorSpec, ...]) -> list[TensorSpec]:
        own = renamed(found, declared, "outputs")
        self._rename = {old.name: new.name for old, new in zip(found, own, strict=True)}
        return own


def _script(artefact: Path, spec: ModelSpec, device: torch.device) -> Executable:
    members = {EXAMPLE: b""}
    try:
        with _without_deprecation():
            module = torch.jit.load(str(artefact), map_location=device, _extra_files=members).eval()
            taken = module.forward.schema.arguments[1:]
            arguments = [each for each in taken if str(each.type) in ("Tensor", "Optional[Tensor]")]
            others = [each.name for each in taken if each not in arguments and not each.has_default_value()]
            example = _carried(members[EXAMPLE]) or _traced(artefact, len(arguments))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{artefact.name} is not a whole TorchScript model ({reason(error)})") from error
    if others:
        raise LoadError(f"{artefact.name}: `forward` takes {', '.join(map(repr, others))}, which are not tensors; give them defaults")
    names = [argument.name for argument in arguments]
    required = sum(not argument.has_default_value() for argument in arguments)
    executable = TorchExecutable(module, device, "pytorch_libtorch")
    try:
        if example:
            _learn_of_example(executable, spec, names, example)
        else:
            _learn_of_declared(executable, spec, names, required)
    except FAILURES as error:
        raise LoadError(
            f"{artefact.name} fails on its first inputs ({_last_line(error)}); declare inputs and outputs in model.yaml"
        ) from error
    return executable


def _learn_of_example(executable: TorchExecutable, spec: ModelSpec, names: list[str], example: Tensors) -> None:
    if len(example) > len(names):
        raise LoadError(f"the example has {len(example)} inputs, but `forward` takes {len(names)} tensors: {', '.join(names)}")
    if example.keys() <= set(names):
        example = {name: example[name] for name in names if name in example}
    arrays = list(example.values())
    shown = renamed([spec_of(name, array, batches=False) for name, array in example.items()], spec.inputs, "inputs")
    inputs = over_example(shown, spec.inputs, "inputs")
    executable._inputs = [each.name for each in inputs]
    executable.example = dict(zip(executable._inputs, arrays, strict=True))
    open_dims = [{axis for axis, dim in enumerate(each.shape) if dim == -1} | {0} for each in inputs]
    outputs = _outputs_of(executable, spec, arrays, open_dims)
    executable.outputs = over_example(outputs, spec.outputs, "outputs")
    if executable.batches:
        inputs = tuple(each if each.shape[0] == -1 else _opened(each) for each in inputs)
    executable.inputs = inputs


def _learn_of_declared(executable: TorchExecutable, spec: ModelSpec, names: list[str], required: int) -> None:
    if not required <= len(spec.inputs) <= len(names):
        asked = [TensorSpec(name=name, datatype="FP32", shape=(-1, 4)) for name in names]
        raise LoadError(
            f"the TorchScript model carries no example of its inputs: save it with fairlead.save_torchscript(module, path, example),"
            f" or write in model.yaml, with your own datatypes and shapes:\n{lines('inputs', asked)}"
        )
    own = {each.name: each for each in spec.inputs}
    known = own.keys() & set(names)
    if known and len(known) < len(own):
        raise LoadError(f"`inputs` declares {', '.join(map(repr, own))}, but `forward` takes {', '.join(map(repr, names))}")
    inputs = tuple(own[name] for name in names if name in own) if known else spec.inputs
    executable.inputs, executable._inputs = inputs, [each.name for each in inputs]
    arrays = [np.zeros([abs(dim) for dim in each.shape], DTYPES[each.datatype]) for each in inputs]
    executable.batches = all(each.shape[:1] == (-1,) for each in (*inputs, *spec.outputs))
    try:
        outputs = _outputs_of(executable, spec, arrays, [{axis for axis, dim in enumerate(each.shape) if dim == -1} for each in inputs])
    except FAILURES:
        if not spec.outputs:
            raise
        # zeros may be no input that works; then the declaration stands, and so do its outputs' names, by position
        executable._rename = {f"output{i}": each.name for i, each in enumerate(spec.outputs)}
        executable.outputs = spec.outputs
        return
    executable.example = dict(zip(executable._inputs, arrays, strict=True))
    executable.outputs = over_example(outputs, spec.outputs, "outputs")


def _outputs_of(executable: TorchExecutable, spec: ModelSpec, arrays: list[np.ndarray], open_dims: list[set[int]]) -> list[TensorSpec]:
    """The outputs' specs by running the program; sets `executable.batches` by whether twice the rows give twice the rows."""
    first = executable.compute(arrays)
    shapes = {name: list(array.shape) for name, array in first.items()}
    rows = {array.shape[:1] for array in arrays}
    executable.batches = (
        len(rows) == 1 and rows != {()} and all(0 in dims for dims in open_dims) and {a.shape[:1] for a in first.values()} == rows
    )

    def mark(axes: list[set[int]]) -> bool:
        """Double these dimensions: those of the outputs that change are open too."""
        try:
            grown = executable.compute([_doubled(array, dims) for array, dims in zip(arrays, axes, strict=True)])
        except FAILURES:
            return False
        for name, shape in shapes.items():
            shape[:] = [dim if dim == other else -1 for dim, other in zip(shape, grown[name].shape, strict=True)]
        return True

    if executable.batches:
        executable.batches = mark([{0}] * len(arrays)) and all(shape[0] == -1 for shape in shapes.values())
    if any(dims - {0} for dims in open_dims):
        mark([dims - {0} for dims in open_dims])
    found = [
        TensorSpec(name=name, datatype=spec_of(name, array, batches=False).datatype, shape=tuple(shapes[name]))
        for name, array in first.items()
    ]
    return executable.name_outputs(found, spec.outputs)


def _doubled(array: np.ndarray, axes: set[int]) -> np.ndarray:
    for axis in axes:
        array = np.concatenate([array, array], axis=axis)
    return array


def _opened(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(name=spec.name, datatype=spec.datatype, shape=(-1, *spec.shape[1:]), optional=spec.optional, labels=spec.labels)


def _carried(member: bytes) -> Tensors:
    """The example that `save_torchscript` put into the archive."""
    if not member:
        return {}
    return {
        each["name"]: np.frombuffer(base64.b64decode(each["data"]), DTYPES[each["datatype"]]).reshape(each["shape"])
        for each in json.loads(member)["inputs"]
    }


def _traced(artefact: Path, num_tensors: int) -> Tensors:
    """Zeros like the tensors that the module was traced with: torch keeps their types and shapes in the archive."""
    with zipfile.ZipFile(artefact) as archive:
        if not any(member.endswith("/traced_inputs.pkl") for member in archive.namelist()):
            return {}
    module = torch.jit.load(str(artefact), map_location="cpu", _restore_shapes=True)
    inputs = [value for value in list(module.graph.inputs())[1:] if value.type().kind() == "TensorType"]
    if len(inputs) != num_tensors or any(value.type().sizes() is None or value.type().dtype() not in DATATYPES for value in inputs):
        return {}
    names = [argument.name for argument in module.forward.schema.arguments[1:]]
    return {
        name: np.zeros(value.type().sizes(), DTYPES[DATATYPES[value.type().dtype()]]) for name, value in zip(names, inputs, strict=True)
    }


def _export(artefact: Path, spec: ModelSpec, device: torch.device) -> Executable:
    try:
        program = torch.export.load(str(artefact))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # torch.export has no errors of its own: assertions, keys, schemas of other versions
        raise LoadError(
            f"{artefact.name} is not a whole torch.export program, or not one for torch {torch.__version__} ({reason(error)})"
        ) from error
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    arguments = [each.arg for each in program.graph_signature.input_specs if each.kind is InputKind.USER_INPUT]
    results = [each.arg for each in program.graph_signature.output_specs if each.kind is OutputKind.USER_OUTPUT]
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None or len(arguments) != in_spec.num_leaves:
        raise LoadError(f"{artefact.name} does not tell how it is called; export it again with torch.export.export")
    positions = [i for i, argument in enumerate(arguments) if isinstance(argument, TensorArgument)]
    constants = [getattr(argument, "value", None) for argument in arguments]

    def call(*tensors: torch.Tensor) -> Any:
        leaves = list(constants)
        for position, tensor in zip(positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        return module(*args, **kwargs)

    executable = TorchExecutable(call, device, "pytorch_export")
    names = [arguments[position].name for position in positions]
    fakes = {name: values[name] for name in names}
    inputs = renamed([_fake_spec(name, fake) for name, fake in fakes.items()], spec.inputs, "inputs")
    executable.inputs = overlay(inputs, spec.inputs, "inputs")
    executable._inputs = [each.name for each in executable.inputs]
    by_name = _named(
        pytree.tree_unflatten(
            [values.get(result.name) if isinstance(result, TensorArgument) else result.value for result in results], out_spec
        )
    )
    outputs = executable.name_outputs([_fake_spec(name, fake) for name, fake in by_name.items()], spec.outputs)
    executable.outputs = overlay(outputs, spec.outputs, "outputs")
    executable.batches = all(each.shape[:1] == (-1,) for each in (*executable.inputs, *executable.outputs))
    if executable.batches:
        executable._least_rows = _check_rows(program, list(fakes.values()), spec)
    if program.example_inputs is not None:
        leaves = pytree.tree_leaves(program.example_inputs)
        executable.example = {name: _to_array(leaves[position]) for name, position in zip(executable._inputs, positions, strict=True)}
    return executable


def _fake_spec(name: str, fake: Any) -> TensorSpec:
    if not isinstance(fake, torch.Tensor):
        return spec_of(name, np.asarray(fake), batches=False)
    if fake.dtype not in DATATYPES:
        raise LoadError(f"{name!r} is a {fake.dtype}, which has no datatype in the protocol")
    return TensorSpec(name=name, datatype=DATATYPES[fake.dtype], shape=tuple(dim if isinstance(dim, int) else -1 for dim in fake.shape))


def _check_rows(program: Any, fakes: list[Any], spec: ModelSpec) -> int:
    """The least rows that the program takes. Raises LoadError where it takes fewer than the batches that it would get."""
    ranges = [program.range_constraints.get(fake.shape[0].node.expr) for fake in fakes]
    known = [each for each in ranges if each is not None]
    most = min((int(each.upper) for each in known if each.upper.is_Integer), default=spec.batching.max_batch_size)
    if spec.batching.max_batch_size > most:
        raise LoadError(
            f"the program was exported for at most {most} rows, but batches may have {spec.batching.max_batch_size};"
            f" write in model.yaml:\nbatching: {{max_batch_size: {most}}}"
        )
    return max([1, *(int(each.lower) for each in known)])


def _named(result: Any) -> dict[str, Any]:
    """A program's outputs by name: a dict's keys, a named tuple's fields, else output0, output1, ..."""
    if isinstance(result, Mapping):
        named = {str(key): value for key, value in result.items()}
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        named = dict(zip(result._fields, result, strict=True))
    elif isinstance(result, (tuple, list)):
        named = {f"output{i}": value for i, value in enumerate(result)}
    else:
        named = {"output0": result}
    for name, value in named.items():
        if not isinstance(value, (torch.Tensor, int, float)):
            raise ModelError(
                f"output '{name}' is a {type(value).__name__}; a program's outputs are a tensor, or a tuple, list or dict of them"
            )
    return named


class _Writable:
    """A read-only array's memory without its flag: torch warns of such arrays, and programs do not write to their inputs."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    is_bf16 = array.dtype == BF16
    if is_bf16:
        array = array.view(np.int16)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    tensor = torch.from_numpy(array)
    if is_bf16:
        tensor = tensor.view(torch.bfloat16)
    return tensor if device.type == "cpu" else tensor.to(device)


def _to_array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    tensor = value.detach().cpu().contiguous()
    array: np.ndarray = tensor.view(torch.int16).numpy().view(BF16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    return array


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"`device: {name}` is not there: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """TorchScript is deprecated by torch; its artefacts are many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _last_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1]}" if text else type(error).__name__


BACKEND = TorchBackend()
