"""ONNX, by ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import overlay
from fairlead.backends.tabular import label
from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors, object_array, to_bytes_array

DATATYPES: dict[str, Datatype] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}


class OnnxBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # threads that wait busily would take the cores from the other instances
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = _providers(spec.instances.device)
        try:
            session = onnxruntime.InferenceSession(str(artefact), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise LoadError(f"{artefact.name} is not a whole ONNX model, or not one for this ONNX Runtime ({_reason(error)})") from error
        return OnnxExecutable(session, spec)


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise LoadError(
            f"`device: {device}` needs ONNX Runtime with CUDA (pip install onnxruntime-gpu); this one has {', '.join(available)}"
        )
    return [("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}), "CPUExecutionProvider"]


class OnnxExecutable(Executable):
    platform = "onnxruntime_onnx"
    shareable = True

    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._run = session.run
        arguments, results = session.get_inputs(), session.get_outputs()
        self.inputs = overlay([_spec(argument, "input", argument.shape) for argument in arguments], spec.inputs, "inputs")
        self._names = [result.name for result in results]
        self._words = {tensor.name for tensor in self.inputs if tensor.datatype == "BYTES"}
        self._decoded = {result.name for result in results if result.type == "tensor(string)"}
        self._maps = {result.name for result in results if result.type.startswith("seq(map(")}
        # a shape without dimensions is a number's, or one that the graph leaves open
        seen = self._dry_run() if any(not result.shape for result in results) else {}
        self.outputs = overlay([_output(result, seen, spec.output(result.name)) for result in results], spec.outputs, "outputs")
        symbols = {argument.shape[0] if argument.shape else 0 for argument in arguments} - {None}
        one_batch = len(symbols) <= 1 and all(isinstance(symbol, str) for symbol in symbols)
        self.batches = one_batch and all(tensor.shape[:1] == (-1,) for tensor in (*self.inputs, *self.outputs))

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        names = self._names if outputs is None else [name for name in self._names if name in outputs]
        if self._words:
            inputs = {name: _decode(array) if name in self._words else array for name, array in inputs.items()}
        result = dict(zip(names, self._run(names, inputs), strict=True))
        if self._maps or self._decoded:
            for name, value in result.items():
                if name in self._maps:
                    result[name] = np.array([list(row.values()) for row in value], np.float32)
                elif name in self._decoded:
                    result[name] = to_bytes_array(value)
        return result

    def _dry_run(self) -> dict[str, Any]:
        """What the model makes of zeros with every open dimension 1; nothing where it takes no zeros."""
        row = {tensor.name: np.zeros([abs(dim) for dim in tensor.shape], DTYPES[tensor.datatype]) for tensor in self.inputs}
        row |= {name: np.full(row[name].shape, "", object) for name in self._words}
        try:
            return dict(zip(self._names, self._run(self._names, row), strict=True))
        except Exception:
            return {}


def _spec(value: Any, side: str, shape: Any) -> TensorSpec:
    """Of an input or output as ONNX Runtime describes it: `tensor(float)`, ["batch", 4]."""
    element = value.type.removeprefix("tensor(").removesuffix(")")
    if element not in DATATYPES:
        raise LoadError(
            f"{side} {value.name!r} is a {value.type}, which cannot be served; convert the model so that it is a tensor of another type"
        )
    return TensorSpec(name=value.name, datatype=DATATYPES[element], shape=tuple(dim if isinstance(dim, int) else -1 for dim in shape))


def _output(result: Any, seen: dict[str, Any], declared: TensorSpec | None) -> TensorSpec:
    value = seen.get(result.name)
    if result.type.startswith("seq(map("):  # scikit-learn's ZipMap: for each row a dict of probabilities by class
        if not value or not isinstance(value[0], dict) or not all(isinstance(score, float) for score in value[0].values()):
            raise LoadError(
                f"output {result.name!r} is a {result.type}, not a tensor; convert the model with `options={{'zipmap': False}}`"
            )
        classes = tuple(map(label, value[0]))
        return TensorSpec(name=result.name, datatype="FP32", shape=(-1, len(classes)), labels=classes)
    if not result.shape and declared is not None and value is None:
        return _spec(result, "output", declared.shape)
    return _spec(result, "output", result.shape or [None] * (0 if value is None else np.ndim(value)))


def _decode(array: np.ndarray) -> np.ndarray:
    """ONNX Runtime takes str; given bytes it would compute on their `repr`."""
    return object_array([word.decode(errors="replace") for word in array.reshape(-1)], array.shape)


def _reason(error: Exception) -> str:
    return str(error).removeprefix("[ONNXRuntimeError] : ").strip().partition("\n")[0]


BACKEND = OnnxBackend()
