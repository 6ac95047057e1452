"""ONNX, by ONNX Runtime."""

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import overlay
from fairlead.backends.tabular import label, reason, zeros
from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors, to_bytes_array

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
        raise LoadError(f"`device: {device}` needs ONNX Runtime with CUDA (pip install onnxruntime-gpu); this one has {', '.join(available)}")
    return [("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}), "CPUExecutionProvider"]


class OnnxExecutable(Executable):
    platform = "onnxruntime_onnx"
    shareable = True

    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._run = session.run
        arguments, results = session.get_inputs(), session.get_outputs()
        inputs = tuple(_spec(argument, "input") for argument in arguments)
        self._maps = {result.name for result in results if result.type.startswith("seq(map(")}
        self._words = {spec.name for spec in inputs if spec.datatype == "BYTES"}
        self.inputs = overlay(inputs, spec.inputs, "inputs")
        self._names = [result.name for result in results]
        self._decoded = {result.name for result in results if result.type == "tensor(string)"}
        seen = self._dry_run() if any(not result.shape for result in results) else {}
        outputs = tuple(_of_map(result.name, seen) if result.name in self._maps else _spec(result, "output", seen) for result in results)
        self.outputs = overlay(outputs, spec.outputs, "outputs")
        leading = {argument.shape[0] if argument.shape else 0 for argument in arguments} - {None}
        one_symbol = len(leading) <= 1 and not any(isinstance(dim, int) for dim in leading)
        self.batches = one_symbol and all(tensor.shape[:1] == (-1,) for tensor in (*self.inputs, *self.outputs))

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
        """What one row gives; nothing where the model takes no row of zeros."""
        row = zeros([spec for spec in self.inputs if spec.datatype != "BYTES"])
        row = {name: np.zeros([max(1, dim) for dim in self._shape(name)], array.dtype) for name, array in row.items()}
        words = {name: np.full([max(1, dim) for dim in self._shape(name)], "", object) for name in self._words}
        try:
            return dict(zip(self._names, self._run(self._names, {**row, **words}), strict=True))
        except Exception:
            return {}

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(spec.shape for spec in self.inputs if spec.name == name)


BACKEND = OnnxBackend()
