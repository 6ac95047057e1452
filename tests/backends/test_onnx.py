"""ONNX: names, types and shapes are the graph's own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import skl2onnx
from numpy.testing import assert_array_equal
from onnx import TensorProto, helper
from sklearn.linear_model import LogisticRegression

from fairlead.core.tensors import DTYPES
from tests.backends.conftest import Load, Why

Graph = Callable[..., Path]
Value = tuple[str, int, list[int | str | None] | None]


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    def graph(nodes: list[Any], inputs: list[Value], outputs: list[Value]) -> Path:
        infos = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
        model = helper.make_model(helper.make_graph(nodes, "graph", *infos), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path

    return graph


def identity(graph: Graph, element: int, shape: list[int | str | None] | None) -> Path:
    return graph([helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)])


@pytest.mark.parametrize(
    ("element", "datatype"),
    [(TensorProto.BOOL, "BOOL"), (TensorProto.UINT8, "UINT8"), (TensorProto.UINT16, "UINT16"), (TensorProto.UINT32, "UINT32"),
     (TensorProto.UINT64, "UINT64"), (TensorProto.INT8, "INT8"), (TensorProto.INT16, "INT16"), (TensorProto.INT32, "INT32"),
     (TensorProto.INT64, "INT64"), (TensorProto.FLOAT16, "FP16"), (TensorProto.FLOAT, "FP32"), (TensorProto.DOUBLE, "FP64")],
)  # fmt: skip
def test_every_datatype_goes_through(graph: Graph, load: Load, element: int, datatype: str) -> None:
    model = load(identity(graph, element, ["batch", 2]))
    assert [(s.name, s.datatype, s.shape) for s in (*model.inputs, *model.outputs)] == [("x", datatype, (-1, 2)), ("y", datatype, (-1, 2))]
    rows = np.frombuffer((np.arange(6).reshape(3, 2) % 2).astype(DTYPES[datatype]).tobytes(), DTYPES[datatype]).reshape(3, 2)
    result = model.infer({"x": rows}, None)["y"]
    assert_array_equal(result, rows)
    assert result.dtype == rows.dtype and model.batches and model.shareable and model.platform == "onnxruntime_onnx"


def test_strings_are_bytes_outside(graph: Graph, load: Load) -> None:
    words = np.array([[b"ab", "é".encode()], [b"", b"c\x00d"]], object)
    model = load(identity(graph, TensorProto.STRING, [None, 2]))
    assert model.inputs[0].datatype == "BYTES"
    result = model.infer({"x": words}, None)["y"]
    assert_array_equal(result, words)
    assert all(isinstance(word, bytes) for word in result.reshape(-1))


def test_bf16_is_refused_because_onnx_runtime_takes_none(graph: Graph, why: Why) -> None:
    assert "input 'x' is a tensor(bfloat16), which cannot be served" in why(identity(graph, TensorProto.BFLOAT16, ["batch", 2]))


@pytest.mark.parametrize(
    ("shape", "seen", "batches"),
    [
        (["batch", 2], (-1, 2), True),
        ([None, 2], (-1, 2), True),
        ([1, 2], (1, 2), False),
        (["batch", "time", 3], (-1, -1, 3), True),
        ([], (), False),
    ],
)
def test_a_leading_symbol_is_the_batch(graph: Graph, load: Load, shape: list[Any], seen: tuple[int, ...], batches: bool) -> None:
    model = load(identity(graph, TensorProto.FLOAT, shape))
    assert model.inputs[0].shape == model.outputs[0].shape == seen
    assert model.batches == batches


@pytest.mark.parametrize(("shapes", "batches"), [((["n", 2], ["n", 2]), True), ((["n", 2], ["m", 2]), False), ((["n", 2], [1, 2]), False), ((["n", 2], [2]), False)])  # fmt: skip
def test_inputs_share_the_batch_or_there_is_none(graph: Graph, load: Load, shapes: Any, batches: bool) -> None:
    values = [(name, TensorProto.FLOAT, shape) for name, shape in zip("ab", shapes, strict=True)]
    assert load(graph([helper.make_node("Add", ["a", "b"], ["y"])], values, [("y", TensorProto.FLOAT, ["n", 2])])).batches == batches


def test_a_total_over_the_batch_is_no_batch(graph: Graph, load: Load) -> None:
    folder = graph(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [("x", TensorProto.FLOAT, ["n", 2])], [("y", TensorProto.FLOAT, [])]
    )
    model = load(folder)
    assert model.outputs[0].shape == () and not model.batches


def test_a_shape_that_the_graph_leaves_out_is_seen_by_running_it(graph: Graph, load: Load) -> None:
    folder = graph([helper.make_node("NonZero", ["x"], ["y"])], [("x", TensorProto.FLOAT, ["n", 2])], [("y", TensorProto.INT64, None)])
    assert len(load(folder).outputs[0].shape) == 2


def test_only_the_outputs_wanted_are_computed(graph: Graph, load: Load) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Neg", ["x"], ["negative"])]
    folder = graph(nodes, [("x", TensorProto.FLOAT, ["n"])], [("same", TensorProto.FLOAT, ["n"]), ("negative", TensorProto.FLOAT, ["n"])])
    model = load(folder)
    rows = np.array([1.0], np.float32)
    assert model.infer({"x": rows}, None).keys() == {"same", "negative"}
    assert model.infer({"x": rows}, frozenset({"negative"}))["negative"].tolist() == [-1.0]
    assert model.infer({"x": rows}, frozenset({"negative"})).keys() == {"negative"}


@pytest.mark.parametrize("labels", [[0, 1, 2], [7, 3, 5], ["low", "mid", "high"]])
@pytest.mark.parametrize("zipmap", [True, False])
def test_a_scikit_learn_model_with_or_without_zipmap(
    load: Load, features: np.ndarray, classes: np.ndarray, tmp_path: Path, labels: list[Any], zipmap: bool
) -> None:
    classifier = LogisticRegression().fit(features, np.array(labels)[classes])
    exported = skl2onnx.to_onnx(classifier, features[:1], options={"zipmap": zipmap})
    (tmp_path / "model.onnx").write_bytes(exported.SerializeToString())
    model = load(tmp_path)
    assert model.batches
    result = model.infer({"X": features}, None)
    label, scores = (result[spec.name] for spec in model.outputs)
    assert scores.shape == (300, 3) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, classifier.predict_proba(features), rtol=1e-4, atol=1e-6)
    want = classifier.predict(features)
    assert np.mean(label == (np.array([word.encode() for word in want], object) if want.dtype.kind == "U" else want)) > 0.99
    if zipmap:
        assert model.outputs[1].labels == tuple(str(label) for label in classifier.classes_)


def test_a_sequence_is_refused(graph: Graph, why: Why, tmp_path: Path) -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    out = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], [out])
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "model.onnx")
    assert "output 'y' is a seq(tensor(float)), which cannot be served" in why(tmp_path)


def test_what_is_declared_lies_over_what_the_graph_says(graph: Graph, load: Load, why: Why) -> None:
    folder = identity(graph, TensorProto.FLOAT, ["batch", "time"])
    model = load(
        folder, "inputs: [{name: x, datatype: FP32, shape: [-1, 8]}]\noutputs: [{name: y, datatype: FP32, shape: [-1, 8], labels: [a, b]}]"
    )
    assert model.inputs[0].shape == (-1, 8) and model.outputs[0].labels == ("a", "b")
    assert "declares 'input', but the artefact has 'x'" in why(folder, "inputs: [{name: input, datatype: FP32, shape: [-1, 8]}]")
    assert "declares 'x' as FP64, but the artefact has FP32" in why(folder, "inputs: [{name: x, datatype: FP64, shape: [-1, 8]}]")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_a_device_that_is_not_there_is_refused(graph: Graph, why: Why) -> None:
    assert "`device: cuda:0` needs ONNX Runtime with CUDA" in why(
        identity(graph, TensorProto.FLOAT, ["n"]), "instances: {device: 'cuda:0'}"
    )


def test_a_cut_or_damaged_file_is_refused(graph: Graph, why: Why, features: np.ndarray, classes: np.ndarray) -> None:
    folder = identity(graph, TensorProto.FLOAT, ["n"])
    (folder / "model.onnx").write_bytes(skl2onnx.to_onnx(LogisticRegression().fit(features, classes), features[:1]).SerializeToString())
    whole = (folder / "model.onnx").read_bytes()
    for content in (b"", b"hello", *(whole[: int(len(whole) * part)] for part in (0.01, 0.3, 0.9))):
        (folder / "model.onnx").write_bytes(content)
        message = why(folder)
        assert "model.onnx is not a whole ONNX model" in message and "\n" not in message


def test_several_threads_share_one_session(graph: Graph, load: Load) -> None:
    model = load(identity(graph, TensorProto.FLOAT, ["n", 3]))
    rows = np.arange(300, dtype=np.float32).reshape(100, 3)

    def check(i: int) -> bool:
        return np.array_equal(model.infer({"x": rows[i : i + 5]}, None)["y"], rows[i : i + 5])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(95)))
