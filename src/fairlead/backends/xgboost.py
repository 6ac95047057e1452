"""XGBoost: `.ubj` and `.json`."""

import ctypes
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xgboost

from fairlead.backends.base import Backend, Executable
from fairlead.backends.rehearsal import rehearse
from fairlead.backends.tabular import predict_specs, reason, table, zeros
from fairlead.core.errors import LoadError
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import Tensors

Predict = Callable[[np.ndarray], np.ndarray]
TYPES = frozenset({"<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"})


class XGBoostBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        device = spec.instances.device
        if device != "cpu" and not xgboost.build_info()["USE_CUDA"]:
            raise LoadError(f"this XGBoost is built without CUDA, so `device: {device}` is not possible: pip install xgboost")
        rehearse(xgboost.core._LIB, artefact, "XGBoost")
        try:
            booster = xgboost.Booster({"nthread": threads, "device": device}, model_file=artefact)
            config = json.loads(booster.save_config())["learner"]
            names = booster.feature_names
        except (xgboost.core.XGBoostError, ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{artefact.name} is not a whole XGBoost model ({reason(error)})") from error
        return XGBoostExecutable(booster, config, names, spec)


class XGBoostExecutable(Executable):
    platform = "xgboost"
    shareable = True

    def __init__(self, booster: Any, config: dict[str, Any], names: list[str] | None, spec: ModelSpec) -> None:
        objective = config["objective"]["name"]
        num_classes = int(config["learner_model_param"]["num_class"])
        features = table(spec, booster.num_features(), names)
        self.inputs = features.inputs
        self._matrix = features.matrix(TYPES)
        self.example = zeros(self.inputs)
        rows = self._matrix(self.example)
        self._predict = _fastest(booster, rows.dtype, spec.instances.device)
        try:
            seen = self._predict(rows)
        except (xgboost.core.XGBoostError, ValueError) as error:
            raise LoadError(f"the XGBoost model fails on a row of zeros ({reason(error)})") from error
        self._scores: Callable[[np.ndarray, frozenset[str] | None], Tensors] = _numbers
        if objective == "binary:logistic" and seen.ndim == 2:
            num_labels = seen.shape[1]
            self._scores, self.outputs = _multilabel, predict_specs(spec, "INT64", "FP32", range(num_labels), targets=num_labels)
        elif objective == "binary:logistic":
            self._scores, self.outputs = _binary, predict_specs(spec, "INT64", "FP32", range(2))
        elif objective == "multi:softprob":
            self._scores, self.outputs = _multiclass, predict_specs(spec, "INT64", "FP32", range(num_classes))
        elif objective in ("multi:softmax", "binary:hinge"):
            self._scores, self.outputs = _labels, predict_specs(spec, "INT64", None)
        else:
            self.outputs = predict_specs(spec, "FP32", None, targets=seen.shape[1] if seen.ndim == 2 else 0)

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self._scores(self._predict(self._matrix(inputs)), outputs)


def _binary(scores: np.ndarray, outputs: frozenset[str] | None) -> Tensors:
    result: Tensors = {}
    if outputs is None or "predict" in outputs:
        result["predict"] = (scores > 0.5).astype(np.int64)
    if outputs is None or "predict_proba" in outputs:
        both = result["predict_proba"] = np.empty((len(scores), 2), np.float32)
        np.subtract(1.0, scores, out=both[:, 0])
        both[:, 1] = scores
    return result


def _multiclass(scores: np.ndarray, outputs: frozenset[str] | None) -> Tensors:
    result: Tensors = {"predict_proba": scores}
    if outputs is None or "predict" in outputs:
        result["predict"] = scores.argmax(axis=1)
    return result


def _multilabel(scores: np.ndarray, outputs: frozenset[str] | None) -> Tensors:
    return {"predict": (scores > 0.5).astype(np.int64), "predict_proba": scores}


def _labels(scores: np.ndarray, outputs: frozenset[str] | None) -> Tensors:
    return {"predict": scores.astype(np.int64)}


def _numbers(scores: np.ndarray, outputs: frozenset[str] | None) -> Tensors:
    return {"predict": scores}


def _fastest(booster: Any, dtype: np.dtype, device: str) -> Predict:
    """The C function where it is there and agrees bit for bit with the public one, which costs 200 us a call more."""
    stop = int(booster.attr("best_iteration") or -1) + 1  # after early stopping, as XGBoost's scikit-learn API

    def inplace(rows: np.ndarray) -> np.ndarray:
        scores: np.ndarray = booster.inplace_predict(rows, iteration_range=(0, stop))
        return scores

    def through_dmatrix(rows: np.ndarray) -> np.ndarray:
        scores: np.ndarray = booster.predict(xgboost.DMatrix(rows), iteration_range=(0, stop))
        return scores

    rows = np.random.default_rng(0).standard_normal((5, booster.num_features())).astype(dtype)
    if dtype.kind == "f":
        rows[1, ::2] = np.nan
    try:
        want = inplace(rows)
    except xgboost.core.XGBoostError:  # gblinear
        return through_dmatrix
    if device != "cpu":
        return inplace
    try:
        direct = _CFunction(booster, stop)
        same = (
            all(np.array_equal(direct(part), inplace(part), equal_nan=True) for part in (rows, rows[:1]))
            and direct(rows).dtype == want.dtype
        )
    except (AttributeError, RuntimeError, TypeError, ctypes.ArgumentError):
        return inplace
    return direct if same else inplace


class _CFunction:
    """XGBoosterPredictFromDense on the array's own memory. Safe in several threads: each has a proxy of its own."""

    def __init__(self, booster: Any, stop: int) -> None:
        self.booster = booster  # keeps the handle alive
        self.lib = xgboost.core._LIB
        self.call = self.lib.XGBoosterPredictFromDense
        self.config = b'{"type":0,"training":false,"iteration_begin":0,"iteration_end":%d,"strict_shape":true,"missing":NaN}' % stop
        self.local = threading.local()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if not rows.flags.c_contiguous:
            rows = np.ascontiguousarray(rows)
        try:
            proxy = self.local.proxy
        except AttributeError:
            proxy = self.local.proxy = _Proxy(self.lib)
        num_rows, num_columns = rows.shape
        layout = b'{"data":[%d,true],"shape":[%d,%d],"typestr":"%s","version":3}' % (
            rows.__array_interface__["data"][0],
            num_rows,
            num_columns,
            rows.dtype.str.encode(),
        )
        if self.call(self.booster.handle, layout, self.config, proxy.handle, *proxy.results):
            raise RuntimeError(self.lib.XGBGetLastError().decode().strip().splitlines()[0])
        # strict_shape: [rows, scores] always
        num_scores = proxy.shape[1]
        scores = np.empty(num_rows if num_scores == 1 else (num_rows, num_scores), np.float32)
        ctypes.memmove(scores.__array_interface__["data"][0], proxy.scores, scores.nbytes)
        return scores


class _Proxy:
    """A DMatrix without data, and where the results go. Made once per thread: making one reads the CPU quota from /sys."""

    def __init__(self, lib: Any) -> None:
        self.handle = ctypes.c_void_p()
        if lib.XGProxyDMatrixCreate(ctypes.byref(self.handle)):
            raise RuntimeError(lib.XGBGetLastError().decode())
        weakref.finalize(self, lib.XGDMatrixFree, self.handle).atexit = False
        self.shape, self.dim, self.scores = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64(), ctypes.POINTER(ctypes.c_float)()
        self.results = (ctypes.byref(self.shape), ctypes.byref(self.dim), ctypes.byref(self.scores))


BACKEND = XGBoostBackend()
