"""Train and export the models that the workloads serve (base environment)."""

import numpy as np
import onnx
import xgboost
from models import MODELS
from onnx import TensorProto, helper, numpy_helper
from onnxmltools import convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType
from sklearn.datasets import make_classification


def save_trees() -> None:
    x, y = make_classification(20_000, 50, n_informative=25, random_state=0)
    model = xgboost.XGBClassifier(n_estimators=200, max_depth=6, learning_rate=0.1, n_jobs=2, random_state=0)
    model.fit(x.astype(np.float32), y)
    for suffix in ("ubj", "json"):
        model.save_model(MODELS / f"xgb.{suffix}")
    exported = convert_xgboost(model, initial_types=[("input", FloatTensorType([None, 50]))], target_opset=15)
    # One output with the name that every peer's request asks for; the label is left out.
    scores = exported.graph.output[-1].name
    for node in exported.graph.node:
        node.output[:] = ["output" if name == scores else name for name in node.output]
    del exported.graph.output[:-1]
    exported.graph.output[0].name = "output"
    save(exported, "xgb.onnx")


def save_identity() -> None:
    save(model("identity", [helper.make_node("Identity", ["input"], ["output"])], ["n", 16], ["n", 16]), "identity.onnx")


def save_cnn() -> None:
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.1).astype(np.float32), name)

    nodes = [
        helper.make_node("Transpose", ["input"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "k1"], ["c1"], strides=[4, 4], kernel_shape=[7, 7]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "k2"], ["c2"], strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["output"]),
    ]
    weights = [weight("k1", 8, 3, 7, 7), weight("k2", 16, 8, 3, 3), weight("w", 16, 10), weight("b", 10)]
    save(model("cnn", nodes, ["n", 224, 224, 3], ["n", 10], weights), "cnn.onnx")


def model(name: str, nodes: list, source: list, target: list, weights: list = ()) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, source)]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, target)]
    graph = helper.make_graph(nodes, name, inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def save(graph: onnx.ModelProto, name: str) -> None:
    onnx.checker.check_model(graph)
    onnx.save(graph, MODELS / name)


if __name__ == "__main__":
    MODELS.mkdir(exist_ok=True)
    save_trees()
    save_identity()
    save_cnn()
