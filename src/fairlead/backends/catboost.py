"""CatBoost: `.cbm`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import catboost
import numpy as np

from fairlead.backends.base import Backend, Executable
from fairlead.backends.tabular import columns_of, predict_specs, reason, require_cpu, table, zeros
from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import Tensors, canonical, datatype_of

TYPES = frozenset({"<f4", "<f8"})
WORDS = frozenset({"BYTES", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL"})
MULTILABEL = frozenset({"MultiLogloss", "MultiCrossEntropy"})


class CatBoostBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        require_cpu(spec, "CatBoost")
        try:
            model = catboost.CatBoostClassifier().load_model(str(artefact))
            if not len(model.classes_):
                model = catboost.CatBoostRegressor().load_model(str(artefact))
            if not model.tree_count_:
                raise LoadError(f"{artefact.name} is a CatBoost model without trees")
        except (catboost.CatBoostError, UnicodeDecodeError) as error:
            raise LoadError(f"{artefact.name} is not a whole CatBoost model ({reason(error)})") from error
        return CatBoostExecutable(model, spec, threads)


class CatBoostExecutable(Executable):
    platform = "catboost"
    shareable = True

    def __init__(self, model: Any, spec: ModelSpec, threads: int) -> None:
        self._model, self._threads = model, threads
        if model.get_embedding_feature_indices():
            raise LoadError("the CatBoost model has embedding features, which are not supported here; serve it as a Python model")
        names, words = model.feature_names_, {*model.get_cat_feature_indices(), *model.get_text_feature_indices()}
        self._pool: Callable[[Tensors], Any]
        if words:
            self.inputs = _mixed(spec, names, words)
            groups = {"cat_features": model.get_cat_feature_indices(), "text_features": model.get_text_feature_indices()}
            self._pool = lambda inputs: catboost.Pool(_rows(self.inputs, inputs), thread_count=threads, **groups)
            self.example = zeros([column for column in self.inputs if column.datatype != "BYTES"])
            self.example |= {column.name: canonical([""]) for column in self.inputs if column.datatype == "BYTES"}
        else:
            features = table(spec, len(names), names)
            self.inputs, matrix = features.inputs, features.matrix(TYPES, other=np.float64)
            self._pool = lambda inputs: catboost.Pool(matrix(inputs), thread_count=threads)
            self.example = zeros(self.inputs)
        self._classes: np.ndarray = canonical(model.classes_) if len(model.classes_) else np.empty(0)
        self._infer = self._numbers
        if not len(self._classes):
            seen = self._numbers(self.example, None)["predict"]
            self.outputs = predict_specs(spec, "FP64", None, targets=seen.shape[1] if seen.ndim == 2 else 0)
            return
        scores = model.predict(self._pool(self.example), prediction_type="Probability", thread_count=threads)
        if model.get_all_params().get("loss_function") in MULTILABEL:
            self._infer = self._multilabel
            self.outputs = predict_specs(spec, "INT64", "FP64", range(scores.shape[1]), targets=scores.shape[1])
            return
        self._infer = self._labels
        self._threshold = model.get_probability_threshold() if len(self._classes) == 2 else 0.0
        self.outputs = predict_specs(spec, cast(Datatype, datatype_of(self._classes)), "FP64", self._classes.tolist())

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self._infer(inputs, outputs)

    def _numbers(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return {"predict": self._model.predict(self._pool(inputs), thread_count=self._threads)}

    def _labels(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        scores = self._model.predict(self._pool(inputs), prediction_type="Probability", thread_count=self._threads)
        result: Tensors = {"predict_proba": scores}
        if outputs is None or "predict" in outputs:
            # one pass over the trees for both; the label is what CatBoost would say
            best = scores.argmax(axis=1) if len(self._classes) > 2 else (scores[:, 1] > self._threshold).astype(np.intp)
            result["predict"] = self._classes[best]
        return result

    def _multilabel(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        scores = self._model.predict(self._pool(inputs), prediction_type="Probability", thread_count=self._threads)
        return {"predict": (scores > 0.5).astype(np.int64), "predict_proba": scores}


def _mixed(spec: ModelSpec, names: list[str], words: set[int]) -> tuple[TensorSpec, ...]:
    """One column per feature, because words and numbers do not fit in one tensor."""
    detected = tuple(TensorSpec(name=name, datatype="BYTES" if i in words else "FP32", shape=(-1,)) for i, name in enumerate(names))
    if not spec.inputs:
        return detected
    columns = columns_of(spec.inputs, names, detected)
    for column, own in zip(columns, detected, strict=True):
        if own.datatype != "BYTES" and column.datatype == "BYTES":
            raise LoadError(f"`inputs` declares {column.name!r} as BYTES, but it is a number to the model")
        if own.datatype == "BYTES" and column.datatype not in WORDS:
            raise LoadError(
                f"`inputs` declares {column.name!r} as {column.datatype}, but it is a category or text: declare BYTES or an integer"
            )
    return columns


def _rows(columns: tuple[TensorSpec, ...], inputs: Tensors) -> np.ndarray:
    table = np.empty((len(inputs[columns[0].name]), len(columns)), dtype=object)
    for i, column in enumerate(columns):
        array = inputs[column.name].reshape(-1)
        table[:, i] = [word.decode(errors="replace") for word in array] if column.datatype == "BYTES" else array
    return table


BACKEND = CatBoostBackend()
