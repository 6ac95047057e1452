"""A Hugging Face checkpoint on disk: checked file by file, then loaded through transformers with its weights mapped into memory.

transformers warns where a checkpoint and a model disagree, and computes on; here every disagreement is a LoadError that
names the file.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: a checkpoint is a folder, never a download

import msgspec
import torch
import transformers
from msgspec import Meta, Struct
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fairlead.core.errors import LoadError
from fairlead.core.json_files import read_json
from fairlead.core.specs import LlmSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Stored(NamedTuple):
    """One tensor of a safetensors file."""

    file: str
    dtype: str
    """As safetensors spells it: F32, BF16, F8_E4M3, I64, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose files were found complete. Nothing of the weights is read yet but the headers."""

    folder: Path
    config: Any
    """transformers' PreTrainedConfig."""
    architecture: str
    """The first of config.json's `architectures`."""
    dtype: torch.dtype
    """What the weights are stored in."""
    tensors: dict[str, Stored]
    weights: str
    """The file to name when tensors are missing: the only one, or the index."""
    defaults: dict[str, float]
    """Sampling that generation_config.json asks for."""
    eos_ids: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        sizes = {"F64": 8, "F32": 4, "U64": 8, "I64": 8, "U32": 4, "I32": 4, "BOOL": 1, "U8": 1, "I8": 1}
        return sum(sizes.get(stored.dtype, 2) * _count(stored.shape) for stored in self.tensors.values())


class _GenerationConfig(Struct):
    """What is used of generation_config.json; null and absent are the same."""

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    do_sample: bool | None = None
    eos_token_id: int | list[int] | None = None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json, generation_config.json and the headers of the weights. Raises LoadError."""
    config = read_config(folder)
    tensors, weights = read_headers(folder)
    generation = _read_generation_config(folder)
    defaults = {name: value for name in _GenerationConfig.__struct_fields__ if (value := getattr(generation, name)) is not None}
    eos = defaults.pop("eos_token_id", None)
    if defaults.pop("do_sample", True) is False:
        defaults["temperature"] = 0.0
    if eos is None:
        eos = getattr(config.get_text_config(), "eos_token_id", None)
    return Checkpoint(
        folder=folder,
        config=config,
        architecture=config.architectures[0],
        dtype=_stored_dtype(config, tensors),
        tensors=tensors,
        weights=weights,
        defaults=defaults,
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
    )


def read_config(folder: Path) -> Any:
    """transformers' config of a folder. Raises LoadError where config.json names no model that can be computed."""
    raw = read_json(folder / "config.json")
    for key in ("model_type", "architectures"):
        if not raw.get(key):
            raise LoadError(f"{folder.name}/config.json has no `{key}`: it is no Hugging Face checkpoint, or an incomplete one")
    model_type = raw["model_type"]
    if raw.get("auto_map"):
        raise LoadError(
            f"{folder.name}/config.json has an `auto_map`: the checkpoint wants Python code of its own to be run, which is never done; take `auto_map` out if transformers' own {model_type!r} is the same model"
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise LoadError(
            f"{folder.name}/config.json says that the weights are quantised ({method}), which is not supported: serve a float32, float16 or bfloat16 checkpoint"
        )
    if model_type not in CONFIG_MAPPING:
        raise LoadError(f"{folder.name}/config.json: `model_type` {model_type!r} is not known to transformers {transformers.__version__}")
    try:
        with quiet():
            return CONFIG_MAPPING[model_type].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each of some 500 configurations raises what it likes
        raise LoadError(f"{folder.name}/config.json is not a valid {model_type!r} configuration: {_first_line(error)}") from error


def _read_generation_config(folder: Path) -> _GenerationConfig:
    path = folder / "generation_config.json"
    if not path.exists():
        return _GenerationConfig()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_GenerationConfig)
    except (msgspec.DecodeError, OSError) as error:
        raise LoadError(f"{folder.name}/{path.name}: {error}") from error


# Weights


def read_headers(folder: Path) -> tuple[dict[str, Stored], str]:
    """Every tensor by name, and the file to name when some are missing. Raises LoadError."""
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS), WEIGHTS
    if (folder / INDEX).exists():
        return _read_shards(folder), INDEX
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    if others:
        raise LoadError(
            f"{folder.name} has its weights only in {others[0]}, which is not loaded: convert it to safetensors where you trust it, e.g. `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`"
        )
    raise LoadError(f"{folder.name} has no weights: neither {WEIGHTS} nor {INDEX}")


