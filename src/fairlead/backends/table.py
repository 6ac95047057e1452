"""Which kinds of model there are, and which one an artefact is."""

import importlib
import importlib.util
import zipfile
from pathlib import Path

from fairlead.backends.base import Backend, EngineBackend, Kind
from fairlead.backends.external import KINDS as EXTERNAL_KINDS
from fairlead.core.errors import ConfigError, LoadError
from fairlead.core.specs import Isolation, ModelSpec

CHECKPOINT = "config.json with *.safetensors"
PIPELINE = "model_index.json"

BACKENDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="python",
            module="fairlead.backends.python",
            requires=(),
            extra="",
            isolation=Isolation.PROCESS,
            files=("model.py",),
            parameters=True,
        ),
        Kind(
            name="onnx",
            module="fairlead.backends.onnx",
            requires=("onnxruntime",),
            extra="onnx",
            isolation=Isolation.THREAD,
            files=("model.onnx", ".onnx"),
        ),
        Kind(
            name="xgboost",
            module="fairlead.backends.xgboost",
            requires=("xgboost",),
            extra="trees",
            isolation=Isolation.THREAD,
            files=("model.ubj", ".ubj", "model.json", ".json"),
        ),
        Kind(
            name="lightgbm",
            module="fairlead.backends.lightgbm",
            requires=("lightgbm",),
            extra="trees",
            isolation=Isolation.THREAD,
            files=("model.txt", ".txt"),
        ),
        Kind(
            name="catboost",
            module="fairlead.backends.catboost",
            requires=("catboost",),
            extra="catboost",
            isolation=Isolation.THREAD,
            files=("model.cbm", ".cbm"),
        ),
        Kind(
            name="sklearn",
            module="fairlead.backends.sklearn",
            requires=("sklearn", "skops"),
            extra="sklearn",
            isolation=Isolation.THREAD,
            files=("model.skops", ".skops", ".joblib", ".pkl", ".pickle"),
        ),
        Kind(
            name="torchscript",
            module="fairlead.backends.torch",
            requires=("torch",),
            extra="torch",
            isolation=Isolation.PROCESS,
            files=("model.pt", ".pt", ".pth"),
            preload=("torch",),
        ),
        Kind(
            name="torch_export",
            module="fairlead.backends.torch",
            requires=("torch",),
            extra="torch",
            isolation=Isolation.PROCESS,
            files=("model.pt2", ".pt2"),
            preload=("torch", "torch.export"),
        ),
        Kind(
            name="llm",
            module="fairlead.backends.llm",
            requires=("torch", "transformers", "tokenizers", "safetensors"),
            extra="llm",
            isolation=Isolation.PROCESS,
            files=(),
            engine=True,
            preload=("torch", "transformers.modeling_utils", "fairlead.backends.llm"),
        ),
        Kind(
            name="diffusion",
            module="fairlead.backends.diffusion",
            requires=("diffusers", "torch", "transformers", "peft", "safetensors"),
            extra="diffusion",
            isolation=Isolation.PROCESS,
            files=(),
            engine=True,
            section="diffusion",
            preload=("torch", "transformers.modeling_utils", "fairlead.backends.diffusion"),
        ),
        *EXTERNAL_KINDS,
    )
}


def load_backend(name: str) -> Backend:
    """The backend of a kind of tensor models. Raises ConfigError where the kind is unknown or a module it needs is not installed."""
    backend = import_backend(_kind(name))
    assert isinstance(backend, Backend)
    return backend


def import_backend(kind: Kind) -> Backend | EngineBackend:
    """Raises ConfigError where a module that the kind needs is not installed."""
    for module in kind.requires:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"model kind {kind.name!r} needs {module}: pip install 'fairlead[{kind.extra}]'")
    try:
        backend = importlib.import_module(kind.module).BACKEND
    except (ImportError, OSError) as error:  # installed, but broken: a missing shared library, versions that do not fit
        raise ConfigError(f"model kind {kind.name!r} cannot be used: {error}") from error
    assert isinstance(backend, EngineBackend if kind.engine else Backend)
    return backend


