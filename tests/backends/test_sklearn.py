"""scikit-learn: skops by default, pickles only of whom the operator vouches for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas
import pytest
import skops.io
from numpy.testing import assert_array_equal
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from tests.backends.conftest import Load, Why

Save = Callable[[Any], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(model: Any) -> Path:
        skops.io.dump(model, tmp_path / "model.skops")
        return tmp_path

    return save


def signature(model: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(s.name, s.datatype, s.shape) for s in model.outputs]


@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), make_pipeline(StandardScaler(), LogisticRegression()), RandomForestClassifier(5, random_state=0, n_jobs=-1), GradientBoostingClassifier(n_estimators=3)],
    ids=lambda estimator: type(estimator).__name__,
)  # fmt: skip
@pytest.mark.parametrize("words", [False, True])
def test_a_classifier(save: Save, load: Load, features: np.ndarray, classes: np.ndarray, estimator: Any, words: bool) -> None:
    labels = np.array(["low", "mid", "high"])[classes] if words else classes
    estimator.fit(features.astype(np.float64), labels)
    model = load(save(estimator))
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("input", "FP64", (-1, 6))]
    assert signature(model) == [("predict", "BYTES" if words else "INT64", (-1,)), ("predict_proba", "FP64", (-1, 3))]
    assert model.outputs[1].labels == (("high", "low", "mid") if words else ())
    rows = features[:20].astype(np.float64)
    want = estimator.predict(rows)
    want = [word.encode() for word in want] if words else want
    for outputs in (None, frozenset({"predict"}), frozenset({"predict_proba"})):
        result = model.infer({"input": rows}, outputs)
        assert result.keys() == (outputs or {"predict", "predict_proba"})
        if "predict" in result:
            assert_array_equal(result["predict"], want)
        if "predict_proba" in result:
            assert_array_equal(result["predict_proba"], estimator.predict_proba(rows))


def test_a_regressor_takes_the_datatype_declared(save: Save, load: Load, features: np.ndarray) -> None:
    regressor = HistGradientBoostingRegressor(max_iter=3).fit(features, features[:, 0])
    folder = save(regressor)
    for datatype, dtype in (("FP32", np.float32), ("FP64", np.float64), ("INT32", np.int32), ("BOOL", np.bool_)):
        model = load(folder, f"inputs: [{{name: x, datatype: {datatype}, shape: [-1, 6]}}]")
        assert signature(model) == [("predict", "FP64", (-1,))]
        rows = (features * 5).astype(dtype)
        assert_array_equal(model.infer({"x": rows}, None)["predict"], regressor.predict(rows))


def test_several_targets_have_no_probabilities(save: Save, load: Load, features: np.ndarray) -> None:
    target = (features[:, :2] > 0).astype(int)
    model = load(save(MultiOutputClassifier(LogisticRegression()).fit(features, target)))
    assert signature(model) == [("predict", "INT64", (-1, 2))]
    model = load(save(LinearRegression().fit(features.astype(np.float64), features[:, :2].astype(np.float64))))
    assert signature(model) == [("predict", "FP64", (-1, 2))]


def test_a_classifier_without_probabilities(save: Save, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    classifier = SVC().fit(features, classes)
    model = load(save(classifier))
    assert signature(model) == [("predict", "INT64", (-1,))]
    assert_array_equal(model.infer({"input": features.astype(np.float64)}, None)["predict"], classifier.predict(features))


def test_texts_are_one_tensor_of_strings(save: Save, load: Load) -> None:
    texts = ["buy now", "cheap pills", "see you at lunch", "meeting at nine"] * 3
    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, ["spam", "spam", "ham", "ham"] * 3)
    model = load(save(classifier))
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("input", "BYTES", (-1,))]
    result = model.infer({"input": np.array([b"cheap lunch", "ünïcode".encode()], object)}, None)
    assert_array_equal(result["predict_proba"], classifier.predict_proba(["cheap lunch", "ünïcode"]))
    assert load(save(classifier), "inputs: [{name: text, datatype: BYTES, shape: [-1]}]").inputs[0].name == "text"


@pytest.fixture(scope="session")
def frame(features: np.ndarray) -> pandas.DataFrame:
    return pandas.DataFrame(
        {"size": features[:, 0], "colour": pandas.Series(["red", "blue", "blau ü"] * 100, dtype=object), "age": np.arange(300) % 70}
    )


def test_a_model_of_a_dataframe_takes_one_input_per_column(save: Save, load: Load, frame: pandas.DataFrame, classes: np.ndarray) -> None:
    columns = ColumnTransformer([("words", OneHotEncoder(), ["colour"]), ("numbers", StandardScaler(), ["size", "age"])])
    classifier = make_pipeline(columns, LogisticRegression()).fit(frame, classes)
    model = load(save(classifier), "trusted: true")
    assert [(s.name, s.datatype) for s in model.inputs] == [("size", "FP64"), ("colour", "BYTES"), ("age", "FP64")]
    inputs = {
        "size": frame["size"].to_numpy(np.float64),
        "colour": np.array([c.encode() for c in frame["colour"]], object),
        "age": frame["age"].to_numpy(np.float64),
    }
    assert_array_equal(model.infer(inputs, None)["predict_proba"], classifier.predict_proba(frame.astype({"size": float, "age": float})))
    declared = "inputs: [{name: age, datatype: INT64, shape: [-1, 1]}, {name: size, datatype: FP32, shape: [-1, 1]}, {name: colour, datatype: BYTES, shape: [-1, 1]}]"
    model = load(save(classifier), f"trusted: true\n{declared}")
    inputs = {
        "size": inputs["size"].astype(np.float32)[:, None],
        "colour": inputs["colour"][:, None],
        "age": frame["age"].to_numpy(np.int64)[:, None],
    }
    assert_array_equal(model.infer(inputs, None)["predict"], classifier.predict(frame))


def test_a_dataframe_of_numbers_is_a_matrix(save: Save, load: Load, features: np.ndarray, classes: np.ndarray) -> None:
    table = pandas.DataFrame(features, columns=list("abcdef"))
    classifier = LogisticRegression().fit(table, classes)
    model = load(save(classifier))
    assert [(s.name, s.shape) for s in model.inputs] == [("input", (-1, 6))]
    assert_array_equal(model.infer({"input": features.astype(np.float64)}, None)["predict"], classifier.predict(table))
    columns = "\n".join(["inputs:", *(f"  - {{name: {name}, datatype: FP32, shape: [-1]}}" for name in "fedcba")])
    model = load(save(classifier), columns)
    assert_array_equal(model.infer({name: features[:, i] for i, name in enumerate("abcdef")}, None)["predict"], classifier.predict(table))


def length_of_row(rows: Any) -> np.ndarray:
    return np.asarray(rows, dtype=float).sum(axis=1, keepdims=True)


def test_what_it_does_not_tell_is_asked_for_with_lines_that_work(
    load: Load, why: Why, yaml_lines: Callable[[str], str], features: np.ndarray, tmp_path: Path
) -> None:
    regressor = make_pipeline(FunctionTransformer(np.abs), LinearRegression()).fit(features[:, :4], features[:, 0])
    del regressor.steps[0][1].n_features_in_
    skops.io.dump(regressor, tmp_path / "model.skops")
    message = why(tmp_path, "trusted: true")
    assert "does not say how many features it takes" in message
    model = load(tmp_path, f"trusted: true\n{yaml_lines(message)}")
    assert model.infer({"input": features[:, :4].astype(np.float64)}, None)["predict"].shape == (300,)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".joblib", ".pkl", ".pickle"])
def test_a_pickle_is_not_even_opened_unless_trusted(
    load: Load, why: Why, yaml_lines: Callable[[str], str], features: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    joblib.dump(Bomb(tmp_path / "exploded"), tmp_path / f"model{suffix}")
    message = why(tmp_path)
    assert "runs whatever code is in it" in message and not (tmp_path / "exploded").exists()
    assert yaml_lines(message) == "trusted: true"
    joblib.dump(LinearRegression().fit(features, features[:, 0]), tmp_path / f"model{suffix}")
    assert signature(load(tmp_path, yaml_lines(message))) == [("predict", "FP64", (-1,))]


def test_unknown_types_in_skops_are_listed_unless_trusted(save: Save, load: Load, why: Why, features: np.ndarray) -> None:
    folder = save(make_pipeline(FunctionTransformer(length_of_row), LinearRegression()).fit(features, features[:, 0]))
    assert "length_of_row" in why(folder)
    assert signature(load(folder, "trusted: true")) == [("predict", "FP64", (-1,))]


def test_damaged_and_useless_artefacts_are_refused(save: Save, why: Why, features: np.ndarray, tmp_path: Path) -> None:
    folder = save(LinearRegression().fit(features, features[:, 0]))
    whole = (folder / "model.skops").read_bytes()
    for part in (0.0, 0.3, 0.9):
        (folder / "model.skops").write_bytes(whole[: int(len(whole) * part)])
        assert "model.skops is truncated or not a skops archive" in why(folder)
    (folder / "model.skops").write_bytes(whole[:200] + bytes(100) + whole[300:])
    assert "model.skops cannot be loaded by skops" in why(folder, "trusted: true")
    save(LinearRegression())
    assert "the LinearRegression is not fitted" in why(folder, "inputs: [{name: x, datatype: FP64, shape: [-1, 6]}]")
    save(StandardScaler().fit(features))
    assert "holds a StandardScaler, which has no `predict`" in why(folder)
    (folder / "model.skops").unlink()
    for content in (b"", b"\x80\x04half", joblib_bytes(tmp_path, features)[:100], b"hello"):
        (folder / "model.joblib").write_bytes(content)
        assert "model.joblib is damaged" in why(folder, "trusted: true")


def joblib_bytes(tmp_path: Path, features: np.ndarray) -> bytes:
    joblib.dump(LinearRegression().fit(features, features[:, 0]), tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()
