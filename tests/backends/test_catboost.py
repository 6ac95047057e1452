"""CatBoost: served answers are the library's own, words included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import catboost
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.backends.conftest import Load, Why

Train = Callable[..., tuple[Path, Any]]
KEYS = {"iterations": 4, "depth": 3, "verbose": 0, "allow_writing_files": False, "thread_count": 1}


@pytest.fixture(scope="session")
def train(features: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def train(model: Any, labels: np.ndarray, rows: Any = None, **fit: Any) -> tuple[Path, Any]:
        model.fit(features if rows is None else rows, labels, **fit)
        path = tmp_path_factory.mktemp("catboost") / "model.cbm"
        model.save_model(str(path))
        return path, model

    return train


def signature(model: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(s.name, s.datatype, s.shape) for s in model.outputs]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    ("labels", "datatype"),
    [(lambda y: (y > 0).astype(np.int64), "INT64"), (lambda y: y > 0, "BOOL"), (lambda y: np.array(["no", "yes"])[(y > 0).astype(int)], "BYTES"),
     (lambda y: y, "INT64"), (lambda y: np.array(["a", "b", "c"])[y], "BYTES")],
)  # fmt: skip
def test_a_classifier(train: Train, load: Load, features: np.ndarray, classes: np.ndarray, labels: Any, datatype: str, rows: int) -> None:
    path, classifier = train(catboost.CatBoostClassifier(**KEYS), labels(classes))
    model = load(path.parent)
    num_classes = len(classifier.classes_)
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("input", "FP32", (-1, 6))]
    assert signature(model) == [("predict", datatype, (-1,)), ("predict_proba", "FP64", (-1, num_classes))]
    result = model.infer({"input": features[:rows]}, None)
    assert_array_equal(result["predict_proba"], classifier.predict_proba(features[:rows]))
    want = classifier.predict(features[:rows]).reshape(-1)
    assert_array_equal(result["predict"], [word.encode() for word in want] if datatype == "BYTES" else want)
    assert model.outputs[1].labels == (() if datatype == "INT64" else tuple(map(str, classifier.classes_)))


def test_a_threshold_of_its_own_decides_the_label(train: Train, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    classifier = catboost.CatBoostClassifier(**KEYS).fit(features, classes > 0)
    classifier.set_probability_threshold(0.7)
    path, _ = train(classifier, classes > 0)
    classifier.set_probability_threshold(0.7)
    classifier.save_model(str(path))
    assert_array_equal(load(path).infer({"input": features}, frozenset({"predict"}))["predict"], classifier.predict(features))


@pytest.mark.parametrize("loss", ["RMSE", "Poisson", "RMSEWithUncertainty", "MultiRMSE"])
def test_a_regressor(train: Train, load: Load, features: np.ndarray, loss: str) -> None:
    target = np.abs(features[:, :2] if loss == "MultiRMSE" else features[:, 0])
    path, regressor = train(catboost.CatBoostRegressor(loss_function=loss, **KEYS), target)
    model, want = load(path), regressor.predict(features)
    assert signature(model) == [("predict", "FP64", (-1, *want.shape[1:]))]
    assert_array_equal(model.infer({"input": features}, None)["predict"], want)


def test_a_ranker_and_several_labels(train: Train, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    path, ranker = train(catboost.CatBoostRanker(loss_function="YetiRank", **KEYS), classes, group_id=np.arange(300) // 10)
    assert_array_equal(load(path).infer({"input": features}, None)["predict"], ranker.predict(features))
    path, classifier = train(catboost.CatBoostClassifier(loss_function="MultiLogloss", **KEYS), (features[:, :3] > 0).astype(int))
    model = load(path)
    assert signature(model) == [("predict", "INT64", (-1, 3)), ("predict_proba", "FP64", (-1, 3))]
    result = model.infer({"input": features}, None)
    assert_array_equal(result["predict_proba"], classifier.predict_proba(features))
    assert_array_equal(result["predict"], classifier.predict(features))


def test_categories_and_numbers_are_columns_by_name(train: Train, load: Load, why: Why, features: np.ndarray, classes: np.ndarray) -> None:
    rows = np.empty((300, 3), object)
    rows[:, 0], rows[:, 1], rows[:, 2] = features[:, 0], np.array(["red", "green", "blau ü"])[classes], np.arange(300) % 5
    pool = catboost.Pool(rows, classes > 0, cat_features=[1, 2], feature_names=["size", "colour", "shop"])
    classifier = catboost.CatBoostClassifier(**KEYS)
    path, _ = train(classifier, None, pool)
    model = load(path)
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [
        ("size", "FP32", (-1,)),
        ("colour", "BYTES", (-1,)),
        ("shop", "BYTES", (-1,)),
    ]
    encoded = {
        "size": features[:, 0],
        "colour": np.array([c.encode() for c in rows[:, 1]], object),
        "shop": np.array([str(s).encode() for s in rows[:, 2]], object),
    }
    assert_array_equal(model.infer(encoded, None)["predict_proba"], classifier.predict_proba(pool))
    declared = "inputs: [{name: shop, datatype: INT64, shape: [-1, 1]}, {name: colour, datatype: BYTES, shape: [-1, 1]}, {name: size, datatype: FP64, shape: [-1, 1]}]"
    model = load(path, declared)
    columns = {
        "size": features[:, :1].astype(np.float64),
        "colour": encoded["colour"].reshape(-1, 1),
        "shop": (np.arange(300) % 5).reshape(-1, 1),
    }
    assert_array_equal(model.infer(columns, None)["predict_proba"], classifier.predict_proba(pool))
    assert "'size' as BYTES, but it is a number" in why(path, declared.replace("FP64", "BYTES"))
    assert "'shop' as FP32, but it is a category" in why(path, declared.replace("INT64", "FP32"))
    assert "declares other columns" in why(path, "inputs: [{name: x, datatype: FP32, shape: [-1, 3]}]")


def test_a_cut_file_and_a_device_are_refused(train: Train, why: Why, features: np.ndarray, tmp_path: Path) -> None:
    path, _ = train(catboost.CatBoostRegressor(**KEYS), features[:, 0])
    whole = path.read_bytes()
    for part in (0.0, 0.001, 0.1, 0.5, 0.9, 0.9999):
        (tmp_path / "model.cbm").write_bytes(whole[: int(len(whole) * part)])
        message = why(tmp_path)
        assert "model.cbm is not a whole CatBoost model" in message and "\n" not in message
    assert "CatBoost models compute on the CPU" in why(path, "instances: {device: cuda}")
