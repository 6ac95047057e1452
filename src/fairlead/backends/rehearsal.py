"""Load an artefact in a process of its own first: some libraries end the process that gives them a damaged one."""

import ctypes
import subprocess
import sys
from pathlib import Path

from fairlead.core.errors import LoadError

SECONDS_PER_BYTE = 1 / 4_000_000
"""Far slower than any library reads."""


def rehearse(library: ctypes.CDLL, artefact: Path, kind: str) -> None:
    """Raises LoadError where `library` refuses the artefact, or crashes or hangs on it or on a few rows.

    The process is a bare interpreter that knows nothing but the shared library: 40 to 80 ms.
    """
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, kind, library._name, str(artefact)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=30 + artefact.stat().st_size * SECONDS_PER_BYTE
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"{artefact.name} is damaged: {kind} hangs on it") from None
    if ended.returncode < 0:
        raise LoadError(f"{artefact.name} is not a whole model, or damaged: {kind} crashes on it")
    if ended.returncode > 0:
        said = (ended.stdout or ended.stderr).strip().splitlines()
        raise LoadError(f"{artefact.name} is not a whole model, or damaged: {said[-1] if said else kind + ' refuses it'}")


_PROGRAM = """
import ctypes, random, sys

kind, path, artefact = sys.argv[1:]
library = ctypes.CDLL(path)
made, count, out = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.byref

def check(failed, last_error):
    if failed:
        last_error.restype = ctypes.c_char_p
        sys.exit(print(last_error().decode(errors="replace").strip().splitlines()[0]) or 1)

def some_rows(type_, features):
    numbers = [0.0] * features + [random.gauss(0, scale) for scale in (1, 100) for _ in range(8 * features)]
    return (type_ * len(numbers))(*numbers)

if kind == "LightGBM":
    ok = lambda failed: check(failed, library.LGBM_GetLastError)
    length, trees = ctypes.c_int64(), ctypes.c_int()
    ok(library.LGBM_BoosterCreateFromModelfile(artefact.encode(), out(trees), out(made)))
    features, scores = ctypes.c_int(), ctypes.c_int()
    ok(library.LGBM_BoosterGetNumFeature(made, out(features)))
    ok(library.LGBM_BoosterNumModelPerIteration(made, out(scores)))
    rows, results = some_rows(ctypes.c_double, features.value), (ctypes.c_double * (17 * scores.value))()
    ok(library.LGBM_BoosterPredictForMat(made, rows, 1, 17, features, 1, 0, 0, -1, b"num_threads=1", out(length), results))
else:
    ok = lambda failed: check(failed, library.XGBGetLastError)
    ok(library.XGBoosterCreate(None, ctypes.c_uint64(0), out(made)))
    ok(library.XGBoosterSetParam(made, b"nthread", b"1"))
    ok(library.XGBoosterLoadModel(made, artefact.encode()))
    ok(library.XGBoosterGetNumFeature(made, out(count)))
    rows, data = some_rows(ctypes.c_float, count.value), ctypes.c_void_p()
    ok(library.XGDMatrixCreateFromMat(rows, ctypes.c_uint64(17), count, ctypes.c_float(float("nan")), out(data)))
    config = b'{"type":0,"training":false,"iteration_begin":0,"iteration_end":0,"strict_shape":true}'
    shape, results = ctypes.c_void_p(), ctypes.c_void_p()
    ok(library.XGBoosterPredictFromDMatrix(made, data, config, out(shape), out(count), out(results)))
"""