def detect(path: Path, spec: ModelSpec) -> tuple[Kind, Path]:
    """The kind and the artefact of a version folder, or of one bare artefact. Raises LoadError, or ConfigError for an unknown `backend`.

    A `model.py` makes the folder a Python model: what else lies there is its own. Otherwise exactly one file must be
    an artefact, by its suffix and its first bytes, unless `file` names it.
    """
    declared = _kind(spec.backend) if spec.backend else None
    if path.is_file():
        return declared or _kind_of(path), path
    if not path.is_dir():
        raise LoadError(f"there is no model at {path}")
    if spec.file:
        artefact = path / spec.file
        if not artefact.resolve().is_relative_to(path.resolve()) or not artefact.is_file():
            raise LoadError(f"{path} holds no file {spec.file!r}, which `file` names{_found(path)}")
        return declared or _kind_of(artefact), artefact
    if declared is None and (path / "model.py").is_file():
        return BACKENDS["python"], path / "model.py"
    if declared is None and (path / PIPELINE).is_file():
        return BACKENDS["diffusion"], path
    if declared is None and _is_checkpoint(path):
        return BACKENDS["llm"], path
    if declared is not None and declared.engine and not (declared.external and declared.files and not _is_told(spec)):
        if declared.name == "llm" and not _is_checkpoint(path):
            raise LoadError(f"{path} is no checkpoint of a language model: {CHECKPOINT}{_found(path)}")
        if declared.name == "diffusion" and not (path / PIPELINE).is_file():
            raise LoadError(f"{path} is no pipeline of diffusers: it has no {PIPELINE}{_found(path)}")
        return declared, path

    candidates: list[tuple[Kind, Path]] = []
    reasons: list[str] = []
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        if declared is not None:
            if _matches(file, declared):
                candidates.append((declared, file))
        elif file.suffix in _SUFFIXES:
            try:
                candidates.append((_kind_of(file), file))
            except LoadError as error:
                reasons.append(error.message)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        exact = [(kind, file) for kind, file in candidates if file.name in kind.files]
        if declared is not None and len(exact) == 1:
            return exact[0]
        choices = "\n".join(f"file: {file.name}    # {kind.name}" for kind, file in candidates)
        raise LoadError(f"{path} holds {len(candidates)} artefacts; write one of these lines in model.yaml:\n{choices}")
    if len(reasons) == 1:
        raise LoadError(reasons[0])
    if declared is not None:
        raise LoadError(
            f"{path} holds no {declared.name} artefact ({', '.join(declared.files)}){_found(path)}; name it in model.yaml:\nfile: NAME"
        )
    known = ", ".join(
        dict.fromkeys(
            name for kind in BACKENDS.values() if not kind.external for name in kind.files if name.startswith(".") or name == "model.py"
        )
    )
    known += f", or a language model's checkpoint: {CHECKPOINT}, or a pipeline of diffusers: {PIPELINE}"
    raise LoadError(
        "; ".join([f"{path} holds no model artefact ({known}){_found(path)}", *reasons])
        + f"; name it in model.yaml:\nfile: NAME\nbackend: KIND    # one of {', '.join(BACKENDS)}"
    )


def _is_told(spec: ModelSpec) -> bool:
    """`engine` says what is loaded, or who has."""
    return bool(spec.engine.url or spec.engine.model)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is what `save_pretrained` of transformers, or `save` of sentence-transformers, writes. Raises LoadError
    where its weights are in a form that is not read."""
    if (folder / "modules.json").is_file():
        return True
    config = folder / "config.json"
    if not config.is_file() or (b'"model_type"' not in (text := config.read_bytes()) and b'"architectures"' not in text):
        return False
    weights = [file.name for file in folder.iterdir() if file.name.endswith((".safetensors", ".safetensors.index.json"))]
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin*"))
    if not weights and pickled:
        raise LoadError(
            f"{folder} holds its weights as a pickle ({pickled[0]}); save them with save_pretrained(..., safe_serialization=True)"
        )
    return bool(weights)


def _kind(name: str) -> Kind:
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; it is one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _matches(file: Path, kind: Kind) -> bool:
    return any(file.name == name or (name.startswith(".") and file.suffix == name) for name in kind.files)


def _found(folder: Path) -> str:
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir() if not item.name.startswith("."))
    shown = names[:20] + ["..."] * (len(names) > 20)
    return f"; it holds {', '.join(shown)}" if names else "; it is empty"


def _kind_of(file: Path) -> Kind:
    """By suffix and a peek. Raises LoadError where they tell no kind, or contradict each other."""
    match file.suffix:
        case ".json":
            if b'"learner"' not in _head(file):
                raise LoadError(f'{file.name} is not an XGBoost model: it has no "learner"')
            return BACKENDS["xgboost"]
        case ".txt":
            if not _head(file).startswith(b"tree"):
                raise LoadError(f"{file.name} is not a LightGBM model: it does not start with `tree`")
            return BACKENDS["lightgbm"]
        case ".pt" | ".pth" | ".pt2":
            return BACKENDS[torch_kind(file)]
        case suffix if suffix in _SUFFIXES:
            return _SUFFIXES[suffix]
    raise LoadError(
        f"{file.name} is no artefact whose kind its name tells; write it in model.yaml:\nbackend: KIND    # one of {', '.join(BACKENDS)}"
    )


def torch_kind(file: Path) -> str:
    """`torchscript` or `torch_export`: what the archive's members tell without importing torch. Raises LoadError."""
    advice = "export the module with torch.jit.save(torch.jit.trace(module, example), ...) or torch.export.save(...)"
    try:
        with zipfile.ZipFile(file) as archive:
            # of a cut archive, zipfile may find the directory of another one inside it
            if min((member.header_offset for member in archive.infolist()), default=0):
                raise zipfile.BadZipFile
            members = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        if _head(file)[:1] == b"\x80":
            raise LoadError(f"{file.name} is a pickle of torch.save (weights, not a program); {advice}") from None
        raise LoadError(f"{file.name} is truncated or not an archive of torch's") from None
    if any("aotinductor" in member for member in members):
        raise LoadError(f"{file.name} is compiled by AOTInductor for one machine; save the program with torch.export.save(...) instead")
    if members & {"archive_format", "serialized_exported_program.json"}:
        return "torch_export"
    if "constants.pkl" in members:
        return "torchscript"
    if "data.pkl" in members:
        raise LoadError(f"{file.name} holds a state dict or a pickled module (weights, not a program); {advice}")
    raise LoadError(f"{file.name} is a zip, but neither a TorchScript nor a torch.export archive")


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096)


_SUFFIXES: dict[str, Kind] = {
    Path("x" + name if name.startswith(".") else name).suffix: kind
    for kind in BACKENDS.values()
    if not kind.external
    for name in kind.files
}