def _read_shards(folder: Path) -> dict[str, Stored]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()):
        raise LoadError(f"{folder.name}/{INDEX} has no `weight_map` from tensors to files of the folder")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise LoadError(f"{folder.name} lacks {some(missing)} of the {len(shards)} shards that {INDEX} names")
    extra = sorted(path.name for path in folder.glob("model-*-of-*.safetensors") if path.name not in shards)
    if extra:
        raise LoadError(f"{folder.name} holds {some(extra)}, which {INDEX} does not name: the shards are not of one checkpoint")
    tensors: dict[str, Stored] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise LoadError(f"{folder.name}/{shard} lacks the tensor {name!r} that {INDEX} says it has")
    unnamed = [name for name in tensors if name not in weight_map]
    if unnamed:
        raise LoadError(f"{folder.name}/{tensors[unnamed[0]].file} holds {some(unnamed)}, which {INDEX} does not name")
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of one safetensors file: 8 bytes of length, a JSON header, the data without gaps."""
    where = f"{path.parent.name}/{path.name}"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise LoadError(f"{where} is truncated, or no safetensors file: it has {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: Stored(path.name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LoadError(f"{where} is no safetensors file: its header is damaged") from error
    if size != end:
        raise LoadError(f"{where} is {'truncated' if size < end else 'damaged'}: it has {size} bytes, its header tells of {end}")
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS and stored.dtype not in INTEGERS:
            raise LoadError(
                f"{where}: tensor {name!r} is {stored.dtype}, a quantised format that is not supported: serve a float32, float16 or bfloat16 checkpoint"
            )
    return tensors


def _stored_dtype(config: Any, tensors: dict[str, Stored]) -> torch.dtype:
    """Of most of the weights: configs that were edited by hand are wrong about it often enough."""
    sizes: dict[str, int] = {}
    for stored in tensors.values():
        if stored.dtype in FLOATS:
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + _count(stored.shape)
    return FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else torch.float32


def choose_dtype(stored: torch.dtype, spec: LlmSpec, device: str) -> torch.dtype:
    """What is computed in: what the operator wants, else the checkpoint's own as far as the device has it."""
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    if stored == torch.float64:
        return torch.float32
    if stored == torch.float16 and device == "cpu":
        return torch.bfloat16  # half precision is emulated on most CPUs
    return stored


# Models


def load_generator(checkpoint: Checkpoint, dtype: torch.dtype, attention: str) -> Any:
    """The checkpoint as transformers' model that predicts the next token. Raises LoadError."""
    try:
        auto = MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]
    except KeyError:
        auto = None
    names = [cls.__name__ for cls in (auto if isinstance(auto, tuple) else (auto,)) if cls is not None]
    wanted = checkpoint.architecture
    if wanted.lower() not in [name.lower() for name in names]:
        raise LoadError(
            f"{checkpoint.folder.name}/config.json: the architecture {wanted!r} does not predict a next token, so nothing can be generated with it"
            + (f" ({some(names)} would)" if names else "")
        )
    return load_model(transformers.AutoModelForCausalLM, checkpoint, dtype, attention)


def load_model(auto: Any, checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None, *, optional: tuple[str, ...] = ()) -> Any:
    """`auto`: transformers' Auto class; `attention` None: the model's own choice. Weights in `dtype` stay mapped from their files, so that processes share the pages.

    `optional`: prefixes of tensors that may be missing or left over. Raises LoadError.
    """
    folder = checkpoint.folder.name
    try:
        with quiet():
            model, info = auto.from_pretrained(
                checkpoint.folder,
                config=checkpoint.config,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, AssertionError) as error:
        raise LoadError(f"{folder}/{checkpoint.weights} cannot be loaded as {checkpoint.architecture}: {_first_line(error)}") from error
    name = type(model).__name__
    for key, found, needed in sorted(info["mismatched_keys"]):
        stored = checkpoint.tensors.get(key)
        raise LoadError(
            f"{folder}/{stored.file if stored else checkpoint.weights}: tensor {key!r} has the shape {list(found)}, but {name} with this config.json needs {list(needed)}"
        )
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(optional)):
        raise LoadError(f"{folder}/{checkpoint.weights} lacks {some(missing)} of {name}")
    if unexpected := sorted(key for key in info["unexpected_keys"] if not key.startswith(optional)):
        raise LoadError(f"{folder}/{checkpoint.weights} holds {some(unexpected)}, for which {name} with this config.json has no place")
    if errors := info.get("error_msgs"):
        raise LoadError(f"{folder}/{checkpoint.weights} cannot be loaded as {name}: {errors[0]}")
    _check_kinds(model, checkpoint)
    return model.eval().requires_grad_(False)


def _check_kinds(model: Any, checkpoint: Checkpoint) -> None:
    """Raises LoadError where integers are stored for weights that are numbers with a fraction: loading casts them silently."""
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    for name, stored in checkpoint.tensors.items():
        if stored.dtype in INTEGERS and (
            name.endswith("weight") or not floating.isdisjoint((name, prefix + name, name.removeprefix(prefix)))
        ):
            raise LoadError(f"{checkpoint.folder.name}/{stored.file}: tensor {name!r} is {stored.dtype}, where a floating type is needed")


def some(names: list[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and reports: what they tell becomes errors."""
    theirs: Any = transformers.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
