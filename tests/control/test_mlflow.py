"""MLflow's model folders, written as MLflow 3 writes them, and served by our own backends."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import catboost
import joblib
import lightgbm
import numpy as np
import pytest
import skops.io
import torch
import xgboost
import yaml
from sklearn.linear_model import LogisticRegression

from fairlead.backends.table import detect, load_backend
from fairlead.control.artefacts import Artefacts, find
from fairlead.control.mlflow import convert
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest
from fairlead.core.rollout import RegistrySettings
from fairlead.core.tensors import Tensors
from fairlead.store.store import Store

ROWS = np.random.default_rng(0).normal(size=(200, 4))
LABELS = (ROWS[:, 0] > 0).astype(np.int64)
MATRIX = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]
COLUMNS = [{"type": "double", "name": name, "required": True} for name in "abcd"]
ANSWER = [{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]
ENV = {"env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}, "python_version": "3.11.7"}


def mlmodel(flavours: dict[str, dict[str, Any]], inputs: Any = None, outputs: Any = None) -> str:
    signature = {"inputs": json.dumps(inputs), "outputs": json.dumps(outputs) if outputs else None, "params": None}
    return yaml.safe_dump(
        {
            "flavors": {**flavours, "python_function": {**ENV, **flavours.get("python_function", {})}},
            "mlflow_version": "3.17.2",
            "model_uuid": "f5cec09fe0144bfdb05442b7eb041a9d",
            "run_id": "e13da8acb1e645d4a9b26a0a5cfac537",
            "utc_time_created": "2026-11-21 18:08:06.727925",
            **({"signature": signature} if inputs else {}),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What every MLflow model has beside its artefact."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("conda.yaml", "python_env.yaml"):
        (made / name).write_text("dependencies: []\n")
    (made / "requirements.txt").write_text("scikit-learn==1.9.1\n")
    return made


def xgb(folder: Path) -> dict[str, Any]:
    xgboost.XGBClassifier(n_estimators=2).fit(ROWS, LABELS).get_booster().save_model(folder / "model.ubj")
    return {
        "xgboost": {"data": "model.ubj", "model_format": "ubj", "model_class": "xgboost.core.Booster", "xgb_version": "3.2.0", "code": None}
    }


def lgb(folder: Path) -> dict[str, Any]:
    lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(ROWS, LABELS).booster_.save_model(folder / "model.lgb")
    return {"lightgbm": {"data": "model.lgb", "model_class": "lightgbm.basic.Booster", "lgb_version": "4.7.0", "code": None}}


def cat(folder: Path) -> dict[str, Any]:
    model = catboost.CatBoostClassifier(iterations=2, verbose=0, allow_writing_files=False).fit(ROWS, LABELS)
    model.save_model(str(folder / "model.cb"))
    return {"catboost": {"data": "model.cb", "model_type": "CatBoostClassifier", "save_format": "cbm", "catboost_version": "1.2.10"}}


def skops_(folder: Path) -> dict[str, Any]:
    skops.io.dump(LogisticRegression().fit(ROWS, LABELS), folder / "model.skops")
    return {"sklearn": {"pickled_model": "model.skops", "serialization_format": "skops", "sklearn_version": "1.9.1", "code": None}}


def pickled(folder: Path) -> dict[str, Any]:
    joblib.dump(LogisticRegression().fit(ROWS, LABELS), folder / "model.pkl")
    return {"sklearn": {"pickled_model": "model.pkl", "serialization_format": "cloudpickle", "sklearn_version": "1.9.1", "code": None}}


def pt2(folder: Path) -> dict[str, Any]:
    (folder / "data").mkdir()
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (torch.zeros(1, 4),)), folder / "data" / "model.pt2")
    return {"pytorch": {"model_data": "data", "pytorch_version": "2.13.0", "code": None}}


def scripted(folder: Path) -> dict[str, Any]:
    (folder / "data").mkdir()
    torch.jit.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).save(folder / "data" / "model.pth")
    return {"pytorch": {"model_data": "data", "pytorch_version": "2.13.0", "code": None}}


def found(folder: Path, **options: Any) -> Artefacts:
    return find(str(folder), "fraud", cache_folder=folder, max_bytes=1 << 30, **options)


def asked(folder: Path, artefacts: Artefacts, inputs: Tensors) -> Tensors:
    kind, path = detect(folder, artefacts.spec)
    executable = load_backend(kind.name).load(path, artefacts.spec, 1)
    answer = executable.infer(inputs, None)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("save", "backend", "framework"),
    [
        (xgb, "xgboost", "xgboost 3.2.0"),
        (lgb, "lightgbm", "lightgbm 4.7.0"),
        (cat, "catboost", "catboost 1.2.10"),
        (skops_, "sklearn", "sklearn 1.9.1"),
        (pickled, "sklearn", "sklearn 1.9.1"),
        (pt2, "torch_export", "pytorch 2.13.0"),
        (scripted, "torchscript", "pytorch 2.13.0"),
    ],
)
def test_a_flavour_is_served_by_its_own_backend_with_the_inputs_of_its_signature(
    folder: Path, save: Callable[[Path], dict[str, Any]], backend: str, framework: str
) -> None:
    (folder / "MLmodel").write_text(mlmodel(save(folder), MATRIX, ANSWER))
    artefacts = found(folder, trusted=save is pickled)
    assert artefacts.provenance == {"framework": framework, "mlflow_run": "e13da8acb1e645d4a9b26a0a5cfac537"}
    assert detect(folder, artefacts.spec)[0].name == backend
    assert {"MLmodel", "requirements.txt"} < artefacts.parts.keys() and artefacts.folder == str(folder)
    kind, path = detect(folder, artefacts.spec)
    executable = load_backend(kind.name).load(path, artefacts.spec, 1)
    assert [each.shape for each in executable.inputs] == [(1, 4) if save is pt2 else (-1, 4)]
    rows = ROWS[: 1 if save is pt2 else 9].astype(np.float32)
    answer = executable.infer({executable.inputs[0].name: rows}, None)
    assert isinstance(answer, dict) and all(len(array) == len(rows) for array in answer.values())
    if "predict" in answer:
        np.testing.assert_array_equal(np.round(answer["predict"].reshape(9)).astype(int), LABELS[:9])


def test_columns_of_a_signature_become_inputs_of_their_own(folder: Path) -> None:
    (folder / "MLmodel").write_text(mlmodel(xgb(folder), COLUMNS, ANSWER))
    artefacts = found(folder)
    assert [(each.name, each.datatype, each.shape) for each in artefacts.spec.inputs] == [(name, "FP64", (-1,)) for name in "abcd"]
    answer = asked(folder, artefacts, {name: ROWS[:5, column] for column, name in enumerate("abcd")})
    assert answer["predict"].shape == (5,)


def test_a_language_models_weights_and_tokenizer_come_together(folder: Path) -> None:
    for name in ("model/config.json", "model/model.safetensors", "components/tokenizer/tokenizer.json", "LICENSE.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model_type": "llama"}')
    flavour = {"task": "text-generation", "model_binary": "model", "components": ["tokenizer"], "transformers_version": "5.23.0"}
    (folder / "MLmodel").write_text(mlmodel({"transformers": flavour}))
    artefacts = found(folder)
    assert list(artefacts.parts) == ["MLmodel", "config.json", "model.safetensors", "tokenizer.json"]
    assert (artefacts.spec.backend, artefacts.folder) == ("llm", "")


def test_a_pickle_is_taken_from_those_who_vouch_for_it_only(folder: Path) -> None:
    (folder / "MLmodel").write_text(mlmodel(pickled(folder)))
    with pytest.raises(InvalidRequest, match=r"model.pkl holds objects of a library, so that loading it may run anything: .*--trusted"):
        found(folder)
    assert found(folder, trusted=True).spec.trusted


def test_the_api_of_scikit_learn_around_another_library_is_a_pickle_of_it(folder: Path) -> None:
    model = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(ROWS, LABELS)
    joblib.dump(model, folder / "model.pkl")
    (folder / "MLmodel").write_text(mlmodel({"lightgbm": {"data": "model.pkl", "lgb_version": "4.7.0"}}))
    with pytest.raises(InvalidRequest, match="--trusted"):
        found(folder)
    artefacts = found(folder, trusted=True)
    assert artefacts.spec.backend == "sklearn"
    np.testing.assert_array_equal(asked(folder, artefacts, {"input": ROWS[:9]})["predict"], model.predict(ROWS[:9]))


@pytest.mark.parametrize(
    ("flavours", "options", "words"),
    [
        ({"spark": {}}, {"flavour": "spark"}, "offers python_function, spark, not 'spark'; served are onnx, xgboost"),
        ({"onnx": {}}, {}, "the flavour has no `data`"),
        ({"onnx": {"data": "gone.onnx"}}, {}, "names 'gone.onnx', which is not in its folder"),
        ({"catboost": {"data": "model.json", "save_format": "json"}}, {}, "keeps its CatBoost model as json"),
        ({"transformers": {"task": "fill-mask", "model_binary": "model"}}, {}, "is for the task 'fill-mask'"),
        ({"transformers": {"task": "text-generation", "source_model_name": "x"}}, {}, "weights were not saved with it"),
        ({}, {}, "is loaded by MLflow, which runs what code is in it.*--trusted"),
        ({}, {"trusted": True}, "can only be loaded by MLflow, which is not installed"),
        ({"xgboost": {"data": "model.ubj", "code": "code"}}, {}, "is loaded by MLflow, which runs what code"),
    ],
)
def test_what_is_not_served_is_told_with_the_way_out(flavours: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FairleadError, match=words):
        convert(mlmodel(flavours), "m/MLmodel", ["MLmodel", "model.ubj", "model.json"], **options)


@pytest.mark.parametrize("text", ["flavors: 3", "no: yaml: [", "{}", "flavors: {onnx: {data: 3}}"])
def test_an_mlmodel_that_is_none_is_told_with_its_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"m/MLmodel:|the flavour has no"):
        convert(text, "m/MLmodel", ["MLmodel"])


def test_a_signature_that_is_none_is_told() -> None:
    for inputs in ("[", "3", "[1]"):
        text = yaml.safe_dump({"flavors": {"xgboost": {"data": "a"}}, "signature": {"inputs": inputs}})
        with pytest.raises(ConfigError, match="the signature in MLmodel is"):
            convert(text, "m/MLmodel", ["a"])


# Models that MLflow alone can load: with a stand-in for it, which loads a function


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of that name, which calls the `predict` of the folder's `code.py`."""
    package = tmp_path / "packages" / "mlflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pyfunc.py").write_text(
        textwrap.dedent(
            """
            import runpy, types

            def load_model(folder):
                return types.SimpleNamespace(predict=runpy.run_path(f"{folder}/code.py")["predict"])
            """
        )
    )
    monkeypatch.syspath_prepend(package.parent)
    yield
    for name in ("mlflow", "mlflow.pyfunc"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("mlflow")
def test_a_function_of_mlflows_is_asked_through_a_python_model(folder: Path, tmp_path: Path) -> None:
    (folder / "MLmodel").write_text(mlmodel({}, COLUMNS, [{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1]}}]))
    (folder / "code.py").write_text("def predict(frame):\n    return frame.sum(axis=1)\n")
    artefacts = found(folder, trusted=True)
    assert "model.py" in artefacts.parts and "mlflow_model/MLmodel" in artefacts.parts and artefacts.folder == ""
    store = Store.open(f"sqlite:///{tmp_path}/fairlead.db")
    registry = Registry(store, RegistrySettings(), cache_folder=tmp_path / "cache")
    row, _ = registry.add(str(folder), "fraud", Draft(trusted=True), Actor("me"))
    hosted = registry.hosted(row)
    store.close()
    executable = load_backend("python").load(hosted.fetch() / "model.py", hosted.spec, 1)
    answer = executable.infer({name: ROWS[:3, column] for column, name in enumerate("abcd")}, None)
    assert isinstance(answer, dict)
    np.testing.assert_allclose(answer["output"], ROWS[:3].sum(axis=1))
    executable.close()


@pytest.mark.usefixtures("mlflow")
def test_a_function_without_a_usable_signature_is_refused(folder: Path) -> None:
    for inputs, words in ((None, "has no signature"), ([{"type": "datetime", "name": "at"}], "types that have no form")):
        (folder / "MLmodel").write_text(mlmodel({}, inputs, ANSWER))
        with pytest.raises(InvalidRequest, match=words):
            found(folder, trusted=True)
