"""LightGBM: served answers are the library's own; a damaged text never reaches it, because it would end the process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fairlead.backends import lightgbm as backend
from tests.backends.conftest import Load, Why

Train = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def train(features: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def train(params: dict[str, Any], labels: np.ndarray, **dataset: Any) -> tuple[Path, Any]:
        booster = lightgbm.train(
            {"num_leaves": 7, "num_threads": 1, "verbose": -1, **params},
            lightgbm.Dataset(features, np.ascontiguousarray(labels), **dataset),
            4,
        )
        path = tmp_path_factory.mktemp("lightgbm") / "model.txt"
        booster.save_model(path)
        return path, booster

    return train


def signature(model: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(s.name, s.datatype, s.shape) for s in model.outputs]


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_binary_classifier(train: Train, load: Load, features: np.ndarray, classes: np.ndarray, rows: int) -> None:
    path, booster = train({"objective": "binary"}, classes > 0)
    model = load(path.parent)
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("input", "FP32", (-1, 6))]
    assert signature(model) == [("predict", "INT64", (-1,)), ("predict_proba", "FP64", (-1, 2))]
    result, want = model.infer({"input": features[:rows]}, None), booster.predict(features[:rows])
    assert_array_equal(result["predict_proba"], np.stack([1 - want, want], axis=1))
    assert_array_equal(result["predict"], (want > 0.5).astype(np.int64))
    assert model.infer({"input": features[:rows]}, frozenset({"predict"})).keys() == {"predict"}


@pytest.mark.parametrize("objective", ["multiclass", "multiclassova"])
def test_a_multiclass_classifier(train: Train, load: Load, features: np.ndarray, classes: np.ndarray, objective: str) -> None:
    path, booster = train({"objective": objective, "num_class": 3}, classes)
    model = load(path)
    assert signature(model) == [("predict", "INT64", (-1,)), ("predict_proba", "FP64", (-1, 3))]
    for rows in (features, features[:1]):
        result, want = model.infer({"input": rows}, None), booster.predict(rows)
        assert_array_equal(result["predict_proba"], want)
        assert_array_equal(result["predict"], want.argmax(axis=1))


@pytest.mark.parametrize("params", [{"objective": "regression"}, {"objective": "regression", "linear_tree": True}, {"objective": "poisson"}, {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}, {"objective": "cross_entropy"}])  # fmt: skip
def test_one_number_a_row(train: Train, load: Load, features: np.ndarray, params: dict[str, Any]) -> None:
    path, booster = train(params, np.clip(np.abs(features[:, 0].astype(np.float64)), 0, 1))
    model = load(path)
    assert signature(model) == [("predict", "FP64", (-1,))]
    assert_array_equal(model.infer({"input": features}, None)["predict"], booster.predict(features))


def test_categorical_features_are_codes(train: Train, load: Load, features: np.ndarray, tmp_path: Path) -> None:
    rows = features.copy()
    rows[:, 2] = np.arange(300) % 40
    labels = np.isin(rows[:, 2] % 4, [1, 3]) * 3.0
    booster = lightgbm.train(
        {"verbose": -1, "num_threads": 1, "min_data_per_group": 1, "cat_smooth": 0, "min_data_in_leaf": 1},
        lightgbm.Dataset(rows, labels, categorical_feature=[2]),
        4,
    )
    booster.save_model(tmp_path / "model.txt")
    assert "cat_threshold=" in (tmp_path / "model.txt").read_text()
    assert_array_equal(load(tmp_path).infer({"input": rows}, None)["predict"], booster.predict(rows))


def test_a_stump_and_integers_and_columns(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({"min_data_in_leaf": 1000}, features[:, 0], feature_name=list("abcdef"))
    model = load(path, "inputs: [{name: x, datatype: INT64, shape: [-1, 6]}]")
    assert_array_equal(model.infer({"x": np.ones((2, 6), np.int64)}, None)["predict"], booster.predict(np.ones((2, 6))))
    path, booster = train({}, features[:, 0], feature_name=list("abcdef"))
    model = load(path, "\n".join(["inputs:", *(f"  - {{name: {name}, datatype: FP64, shape: [-1, 1]}}" for name in "fedcba")]))
    rows = features.astype(np.float64)
    assert_array_equal(model.infer({name: rows[:, [i]] for i, name in enumerate("abcdef")}, None)["predict"], booster.predict(rows))


def test_the_fast_path_is_taken_and_is_safe_in_threads(train: Train, load: Load, features: np.ndarray) -> None:
    path, booster = train({}, features[:, 0])
    model, want = load(path), booster.predict(features)
    assert type(model._predict).__name__ == "_CFunctions"  # type: ignore[attr-defined]

    def check(start: int) -> bool:
        sizes = ((i, i + 1 + i % 3) for i in range(start, 290))
        return all(np.array_equal(model.infer({"input": features[i:j]}, None)["predict"], want[i:j]) for i, j in sizes)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


def test_without_c_functions_that_agree_the_public_one_serves(
    train: Train, load: Load, features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, booster = train({}, features[:, 0])
    monkeypatch.setattr(backend._CFunctions, "__call__", lambda self, rows: np.zeros(len(rows)))
    assert_array_equal(load(path).infer({"input": features}, None)["predict"], booster.predict(features))


def test_a_text_cut_anywhere_is_refused(train: Train, why: Why, features: np.ndarray, tmp_path: Path) -> None:
    path, _ = train({}, features[:, 0])
    whole = path.read_bytes()
    ends = whole.index(b"end of trees")
    for at in np.linspace(0, ends - 20, 8):
        (tmp_path / "model.txt").write_bytes(whole[: int(at)])
        assert "model.txt is not a" in why(tmp_path)


def test_damage_that_would_end_the_process_ends_another(train: Train, why: Why, features: np.ndarray, tmp_path: Path) -> None:
    path, _ = train({}, features[:, 0])
    whole = path.read_text()
    for damage, instead in (
        ("\nthreshold=", "\nthr3shold="),
        ("\nleft_child=", "\nleft_child=9999999 "),
        ("\nleaf_value=", "\nleaf_value=x"),
    ):
        (tmp_path / "model.txt").write_text(whole.replace(damage, instead, 1))
        assert "model.txt is not a whole model, or damaged" in why(tmp_path)


def test_what_is_declared_must_fit(train: Train, why: Why, features: np.ndarray) -> None:
    path, _ = train({}, features[:, 0])
    assert "LightGBM models compute on the CPU" in why(path, "instances: {device: cuda}")
    assert "with shape [-1, 7], but the artefact has [-1, 6]" in why(path, "inputs: [{name: x, datatype: FP32, shape: [-1, 7]}]")
