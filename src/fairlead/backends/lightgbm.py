"""LightGBM: `.txt`."""

import ctypes
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from fairlead.backends.base import Backend, Executable
from fairlead.backends.rehearsal import rehearse
from fairlead.backends.tabular import predict_specs, reason, require_cpu, table, zeros
from fairlead.core.errors import LoadError
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import Tensors

Predict = Callable[[np.ndarray], np.ndarray]
TYPES = frozenset({"<f4", "<f8"})


class LightGBMBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        require_cpu(spec, "LightGBM")
        rehearse(lightgbm.basic._LIB, artefact, "LightGBM")
        try:
            booster = lightgbm.Booster(model_file=artefact)
            names = booster.feature_name()
        except (lightgbm.basic.LightGBMError, ValueError) as error:
            raise LoadError(f"{artefact.name} is not a whole LightGBM model ({reason(error)})") from error
        return LightGBMExecutable(booster, _objective(artefact), names, spec, threads)


class LightGBMExecutable(Executable):
    platform = "lightgbm"
    shareable = True

    def __init__(self, booster: Any, objective: str, names: list[str], spec: ModelSpec, threads: int) -> None:
        features = table(spec, booster.num_feature(), names)
        self.inputs = features.inputs
        self._matrix = features.matrix(TYPES, other=np.float64)
        self.example = zeros(self.inputs)
        self._predict = _fastest(booster, threads, self._matrix(self.example).dtype)
        num_scores = booster.num_model_per_iteration()
        self._objective = objective
        match objective:
            case "binary":
                self.outputs = predict_specs(spec, "INT64", "FP64", range(2))
            case "multiclass" | "multiclassova":
                self.outputs = predict_specs(spec, "INT64", "FP64", range(num_scores))
            case _:
                self.outputs = predict_specs(spec, "FP64", None, targets=num_scores if num_scores > 1 else 0)

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        scores = self._predict(self._matrix(inputs))
        match self._objective:
            case "binary":
                result: Tensors = {}
                if outputs is None or "predict" in outputs:
                    result["predict"] = (scores > 0.5).astype(np.int64)
                if outputs is None or "predict_proba" in outputs:
                    both = result["predict_proba"] = np.empty((len(scores), 2))
                    np.subtract(1.0, scores, out=both[:, 0])
                    both[:, 1] = scores
                return result
            case "multiclass" | "multiclassova":
                return {"predict": scores.argmax(axis=1), "predict_proba": scores}
        return {"predict": scores}


def _objective(artefact: Path) -> str:
    """From the text's head, because the library does not tell."""
    with artefact.open("rb") as lines:
        for line in lines:
            if line.startswith(b"objective="):
                return line.split(b"=")[1].split()[0].decode()
            if line.startswith(b"Tree="):
                break
    return ""


def _fastest(booster: Any, threads: int, dtype: np.dtype) -> Predict:
    """The C functions where they are there and agree bit for bit with the public one, which costs 30 us a call more."""

    def public(rows: np.ndarray) -> np.ndarray:
        scores: np.ndarray = booster.predict(rows, num_threads=threads)
        return scores

    rows = np.random.default_rng(0).standard_normal((5, booster.num_feature())).astype(dtype)
    rows[1, ::2] = np.nan
    try:
        direct = _CFunctions(booster, threads, dtype)
        same = all(np.array_equal(direct(part), public(part)) for part in (rows, rows[:1]))
    except (AttributeError, RuntimeError, TypeError, ctypes.ArgumentError):
        return public
    return direct if same else public


class _CFunctions:
    """LGBM_BoosterPredictForMat, and its faster form for one row, on the array's own memory. Safe in several threads."""

    def __init__(self, booster: Any, threads: int, dtype: np.dtype) -> None:
        self.booster = booster  # keeps the handle alive
        self.lib = lightgbm.basic._LIB
        self.type = ctypes.c_int(int(dtype == np.float64))
        self.num_columns = booster.num_feature()
        self.num_scores = booster.num_model_per_iteration()
        self.parameters = b"num_threads=%d" % threads
        self.local = threading.local()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if not rows.flags.c_contiguous:
            rows = np.ascontiguousarray(rows)
        num_rows = len(rows)
        scores = np.empty(num_rows if self.num_scores == 1 else (num_rows, self.num_scores))
        source, target = ctypes.c_void_p(rows.__array_interface__["data"][0]), ctypes.c_void_p(scores.__array_interface__["data"][0])
        length = ctypes.c_int64()
        if num_rows == 1:
            try:
                row = self.local.row
            except AttributeError:
                row = self.local.row = _OneRow(self)
            failed = self.lib.LGBM_BoosterPredictForMatSingleRowFast(row.handle, source, ctypes.byref(length), target)
        else:
            failed = self.lib.LGBM_BoosterPredictForMat(
                self.booster._handle,
                source,
                self.type,
                ctypes.c_int32(num_rows),
                ctypes.c_int32(self.num_columns),
                ctypes.c_int(1),  # row major
                ctypes.c_int(0),  # the objective's output
                ctypes.c_int(0),  # from the first
                ctypes.c_int(-1),  # to the last iteration
                self.parameters,
                ctypes.byref(length),
                target,
            )
        if failed or length.value != scores.size:
            raise RuntimeError(self.lib.LGBM_GetLastError().decode())
        return scores


class _OneRow:
    """What LightGBM keeps between calls with one row; one per thread."""

    def __init__(self, functions: _CFunctions) -> None:
        self.handle = ctypes.c_void_p()
        lib = functions.lib
        if lib.LGBM_BoosterPredictForMatSingleRowFastInit(
            functions.booster._handle,
            ctypes.c_int(0),
            ctypes.c_int(0),
            ctypes.c_int(-1),
            functions.type,
            ctypes.c_int32(functions.num_columns),
            functions.parameters,
            ctypes.byref(self.handle),
        ):
            raise RuntimeError(lib.LGBM_GetLastError().decode())
        weakref.finalize(self, lib.LGBM_FastConfigFree, self.handle).atexit = False


BACKEND = LightGBMBackend()
