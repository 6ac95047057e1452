"""scikit-learn: skops; joblib and pickle only when the operator vouches for them.

Nearly all of it releases the GIL while it predicts. Gradient boosting (not the histogram one) holds it, for 0.3 ms
a batch of 64: a model of many more trees is better served with `isolation: process`.
"""

import importlib
import importlib.util
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import joblib
import numpy as np
import skops.io
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.exceptions import NotFittedError

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import lines
from fairlead.backends.tabular import columns_of, is_columns, predict_specs, reason, require_cpu, table, zeros
from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors, canonical, datatype_of, object_array

TYPES = frozenset({"<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "|b1"})


class SklearnBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        require_cpu(spec, "scikit-learn")
        # served as arrays by design; a model fitted on a DataFrame would say so on every request
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        model = _skops(artefact, spec) if zipfile.is_zipfile(artefact) else _pickled(artefact, spec)
        if not callable(getattr(model, "predict", None)):
            raise LoadError(f"{artefact.name} holds a {type(model).__name__}, which has no `predict`")
        if callable(getattr(model, "set_params", None)):
            # for batches of this size a pool of joblib's costs three times what it computes (a forest of 100: 6 ms, with two jobs 18)
            model.set_params(**{key: 1 for key in model.get_params() if key.rpartition("__")[2] == "n_jobs"})
        return SklearnExecutable(model, spec)


def _skops(artefact: Path, spec: ModelSpec) -> Any:
    try:
        types = skops.io.get_untrusted_types(file=artefact)
        unknown = [name for name in types if not _is_sklearn_class(name)]
        if unknown and not spec.trusted:
            raise LoadError(
                f"{artefact.name} holds types that are not known to be safe: {', '.join(unknown)};"
                " if you trust where it comes from, write in model.yaml:\ntrusted: true"
            )
        return skops.io.load(artefact, trusted=types)
    except LoadError:
        raise
    except Exception as error:  # whatever a damaged archive, or a class of another version, brings about
        raise LoadError(f"{artefact.name} cannot be loaded by skops ({reason(error)})") from error


def _is_sklearn_class(name: str) -> bool:
    """skops also doubts what every forest is made of; scikit-learn's own classes hold numbers, its functions may do more."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("sklearn."):
        return False
    found = getattr(importlib.import_module(module), attribute, None)
    return isinstance(found, type) and found.__module__.startswith("sklearn.")


def _pickled(artefact: Path, spec: ModelSpec) -> Any:
    if artefact.suffix == ".skops":
        raise LoadError(f"{artefact.name} is truncated or not a skops archive")
    if not spec.trusted:
        raise LoadError(
            f"{artefact.name} is a pickle, and loading one runs whatever code is in it; save the model with skops.io.dump instead,"
            " or if you trust where it comes from, write in model.yaml:\ntrusted: true"
        )
    try:
        return joblib.load(artefact)
    except ModuleNotFoundError as error:
        raise LoadError(f"{artefact.name} needs the module {error.name!r}, which is not installed") from error
    except (Exception, pickle.UnpicklingError) as error:  # a pickle runs code: anything may be raised
        raise LoadError(f"{artefact.name} is damaged, or of another version of its library ({reason(error)})") from error


class SklearnExecutable(Executable):
    platform = "sklearn"
    shareable = True

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self._model = model
        self._features, self.inputs, self.example = _learn(model, spec)
        rows = self._features(self.example)
        try:
            seen = _canonical(model.predict(rows))
            self._classifies = callable(getattr(model, "predict_proba", None))
            scores = model.predict_proba(rows) if self._classifies else None
        except NotFittedError as error:
            raise LoadError(f"the {type(model).__name__} is not fitted") from error
        except Exception as error:
            raise LoadError(f"the {type(model).__name__} fails on its first row ({reason(error)})") from error
        if not isinstance(scores, np.ndarray) or scores.ndim != 2:
            self._classifies = False  # of several targets at once: a list of arrays
            scores = None
        classes: Any = getattr(model, "classes_", ()) if scores is not None else ()
        if scores is not None and len(classes) != scores.shape[1]:
            classes = range(scores.shape[1])
        targets = seen.shape[1] if seen.ndim == 2 else 0
        proba = cast(Datatype, datatype_of(scores)) if scores is not None else None
        self.outputs = predict_specs(spec, cast(Datatype, datatype_of(seen)), proba, list(classes), targets=targets)
        final = model.steps[-1][1] if hasattr(model, "steps") else model
        # a forest's label is by definition its most probable class: the trees are walked once for both
        self._walk_once = isinstance(final, (RandomForestClassifier, ExtraTreesClassifier)) and seen.ndim == 1
        self._labels = _canonical(np.asarray(classes)) if self._walk_once else np.empty(0)

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        rows = self._features(inputs)
        result: Tensors = {}
        if self._classifies and (outputs is None or "predict_proba" in outputs):
            result["predict_proba"] = np.ascontiguousarray(self._model.predict_proba(rows))
        if outputs is None or "predict" in outputs:
            if self._walk_once and "predict_proba" in result:
                result["predict"] = self._labels[result["predict_proba"].argmax(axis=1)]
            else:
                result["predict"] = _canonical(self._model.predict(rows))
        return result


Features = Callable[[Tensors], Any]
Learned = tuple[Features, tuple[TensorSpec, ...], Tensors]


def _learn(model: Any, spec: ModelSpec) -> Learned:
    """How the features arrive, the input specs, and one row that works. Raises LoadError with the lines to write."""
    num_features, names = getattr(model, "n_features_in_", None), getattr(model, "feature_names_in_", None)
    names = None if names is None else [str(name) for name in names]
    if spec.inputs and any(declared.datatype == "BYTES" for declared in spec.inputs):
        if names is None and len(spec.inputs) == 1 and len(spec.inputs[0].shape) == 1:
            return _texts(spec.inputs[0])
        if names is None:
            raise LoadError(
                "`inputs` declares BYTES: a scikit-learn model takes one input of texts, shape [-1], or the columns of the DataFrame that it was fitted on"
            )
    elif num_features is None:
        if not spec.inputs:
            if _reads_texts(model):
                return _texts(TensorSpec(name="input", datatype="BYTES", shape=(-1,)))
            raise LoadError(
                f"the {type(model).__name__} does not say how many features it takes; write in model.yaml, with your own number for 4:\n"
                f"{lines('inputs', [TensorSpec(name='input', datatype='FP64', shape=(-1, 4))])}"
            )
        num_features = len(spec.inputs) if is_columns(spec.inputs) else spec.inputs[0].shape[-1]
    if names is not None and spec.inputs and is_columns(spec.inputs):
        return _frame(columns_of(spec.inputs, names, _guess(model, names)), model)
    if spec.inputs or names is None or _works(model, np.zeros((1, int(num_features or 0)))):
        features = table(spec, int(num_features or 0), names, "FP64")
        return features.matrix(TYPES, other=np.float32), features.inputs, zeros(features.inputs)
    guessed = _guess(model, names)
    if importlib.util.find_spec("pandas") is None:
        raise LoadError(f"the {type(model).__name__} takes a DataFrame, which needs pandas: pip install pandas")
    frame, inputs, example = _frame(guessed, model)
    if not _works(model, frame(example)):
        raise LoadError(
            f"the {type(model).__name__} was fitted on a DataFrame whose types it does not tell; write in model.yaml, with BYTES for columns of words:\n"
            f"{lines('inputs', guessed)}"
        )
    return frame, inputs, example


def _works(model: Any, rows: Any) -> bool:
    try:
        model.predict(rows)
    except NotFittedError:
        return True
    except Exception:
        return False
    return True


def _texts(spec: TensorSpec) -> Learned:
    return (lambda inputs: [text.decode(errors="replace") for text in inputs[spec.name]]), (spec,), {spec.name: canonical(["text"])}


def _reads_texts(model: Any) -> bool:
    first = model.steps[0][1] if hasattr(model, "steps") else model
    return callable(getattr(first, "build_analyzer", None))


def _frame(columns: tuple[TensorSpec, ...], model: Any) -> Learned:
    """One column for each feature of the DataFrame that the model was fitted on."""
    pandas = importlib.import_module("pandas")

    def frame(inputs: Tensors) -> Any:
        return pandas.DataFrame({c.name: _words(inputs[c.name]) if c.datatype == "BYTES" else inputs[c.name].reshape(-1) for c in columns})

    known = {name: values[0] for name, values in _categories(model)}
    row = {c.name: known.get(c.name, "" if c.datatype == "BYTES" else 0) for c in columns}
    dtypes = {c.name: DTYPES[c.datatype] for c in columns}
    example = {
        name: canonical([str(value)]) if dtypes[name].kind == "O" else np.array([value], dtypes[name]) for name, value in row.items()
    }
    return frame, columns, {c.name: example[c.name].reshape(1, *c.shape[1:]) for c in columns}


def _words(array: np.ndarray) -> np.ndarray:
    return object_array([word.decode(errors="replace") for word in array.reshape(-1)], (array.size,))


def _guess(model: Any, names: list[str]) -> tuple[TensorSpec, ...]:
    words = {name for name, values in _categories(model) if np.asarray(values).dtype.kind in "OUS"}
    return tuple(TensorSpec(name=name, datatype="BYTES" if name in words else "FP64", shape=(-1,)) for name in names)


def _categories(model: Any) -> Iterator[tuple[str, Any]]:
    """The columns whose categories an encoder inside the model knows."""
    for step in [model, *(step for _, step in getattr(model, "steps", ()))]:
        for _, encoder, columns in getattr(step, "transformers_", ()):
            last = encoder.steps[-1][1] if hasattr(encoder, "steps") else encoder
            names = [columns] if isinstance(columns, str) else list(columns) if isinstance(columns, (list, tuple, np.ndarray)) else []
            for name, values in zip(names, getattr(last, "categories_", ()), strict=False):
                if isinstance(name, str) and len(values):
                    yield name, values


def _canonical(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return canonical(
        array if array.dtype.kind != "O" else object_array([v if isinstance(v, bytes) else str(v) for v in array.reshape(-1)], array.shape)
    )


BACKEND = SklearnBackend()
