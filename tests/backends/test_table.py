"""Which kind an artefact is."""

import zipfile
from pathlib import Path

import pytest

from fairlead.backends import BACKENDS, Kind, detect, load_backend
from fairlead.core.errors import ConfigError, LoadError
from fairlead.core.specs import Isolation, ModelSpec


def found(path: Path, **spec: str) -> tuple[str, str]:
    kind, artefact = detect(path, ModelSpec(**spec))
    return kind.name, artefact.name


def refused(path: Path, **spec: str) -> str:
    with pytest.raises(ConfigError) as error:
        detect(path, ModelSpec(**spec))
    return error.value.message


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("model.onnx", b"", "onnx"),
        ("fraud.ubj", b"{L", "xgboost"),
        ("model.json", b'{"learner":{"attributes":{}', "xgboost"),
        ("model.txt", b"tree\nversion=v4\n", "lightgbm"),
        ("model.cbm", b"CBM1", "catboost"),
        ("model.skops", b"PK", "sklearn"),
        ("model.joblib", b"\x80", "sklearn"),
        ("model.pkl", b"\x80", "sklearn"),
        ("model.pickle", b"\x80", "sklearn"),
        ("model.py", b"", "python"),
    ],
)
def test_the_artefact_tells_its_kind(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path) == (kind, name)
    assert found(tmp_path / name) == (kind, name)


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        (["m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"], "torchscript"),
        (["m/archive_format", "m/models/model.json"], "torch_export"),
    ],
)
def test_a_zip_of_torch_tells_its_kind_whatever_its_suffix(tmp_path: Path, members: list[str], kind: str) -> None:
    for suffix in (".pt", ".pth", ".pt2"):
        with zipfile.ZipFile(tmp_path / f"net{suffix}", "w") as archive:
            for member in members:
                archive.writestr(member, "")
        assert found(tmp_path / f"net{suffix}") == (kind, f"net{suffix}")


def test_files_that_only_share_a_suffix_do_not_confuse(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("tree\nversion=v4\n")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".model.onnx.part").write_bytes(b"half")
    assert found(tmp_path) == ("lightgbm", "model.txt")


def test_what_lies_next_to_a_model_py_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    (tmp_path / "weights.onnx").write_bytes(b"")
    assert found(tmp_path) == ("python", "model.py")
    assert found(tmp_path, file="weights.onnx") == ("onnx", "weights.onnx")
    assert found(tmp_path, backend="onnx") == ("onnx", "weights.onnx")


def checkpoint(folder: Path, *weights: str, config: str = '{"model_type": "llama"}') -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    for name in weights:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "weights", [["model.safetensors"], ["model-00001-of-00002.safetensors"], ["model.safetensors.index.json"]], ids=lambda each: each[0]
)
def test_a_checkpoint_is_a_language_model_and_its_folder_the_artefact(tmp_path: Path, weights: list[str]) -> None:
    folder = checkpoint(tmp_path / "tiny", *weights)
    assert found(folder) == found(folder, backend="llm") == ("llm", "tiny")


def test_a_folder_of_sentence_transformers_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text("{}")
    assert found(tmp_path) == ("llm", tmp_path.name)


def test_a_checkpoint_with_a_model_py_is_the_python_models(tmp_path: Path) -> None:
    checkpoint(tmp_path, "model.safetensors")
    (tmp_path / "model.py").write_text("")
    assert found(tmp_path) == ("python", "model.py")
    assert found(tmp_path, backend="llm")[0] == "llm"


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, "model.safetensors", config='{"layers": 2}')
    assert 'no "learner"' in refused(tmp_path)
    assert "is no checkpoint of a language model: config.json with *.safetensors; it holds config.json" in refused(tmp_path, backend="llm")


def test_weights_in_a_pickle_are_refused_with_advice(tmp_path: Path) -> None:
    checkpoint(tmp_path, "pytorch_model.bin")
    assert "safe_serialization=True" in refused(tmp_path)


def test_several_artefacts_are_listed_with_the_line_to_write(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    (tmp_path / "b.ubj").write_bytes(b"")
    message = refused(tmp_path)
    assert "file: a.onnx    # onnx" in message and "file: b.ubj    # xgboost" in message
    assert found(tmp_path, file="b.ubj") == ("xgboost", "b.ubj")
    assert found(tmp_path, backend="onnx") == ("onnx", "a.onnx")


def test_an_unknown_artefact_is_named_with_the_lines_to_write(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    message = refused(tmp_path)
    assert "it holds weights.bin" in message and "file: NAME\nbackend: KIND" in message
    assert "is no artefact whose kind" in refused(tmp_path, file="weights.bin")
    assert found(tmp_path, file="weights.bin", backend="onnx") == ("onnx", "weights.bin")


def test_an_empty_folder_and_an_absent_one_are_told_apart(tmp_path: Path) -> None:
    assert "it is empty" in refused(tmp_path)
    assert "there is no model at" in refused(tmp_path / "7")


def test_the_file_named_must_be_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "secret.onnx").write_bytes(b"")
    assert "holds no file '../secret.onnx'" in refused(tmp_path / "1", file="../secret.onnx")
    assert "holds no file 'absent.onnx'" in refused(tmp_path / "1", file="absent.onnx")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b'{"layers": 2}', 'no "learner"'),
        ("notes.txt", b"a tree\n", "does not start with `tree`"),
        ("net.pt", b"\x80\x02}", "pickle of torch.save"),
        ("net.pt", b"PK\x03\x04 half", "truncated"),
        ("net.pt2", b"", "truncated"),
    ],
)
def test_what_only_looks_like_an_artefact_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refused(tmp_path / name)
    assert says in refused(tmp_path)


def test_weights_without_a_program_are_refused_with_advice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("weights/data.pkl", "")
    assert "torch.export.save" in refused(tmp_path)


def test_a_kind_without_its_package_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Kind(
        name="abacus",
        module="fairlead.backends.abacus",
        requires=("abacus_runtime",),
        extra="abacus",
        isolation=Isolation.THREAD,
        files=(".abc",),
    )
    monkeypatch.setitem(BACKENDS, "abacus", row)
    with pytest.raises(ConfigError, match=r"model kind 'abacus' needs abacus_runtime: pip install 'fairlead\[abacus\]'"):
        load_backend("abacus")


def test_a_package_that_is_broken_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        BACKENDS,
        "abacus",
        Kind(name="abacus", module="fairlead.backends.abacus", requires=(), extra="", isolation=Isolation.THREAD, files=()),
    )
    with pytest.raises(ConfigError, match="model kind 'abacus' cannot be used: No module named 'fairlead.backends.abacus'"):
        load_backend("abacus")


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'tensorflow'; it is one of python, onnx"):
        load_backend("tensorflow")


def test_every_extra_of_the_table_exists() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {kind.extra for kind in BACKENDS.values() if kind.requires} <= extras.keys()


def test_detection_errors_are_load_errors(tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        detect(tmp_path, ModelSpec())
