"""XGBoost: served answers are the library's own, by the fast path and by the public one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
from numpy.testing import assert_array_equal

from fairlead.backends import xgboost as backend
from tests.backends.conftest import Load, Why

Train = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def train(features: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def train(params: dict[str, Any], labels: np.ndarray, *, suffix: str = ".ubj", names: list[str] | None = None) -> tuple[Path, Any]:
        data = xgboost.DMatrix(features, labels, feature_names=names)
        booster = xgboost.train({"max_depth": 3, "nthread": 1, **params}, data, 5)
        path = tmp_path_factory.mktemp("xgboost") / f"model{suffix}"
        booster.save_model(path)
        return path, booster

    return train


def signature(model: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(s.name, s.datatype, s.shape) for s in model.outputs]


@pytest.mark.parametrize("suffix", [".ubj", ".json"])
def test_a_binary_classifier(train: Train, load: Load, features: np.ndarray, classes: np.ndarray, suffix: str) -> None:
    path, booster = train({"objective": "binary:logistic"}, classes > 0, suffix=suffix)
    model = load(path.parent)
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("input", "FP32", (-1, 6))]
    assert signature(model) == [("predict", "INT64", (-1,)), ("predict_proba", "FP32", (-1, 2))]
    result = model.infer({"input": features}, None)
    want = booster.inplace_predict(features)
    assert_array_equal(result["predict_proba"], np.stack([1 - want, want], axis=1))
    assert_array_equal(result["predict"], (want > 0.5).astype(np.int64))
    assert model.infer({"input": features[:1]}, frozenset({"predict"})).keys() == {"predict"}
    assert model.infer({"input": features[:1]}, frozenset({"predict_proba"})).keys() == {"predict_proba"}
    assert model.platform == "xgboost" and model.shareable and model.batches


def test_a_multiclass_classifier(train: Train, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    path, booster = train({"objective": "multi:softprob", "num_class": 3}, classes)
    model = load(path)
    assert signature(model) == [("predict", "INT64", (-1,)), ("predict_proba", "FP32", (-1, 3))]
    result, want = model.infer({"input": features}, None), booster.inplace_predict(features)
    assert_array_equal(result["predict_proba"], want)
    assert_array_equal(result["predict"], want.argmax(axis=1))


@pytest.mark.parametrize(("objective", "datatype"), [("reg:squarederror", "FP32"), ("rank:pairwise", "FP32"), ("binary:logitraw", "FP32"), ("binary:hinge", "INT64")])  # fmt: skip
def test_one_number_a_row(train: Train, load: Load, features: np.ndarray, classes: np.ndarray, objective: str, datatype: str) -> None:
    path, booster = train({"objective": objective}, classes > 0)
    model = load(path)
    assert signature(model) == [("predict", datatype, (-1,))]
    assert_array_equal(model.infer({"input": features}, None)["predict"], booster.inplace_predict(features))


def test_softmax_gives_the_class_only(train: Train, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    path, booster = train({"objective": "multi:softmax", "num_class": 3}, classes)
    assert_array_equal(load(path).infer({"input": features}, None)["predict"], booster.inplace_predict(features).astype(np.int64))


def test_several_targets(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({"objective": "reg:squarederror"}, features[:, :2])
    model = load(path)
    assert signature(model) == [("predict", "FP32", (-1, 2))]
    assert_array_equal(model.infer({"input": features[:7]}, None)["predict"], booster.inplace_predict(features[:7]))
    path, booster = train({"objective": "binary:logistic"}, features[:, :2] > 0)
    model = load(path)
    assert signature(model) == [("predict", "INT64", (-1, 2)), ("predict_proba", "FP32", (-1, 2))]
    assert_array_equal(model.infer({"input": features[:7]}, None)["predict_proba"], booster.inplace_predict(features[:7]))


def test_gblinear_has_no_fast_path_and_is_served_all_the_same(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({"booster": "gblinear"}, features[:, 0])
    assert_array_equal(load(path).infer({"input": features}, None)["predict"], booster.predict(xgboost.DMatrix(features)))


def test_early_stopping_serves_the_best_iteration(load: Load, features: np.ndarray, classes: np.ndarray, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).permutation(classes)
    classifier = xgboost.XGBClassifier(n_estimators=40, early_stopping_rounds=3, n_jobs=1)
    classifier.fit(features[:200], noise[:200], eval_set=[(features[200:], noise[200:])], verbose=False)
    classifier.save_model(tmp_path / "model.ubj")
    assert classifier.best_iteration + 1 < classifier.get_booster().num_boosted_rounds()
    result = load(tmp_path).infer({"input": features}, None)
    assert_array_equal(result["predict_proba"], classifier.predict_proba(features))
    assert_array_equal(result["predict"], classifier.predict(features))


@pytest.mark.parametrize("datatype", ["FP64", "INT64", "INT32", "UINT8", "FP16", "BOOL"])
def test_other_datatypes_may_be_declared(train: Train, load: Load, features: np.ndarray, datatype: str) -> None:
    path, booster = train({}, features[:, 0])
    model = load(path, f"inputs: [{{name: rows, datatype: {datatype}, shape: [-1, 6]}}]")
    rows = np.abs(features * 10).astype(model.example["rows"].dtype)  # type: ignore[index]
    assert_array_equal(model.infer({"rows": rows}, None)["predict"], booster.inplace_predict(rows.astype(np.float64)))


def test_nan_is_a_missing_value(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({}, features[:, 0])
    rows = np.full((1, 6), np.nan, np.float32)
    assert_array_equal(load(path).infer({"input": rows}, None)["predict"], booster.inplace_predict(rows))


def test_arrays_that_are_not_contiguous_or_not_writable(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({}, features[:, 0])
    model, want = load(path), booster.inplace_predict(features)
    assert_array_equal(model.infer({"input": np.asfortranarray(features)}, None)["predict"], want)
    assert_array_equal(model.infer({"input": np.frombuffer(features.tobytes(), np.float32).reshape(-1, 6)}, None)["predict"], want)


def test_columns_by_feature_name_come_in_any_order(train: Train, load: Load, why: Why, features: np.ndarray) -> None:
    names = ["age", "income", "c", "d", "e", "f"]
    path, booster = train({}, features[:, 0], names=names)
    declared = "\n".join(
        ["inputs:", *(f"  - {{name: {name}, datatype: {'FP64' if name == 'age' else 'FP32'}, shape: [-1]}}" for name in reversed(names))]
    )
    model = load(path, declared)
    assert [s.name for s in model.inputs] == names
    columns = {name: features[:, i].astype(np.float64 if name == "age" else np.float32) for i, name in enumerate(names)}
    assert_array_equal(model.infer(columns, None)["predict"], booster.inplace_predict(features, validate_features=False))
    message = why(path, declared.replace("age", "years"))
    assert "declares other columns than the artefact's features" in message and "{name: age, datatype: FP32, shape: [-1]}" in message
    load(path, message.partition("\n")[2])


def test_what_is_declared_must_fit(train: Train, why: Why, features: np.ndarray) -> None:
    path, _ = train({}, features[:, 0])
    assert "with shape [-1, 7], but the artefact has [-1, 6]" in why(path, "inputs: [{name: x, datatype: FP32, shape: [-1, 7]}]")
    assert "as BYTES, but the model takes numbers" in why(path, "inputs: [{name: x, datatype: BYTES, shape: [-1, 6]}]")
    assert "declares 2 columns, but the artefact has 6 features" in why(
        path, "inputs: [{name: a, datatype: FP32, shape: [-1]}, {name: b, datatype: FP32, shape: [-1]}]"
    )
    assert "declares 'score', but the artefact has 'predict'" in why(path, "outputs: [{name: score, datatype: FP32, shape: [-1]}]")
    assert "built without CUDA" in why(path, "instances: {device: cuda}")


def test_labels_may_be_declared(train: Train, load: Load, classes: np.ndarray) -> None:
    path, _ = train({"objective": "multi:softprob", "num_class": 3}, classes)
    model = load(path, "outputs: [{name: predict_proba, datatype: FP32, shape: [-1, 3], labels: [low, mid, high]}]")
    assert model.outputs[1].labels == ("low", "mid", "high")


@pytest.mark.parametrize("suffix", [".ubj", ".json"])
def test_a_model_cut_anywhere_is_refused(train: Train, why: Why, classes: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path, _ = train({"objective": "binary:logistic"}, classes > 0, suffix=suffix)
    whole = path.read_bytes()
    for part in (0.0, 0.01, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / f"model{suffix}").write_bytes(whole[: int(len(whole) * part)])
        message = why(tmp_path)
        assert f"model{suffix} is not a" in message and "\n" not in message


def test_the_fast_path_is_taken_and_is_safe_in_threads(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({}, features[:, 0])
    model, want = load(path), booster.inplace_predict(features)
    assert type(model._predict).__name__ == "_CFunction"  # type: ignore[attr-defined]

    def check(start: int) -> bool:
        return all(np.array_equal(model.infer({"input": features[i : i + 3]}, None)["predict"], want[i : i + 3]) for i in range(start, 290))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


@pytest.mark.parametrize("fault", ["missing", "different"])
def test_without_a_c_function_that_agrees_the_public_one_serves(
    train: Train, load: Load, features: np.ndarray, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path, booster = train({}, features[:, 0])
    if fault == "missing":
        monkeypatch.delattr(backend._CFunction, "__call__")
    else:
        whole = backend._CFunction.__call__
        monkeypatch.setattr(backend._CFunction, "__call__", lambda self, rows: whole(self, rows) + np.float32(1e-6))
    model = load(path)
    assert type(model._predict).__name__ == "function"  # type: ignore[attr-defined]
    assert_array_equal(model.infer({"input": features}, None)["predict"], booster.inplace_predict(features))
