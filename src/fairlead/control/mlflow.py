"""MLflow's model folders: which of our backends serves what its `MLmodel` describes, and how. MLflow itself is not needed to read one."""

import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from msgspec import Struct, field

from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec

MLMODEL = "MLmodel"
FLAVOURS = ("onnx", "xgboost", "lightgbm", "catboost", "sklearn", "pytorch", "transformers", "python_function")
"""Those that are served, the better ones first."""
TASKS = ("text-generation", "feature-extraction", "llm/v1/chat", "llm/v1/completions", "llm/v1/embeddings")
"""Of transformers: those that our engines answer."""
COLUMNS: dict[str, Datatype] = {
    "boolean": "BOOL",
    "integer": "INT32",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
    "binary": "BYTES",
}
TENSORS: dict[str, Datatype] = {
    "bool": "BOOL",
    **{f"int{bits}": cast(Datatype, f"INT{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": cast(Datatype, f"UINT{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": cast(Datatype, f"FP{bits}") for bits in (16, 32, 64)},
    "str": "BYTES",
    "bytes": "BYTES",
    "object": "BYTES",
}
PICKLES = (".pkl", ".pickle", ".joblib")
SUBFOLDER = "mlflow_model"
"""Where the MLflow folder lies in the version's, of a model that only MLflow can load."""
PYTHON = '''"""An MLflow model, asked as MLflow asks it."""

import mlflow.pyfunc
import numpy as np
import pandas as pd

COLUMNS = {columns!r}
OUTPUTS = {outputs!r}


class Model:
    def load(self, context):
        self.model = mlflow.pyfunc.load_model(str(context.path / "mlflow_model"))

    def infer(self, inputs):
        given = {{name: _words(array) for name, array in inputs.items()}}
        if COLUMNS:
            given = pd.DataFrame({{name: given[name].reshape(-1) for name in COLUMNS}})
        elif list(given) == ["input"]:
            given = given["input"]
        return _named(self.model.predict(given))


def _words(array):
    if array.dtype != object:
        return array
    return np.array([each.decode() if isinstance(each, bytes) else each for each in array.reshape(-1)], object).reshape(array.shape)


def _named(found):
    if isinstance(found, dict):
        return found
    if isinstance(found, pd.DataFrame) and list(OUTPUTS) != ["output"]:
        return {{str(name): found[name].to_numpy() for name in found}}
    return {{"output": found.to_numpy() if hasattr(found, "to_numpy") else np.asarray(found)}}
'''


class Signature(Struct, frozen=True):
    """Both are JSON in a string."""

    inputs: str | None = None
    outputs: str | None = None


class MLmodel(Struct, frozen=True):
    """The file of that name, as far as it matters here."""

    flavours: dict[str, dict[str, Any]] = field(name="flavors")
    signature: Signature | None = None
    run_id: str | None = None
    mlflow_version: str | None = None


class Converted(Struct, frozen=True):
    spec: ModelSpec
    files: dict[str, str]
    """Path within the version's folder → path within MLflow's."""
    made: dict[str, bytes]
    """What is not in MLflow's folder: path → content."""
    provenance: dict[str, str]
    """What `MLmodel` tells of where it comes from."""


def convert(text: str, source: str, files: Collection[str], *, flavour: str = "", trusted: bool = False) -> Converted:
    """`text`: of the MLmodel that `source` names; `flavour`: in place of the best one. Raises ConfigError, InvalidRequest."""
    found = read_yaml(text, MLmodel, source)
    own = flavour or _best(found.flavours, source)
    if own not in found.flavours or own not in FLAVOURS:
        raise InvalidRequest(f"{source} offers {', '.join(found.flavours)}, not {own!r}; served are {', '.join(FLAVOURS)}")
    told = found.flavours[own]
    spec, kept, made = _SERVED[own](found, told, frozenset(files), trusted, source)
    missing = next((path for path in kept.values() if path not in files), None) or (
        spec.file if spec.file and spec.file not in {*kept, *made} else None
    )
    if missing is not None:
        raise InvalidRequest(f"{source} names {missing!r}, which is not in its folder")
    versions = [str(value) for name, value in told.items() if name.endswith("_version") and value]
    framework = f"mlflow {found.mlflow_version or ''}".strip() if own == "python_function" else " ".join([own, *versions[:1]])
    provenance = {"framework": framework, "mlflow_run": found.run_id or ""}
    return Converted(spec, kept, made, {name: value for name, value in provenance.items() if value})


def _best(flavours: Mapping[str, Mapping[str, Any]], source: str) -> str:
    for name in FLAVOURS:
        if name in flavours:
            # code of the model's own is what MLflow puts on the path, and nobody else
            return "python_function" if flavours[name].get("code") and "python_function" in flavours else name
    raise InvalidRequest(f"{source} offers {', '.join(flavours) or 'no flavour'}; served are {', '.join(FLAVOURS)}")


Parts = tuple[ModelSpec, dict[str, str], dict[str, bytes]]


def _same(files: Collection[str]) -> dict[str, str]:
    return {path: path for path in files}


def _onnx(_: MLmodel, told: Mapping[str, Any], files: Collection[str], __: bool, source: str) -> Parts:
    return ModelSpec(backend="onnx", file=_file(told, "data", source)), _same(files), {}


def _xgboost(found: MLmodel, told: Mapping[str, Any], files: Collection[str], trusted: bool, source: str) -> Parts:
    return _tree("xgboost", found, told, files, trusted, source)


def _lightgbm(found: MLmodel, told: Mapping[str, Any], files: Collection[str], trusted: bool, source: str) -> Parts:
    file = _file(told, "data", source)
    if file.endswith((".skops", *PICKLES)):
        return _pickled(found, file, files, trusted, source)
    return _tree("lightgbm", found, told, files, trusted, source)


def _catboost(found: MLmodel, told: Mapping[str, Any], files: Collection[str], trusted: bool, source: str) -> Parts:
    if (form := told.get("save_format", "cbm")) != "cbm":
        raise InvalidRequest(f"{source} keeps its CatBoost model as {form}; save it as cbm (`save_model(..., format='cbm')`)")
    return _tree("catboost", found, told, files, trusted, source)


def _tree(backend: str, found: MLmodel, told: Mapping[str, Any], files: Collection[str], _: bool, source: str) -> Parts:
    return ModelSpec(backend=backend, file=_file(told, "data", source), inputs=_features(found)), _same(files), {}


def _sklearn(found: MLmodel, told: Mapping[str, Any], files: Collection[str], trusted: bool, source: str) -> Parts:
    return _pickled(found, _file(told, "pickled_model", source), files, trusted, source, safe=(".skops",))


def _pickled(found: MLmodel, file: str, files: Collection[str], trusted: bool, source: str, safe: tuple[str, ...] = ()) -> Parts:
    if not file.endswith(safe):
        _must_be_trusted(trusted, f"{source}: {file}", "holds objects of a library")
    return ModelSpec(backend="sklearn", file=file, inputs=_features(found), trusted=trusted), _same(files), {}


def _pytorch(found: MLmodel, told: Mapping[str, Any], files: Collection[str], _: bool, source: str) -> Parts:
    folder = _file(told, "model_data", source)
    file = next((path for path in (f"{folder}/model.pt2", f"{folder}/model.pth") if path in files), f"{folder}/model.pth")
    scripted = file.endswith(".pth")  # an exported program says what it takes
    inputs = _declared(found.signature.inputs if found.signature else None, "input") if scripted else ()
    return ModelSpec(file=file, inputs=inputs), _same(files), {}


def _transformers(_: MLmodel, told: Mapping[str, Any], files: Collection[str], __: bool, source: str) -> Parts:
    if told.get("task") not in TASKS:
        raise InvalidRequest(
            f"{source} is for the task {told.get('task')!r}; served are {', '.join(TASKS)}, others with the flavour python_function"
        )
    folder = _file(told, "model_binary", source, "its weights were not saved with it (`save_pretrained=True`)")
    kept: dict[str, str] = {}
    for place in (folder, "components/tokenizer"):
        kept |= {path.removeprefix(f"{place}/"): path for path in files if path.startswith(f"{place}/")}
    return ModelSpec(backend="llm"), {**kept, MLMODEL: MLMODEL}, {}


def _python_function(found: MLmodel, _: Mapping[str, Any], files: Collection[str], trusted: bool, source: str) -> Parts:
    _must_be_trusted(trusted, source, "is loaded by MLflow, which runs what code is in it")
    if importlib.util.find_spec("mlflow") is None:
        raise InvalidRequest(f"{source} can only be loaded by MLflow, which is not installed: pip install mlflow")
    signature = found.signature
    if signature is None or not signature.inputs or not signature.outputs:
        raise InvalidRequest(
            f"{source} has no signature of its inputs and outputs: save it with `signature=infer_signature(inputs, outputs)`"
        )
    inputs, outputs = _declared(signature.inputs, "input"), _declared(signature.outputs, "output")
    if not inputs or not outputs:
        raise InvalidRequest(f"{source} has a signature of types that have no form in KServe's protocol")
    columns = [each.name for each in inputs] if _is_columns(signature.inputs) else []
    code = PYTHON.format(columns=columns, outputs=[each.name for each in outputs])
    kept = {f"{SUBFOLDER}/{path}": path for path in files}
    return ModelSpec(backend="python", inputs=inputs, outputs=outputs), kept, {"model.py": code.encode()}


_SERVED: dict[str, Callable[[MLmodel, Mapping[str, Any], Collection[str], bool, str], Parts]] = {
    "onnx": _onnx,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "catboost": _catboost,
    "sklearn": _sklearn,
    "pytorch": _pytorch,
    "transformers": _transformers,
    "python_function": _python_function,
}


def _file(told: Mapping[str, Any], key: str, source: str, otherwise: str = "") -> str:
    """Raises ConfigError."""
    value = told.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{source}: the flavour has no `{key}`" + (f": {otherwise}" if otherwise else ""))
    return value.rstrip("/")


def _must_be_trusted(trusted: bool, what: str, why: str) -> None:
    """Raises InvalidRequest."""
    if not trusted:
        raise InvalidRequest(f"{what} {why}, so that loading it may run anything: if you trust where it comes from, say so (--trusted)")


# Signatures


def _features(found: MLmodel) -> tuple[TensorSpec, ...]:
    """Of a model of rows. What its library has no words for, the artefact tells itself."""
    return _declared(found.signature.inputs if found.signature else None, "input")


def _declared(text: str | None, unnamed: str) -> tuple[TensorSpec, ...]:
    """() where there is none, or where a type has no datatype of ours."""
    specs = []
    entries = _entries(text)
    for position, entry in enumerate(entries):
        name = entry.get("name") or (unnamed if len(entries) == 1 else f"{unnamed}{position}")
        if entry.get("type") == "tensor":
            tensor = entry.get("tensor-spec", {})
            datatype, shape = TENSORS.get(tensor.get("dtype", "")), tuple(tensor.get("shape", (-1,)))
        else:
            datatype, shape = COLUMNS.get(str(entry.get("type"))), (-1,)
        if datatype is None:
            return ()
        specs.append(TensorSpec(name=str(name), datatype=datatype, shape=shape))
    return tuple(specs)


def _is_columns(text: str | None) -> bool:
    return all(entry.get("type") != "tensor" for entry in _entries(text))


def _entries(text: str | None) -> list[dict[str, Any]]:
    """Raises ConfigError."""
    try:
        found = json.loads(text or "[]")
    except ValueError as error:
        raise ConfigError(f"the signature in MLmodel is not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ConfigError("the signature in MLmodel is no list of columns or tensors")
    return found
