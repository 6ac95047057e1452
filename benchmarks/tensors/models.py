"""The four workloads: what is served, one request's input, and how the answer is computed.

w1  XGBoost classifier, 200 trees of depth 6, 50 float32 features
w2  the same model exported to ONNX, on ONNX Runtime
w3  identity on 16 float32: nothing but the server's own overhead
w4  a small ONNX CNN on a 224x224x3 float32 image: payload bandwidth
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

MODELS = Path(__file__).parent / "models"
TITLES = {"w1": "XGBoost row", "w2": "XGBoost as ONNX", "w3": "identity 1x16", "w4": "224x224x3 image into a CNN"}
SHAPES = {"w1": (50,), "w2": (50,), "w3": (16,), "w4": (224, 224, 3)}
COLUMNS = {"w1": 1, "w2": 2, "w3": 16, "w4": 10}
"""Of one row of the answer."""

Predictor = Callable[[np.ndarray], np.ndarray]


def row(workload: str) -> np.ndarray:
    """One request's input: a batch of one, the same values every time, short when written as JSON."""
    values = np.random.default_rng(7).standard_normal((1, *SHAPES[workload]))
    return (values.clip(-3, 3) * 0.25).round(4).astype(np.float32)


def predictor(workload: str, threads: int = 1) -> Predictor:
    """The bare model: from a float32 batch to a float32 batch of answers."""
    if workload == "w1":
        import xgboost

        booster = xgboost.Booster({"nthread": threads}, model_file=MODELS / "xgb.ubj")
        return lambda x: booster.inplace_predict(x).reshape(-1, 1)
    if workload == "w3":
        return lambda x: x

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        MODELS / ("xgb.onnx" if workload == "w2" else "cnn.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(["output"], {"input": x})[0]
