"""LoRA adapters of one model: folders as peft writes them, read when they are first asked for, kept within a budget of bytes."""

import math
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import regex
import safetensors.torch
import structlog
import torch
from safetensors import SafetensorError
from torch import Tensor

from fairlead.core.adapters import CONFIG, NAME, adapter_names
from fairlead.core.errors import LoadError, ModelError, NotFound, Unavailable
from fairlead.core.json_files import read_json
from fairlead.llm.checkpoint import FLOATS, Stored, read_header, some
from fairlead.llm.lora import Layout, LowRank, Weights

WEIGHTS = "adapter_model.safetensors"
MAX_REFUSED = 1000
"""Adapters that are known to be no good."""
MAX_PATTERN_CHARS = 1000
PATTERN_SECONDS = 0.2
"""A regular expression in a file of somebody else's may take for ever."""
PREFIX = "base_model.model."
CHANGES_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Ways to begin (`init_lora_weights`) that leave other weights in the base model than it had."""
REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "modules_to_save": "whole modules (`modules_to_save`)",
    "lora_bias": "a bias of its own (`lora_bias`)",
    "trainable_token_indices": "embeddings of tokens (`trainable_token_indices`)",
    "target_parameters": "parameters that are no linear layer's (`target_parameters`)",
    "layer_replication": "layers that stand several times (`layer_replication`)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Keys of adapter_config.json that make it more than a LoRA, and what to call that."""
KNOWN = {
    *("peft_type", "task_type", "inference_mode", "revision", "auto_mapping", "base_model_name_or_path", "peft_version", "_custom_modules"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "fan_in_fan_out", "runtime_config", "ensure_weight_tying"),
    *("lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size",),
}

log = structlog.get_logger("fairlead.llm")

Stamp = tuple[tuple[int, int, int, int], ...]
"""Of an adapter's files: other ones, or changed ones, have another."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One that is loaded."""

    name: str
    stamp: Stamp
    weights: Weights
    uses: "WeakSet[Use]" = field(default_factory=WeakSet)


class Use:
    """An adapter as one request has it. While it lives, the adapter stays: however a request ends, it lets go of this."""

    __slots__ = ("__weakref__", "_adapter", "identity")

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.identity = f"{adapter.name} {adapter.stamp}"
        """Another one for each content of its files."""
        adapter.uses.add(self)

    @property
    def weights(self) -> Weights:
        return self._adapter.weights


class Adapters:
    """Those of one engine. For any thread."""

    def __init__(self, folder: Path, layout: Layout, *, max_bytes: int, max_rank: int) -> None:
        """`folder`: of the adapters, in the model's."""
        self.folder = folder
        self.layout = layout
        self.max_bytes = max_bytes
        self.max_rank = max_rank
        self.num_loads = 0
        self.num_evictions = 0
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        """The least recently asked for first."""
        self._replaced: list[Adapter] = []
        """Whose files are others by now, and that are still used."""
        self._refused: dict[str, tuple[Stamp, str]] = {}
        self._taking = threading.Lock()

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    @property
    def nbytes(self) -> int:
        return sum(adapter.weights.nbytes for adapter in (*self._loaded.copy().values(), *self._replaced))

    def names(self) -> tuple[str, ...]:
        return adapter_names(self.folder)

    def take(self, name: str) -> Use:
        """Blocks while the adapter is read. Raises NotFound, ModelError for one that is no good, and Unavailable where those that
        are in use leave no room."""
        with self._taking:  # requests are read in more than one thread
            return self._take(name)

    def clear(self) -> None:
        """Let go of those that nobody uses; they are read again when they are asked for."""
        with self._taking:
            self._loaded = OrderedDict((name, adapter) for name, adapter in self._loaded.items() if adapter.uses)
            self._replaced = [adapter for adapter in self._replaced if adapter.uses]
            self.layout.forget()

    def _take(self, name: str) -> Use:
        stamp = self._stamp(name)
        adapter = self._loaded.get(name)
        if adapter is not None and adapter.stamp == stamp:
            self._loaded.move_to_end(name)
            return Use(adapter)
        before = self._refused.get(name)
        if before is not None and before[0] == stamp:
            raise ModelError(before[1])
        try:
            draft = read_draft(self.folder / name, self.layout, max_rank=self.max_rank, max_bytes=self.max_bytes)
            self._make_room(name, draft.nbytes)
            weights = self.layout.keep(draft.read())
        except LoadError as error:
            message = f"the adapter '{name}' cannot be used: {error.message}"
            log.error("adapter refused", adapter=name, reason=error.message)
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[name] = stamp, message
            raise ModelError(message) from None
        self.num_loads += 1
        self._loaded[name] = adapter = Adapter(name, stamp, weights)
        log.info("adapter loaded", adapter=name, bytes=weights.nbytes)
        return Use(adapter)

    def _stamp(self, name: str) -> Stamp:
        """Raises NotFound."""
        root = self.folder.parent.resolve()
        found = []
        try:
            if not NAME.fullmatch(name):
                raise FileNotFoundError
            for file in (self.folder / name / CONFIG, self.folder / name / WEIGHTS):
                if not file.resolve().is_relative_to(root):
                    found.append((0, 0, 0, 0))  # it leads out of the model's folder: refused when it is read
                    continue
                told = file.stat()
                found.append((told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns))
        except FileNotFoundError:
            if found:  # a config without weights is an adapter, though no good
                return (*found, (0, 0, 0, 0))
            raise NotFound(f"the model has no adapter '{name[:64]}'") from None
        except OSError as error:
            raise ModelError(f"the adapter '{name}' cannot be read: {error.strerror}") from None
        return tuple(found)

    def _make_room(self, name: str, nbytes: int) -> None:
        """For so many bytes under this name. Raises Unavailable; then nothing has changed but that older content of it is set aside."""
        old = self._loaded.pop(name, None)
        if old is not None:
            self._replaced.append(old)
        self._replaced = [adapter for adapter in self._replaced if adapter.uses]
        idle = [adapter for adapter in self._loaded.values() if not adapter.uses]
        missing = self.nbytes + nbytes - self.max_bytes
        if missing > sum(adapter.weights.nbytes for adapter in idle):
            raise Unavailable(
                f"the adapter '{name}' finds no room: requests use {len(self._loaded) - len(idle)} others, and `llm.lora_bytes` is {self.max_bytes}"
            )
        for adapter in idle:
            if missing <= 0:
                break
            del self._loaded[adapter.name]
            missing -= adapter.weights.nbytes
            self.num_evictions += 1
            log.info("adapter evicted", adapter=adapter.name, for_=name)
        self.layout.forget()


# Files


class Draft(NamedTuple):
    """An adapter whose config and header are in order."""

    nbytes: int
    """As the layout will keep it."""
    read: Callable[[], dict[str, LowRank]]
    """By part. Raises LoadError."""


def read_draft(folder: Path, layout: Layout, *, max_rank: int, max_bytes: int) -> Draft:
    """Raises LoadError with one sentence that names the file."""
    inside = folder.parent.parent.resolve()
    for name in (CONFIG, WEIGHTS):
        file = folder / name
        if not file.resolve().is_relative_to(inside):
            raise LoadError(f"{folder.name}/{name} is a link that leaves the model's folder: put the file there (cp -L)")
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise LoadError(f"{folder.name}/{name} is no plain file")
    config = read_json(folder / CONFIG)
    where = f"{folder.name}/{CONFIG}"
    _check_kind(config, where)
    path = folder / WEIGHTS
    if not path.exists():
        others = sorted(other.name for other in folder.iterdir() if other.suffix in (".bin", ".pt", ".pth"))
        raise LoadError(
            f"{folder.name} has its weights only in {others[0]}, which is not loaded: save the adapter as safetensors where you trust it"
            if others
            else f"{folder.name} has no {WEIGHTS}"
        )
    tensors = read_header(path)
    where_weights = f"{folder.name}/{WEIGHTS}"
    names = _adapted(tensors, where_weights)
    hint = config.get("base_model_name_or_path")
    made_for = f" (it was made for {hint!r})" if isinstance(hint, str) and hint else ""
    if unknown := [name for name in names if name not in layout.parts]:
        raise LoadError(f"{where_weights} changes {some(unknown)}, for which this model has no place{made_for}")
    matches = _targets(config, where)
    if extra := [name for name in names if not matches(name)]:
        raise LoadError(f"{where_weights} changes {some(extra)}, which {CONFIG} does not name")
    if missing := [name for name in layout.parts if name not in names and matches(name)]:
        raise LoadError(f"{where_weights} lacks the weights of {some(missing)}, which {CONFIG} names")
    if not names:
        raise LoadError(f"{where_weights} changes nothing")
    scales, ranks = {}, {}
    rank_of, alpha_of = _pattern(config, "rank_pattern", where), _pattern(config, "alpha_pattern", where)
    for name in names:
        part = layout.parts[name]
        rank, alpha = rank_of(name, _number(config, "r", where)), alpha_of(name, _number(config, "lora_alpha", where))
        if rank != int(rank) or rank < 1:
            raise LoadError(f"{where}: the rank of {name} must be a positive number, not {rank:g}")
        if rank > max_rank:
            raise LoadError(f"{where}: the rank of {name} is {rank:g}, and `llm.max_lora_rank` is {max_rank}")
        for letter, needed in (("A", (int(rank), part.num_inputs)), ("B", (part.num_outputs, int(rank)))):
            stored = tensors[f"{PREFIX}{name}.lora_{letter}.weight"]
            if stored.shape != needed:
                raise LoadError(
                    f"{where_weights}: lora_{letter} of {name} has the shape {list(stored.shape)}, where this model and {CONFIG} need {list(needed)}{made_for}"
                )
        ranks[name] = int(rank)
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    nbytes = layout.nbytes(ranks)
    if nbytes > max_bytes:
        raise LoadError(f"{where_weights} takes {nbytes} bytes, more than all of `llm.lora_bytes` ({max_bytes})")
    return Draft(nbytes, lambda: _read(path, tensors, scales, where_weights))


def _read(path: Path, tensors: Mapping[str, Stored], scales: Mapping[str, float], where: str) -> dict[str, LowRank]:
    try:
        # read, not mapped: a file that is cut short meanwhile would end the process
        found = safetensors.torch.load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LoadError(f"{where} cannot be read: {str(error).splitlines()[0]}") from error
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != {name: stored.shape for name, stored in tensors.items()}:
        raise LoadError(f"{where} changed while it was read")
    adapter = {}
    for name, scale in scales.items():
        a, b = (found[f"{PREFIX}{name}.lora_{letter}.weight"].to(torch.float32) for letter in "AB")
        adapter[name] = LowRank(_finite(a, name, where), _finite(b * scale, name, where))
    return adapter


def _finite(tensor: Tensor, name: str, where: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise LoadError(f"{where}: the weights of {name} hold infinity or NaN")
    return tensor


def _adapted(tensors: Mapping[str, Stored], where: str) -> list[str]:
    """The modules that have an A and a B. Raises LoadError for whatever else the file holds."""
    names: dict[str, set[str]] = {}
    for key, stored in tensors.items():
        if "lora_embedding" in key or "embed_tokens" in key:
            raise LoadError(f"{where} changes embeddings ({key}), which is not supported")
        if "lora_magnitude_vector" in key:
            raise LoadError(f"{where} is a DoRA, which is not supported ({key})")
        name, dot, letter = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(PREFIX) or not key.endswith(".weight") or not dot or letter not in ("A", "B"):
            raise LoadError(f"{where} holds {key[:200]}, which is not a LoRA's: only linear layers are adapted")
        if stored.dtype not in FLOATS:
            raise LoadError(f"{where}: tensor {key} is {stored.dtype}, where a floating type is needed")
        names.setdefault(name, set()).add(letter)
    if half := [name for name, letters in names.items() if len(letters) < 2]:
        raise LoadError(f"{where} has only one of lora_A and lora_B of {some(half)}")
    return list(names)


# adapter_config.json


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    """Raises LoadError for what is no plain LoRA."""
    if config.get("peft_type", "LORA") != "LORA":
        raise LoadError(f"{where}: `peft_type` is {config['peft_type']!r}, and only LORA is supported")
    for key, value in config.items():
        if key in REFUSED and value:
            raise LoadError(f"{where}: the adapter has {REFUSED[key]}, which is not supported")
        if key not in KNOWN and key not in REFUSED and value:
            raise LoadError(f"{where}: `{key[:100]}` is not known here, and may change what the adapter means")
    if config.get("bias", "none") != "none":
        raise LoadError(f"{where}: the adapter changes biases (`bias: {config['bias']}`), which is not supported")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_THE_BASE):
        raise LoadError(
            f"{where}: training began with {begun!r}, which changes the base model's own weights: convert it to a plain LoRA (peft: `path_initial_model_for_weight_conversion`)"
        )


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key, 8)  # peft's default of both
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadError(f"{where}: `{key}` must be a number, not {value!r:.100}")
    return float(value)


def _pattern(config: Mapping[str, Any], key: str, where: str) -> Callable[[str, float], float]:
    """The number that a pattern has for a module, else the one given, as peft's `get_pattern_key`."""
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise LoadError(f"{where}: `{key}` must be an object of numbers")
    numbers = {_compiled(rf"(.*\.)?({pattern})$", key, where): _number(given, pattern, where) for pattern in given}

    def of(name: str, otherwise: float) -> float:
        return next((number for pattern, number in numbers.items() if _matched(pattern.match, name, key, where)), otherwise)

    return of


def _targets(config: Mapping[str, Any], where: str) -> Callable[[str], bool]:
    """Whether the adapter changes a module, as peft's `check_target_module_exists`."""
    wanted = config.get("target_modules")
    named = _named(wanted, "target_modules", where)
    excluded = _named(config["exclude_modules"], "exclude_modules", where) if config.get("exclude_modules") else lambda name: False
    layers, prefixes = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return lambda name: named(name) and not excluded(name)
    if isinstance(wanted, str):
        raise LoadError(f"{where}: `layers_to_transform` goes with a list of `target_modules`, not with a pattern")
    indexes = layers if isinstance(layers, list) else [layers]
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indexes):
        raise LoadError(f"{where}: `layers_to_transform` must hold numbers of layers")
    if not isinstance(prefixes, list) or not all(isinstance(prefix, str) for prefix in prefixes):
        raise LoadError(f"{where}: `layers_pattern` must be a text, or a list of texts")
    patterns = [_compiled(rf"(?:^|.*?\.){prefix}\.(?P<idx>\d+)\.", "layers_pattern", where) for prefix in prefixes]
    patterns = patterns or [_compiled(r".*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern", where)]

    def in_layers(name: str) -> bool:
        found = next((found for pattern in patterns if (found := _matched(pattern.match, name, "layers_pattern", where))), None)
        return found is not None and int(found["idx"]) in indexes

    return lambda name: named(name) and not excluded(name) and in_layers(name)


def _named(wanted: Any, key: str, where: str) -> Callable[[str], bool]:
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return lambda name: True
        pattern = _compiled(wanted, key, where)
        return lambda name: _matched(pattern.fullmatch, name, key, where) is not None
    if not isinstance(wanted, list) or not all(isinstance(each, str) for each in wanted):
        raise LoadError(f"{where}: `{key}` must be a list of modules, or a pattern")
    exact, endings = frozenset(wanted), tuple(f".{each}" for each in wanted)
    return lambda name: name in exact or name.endswith(endings)


def _compiled(pattern: str, key: str, where: str) -> Any:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise LoadError(f"{where}: `{key}` holds a pattern of more than {MAX_PATTERN_CHARS} characters")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise LoadError(f"{where}: `{key}` holds {pattern!r}, which is no regular expression: {error}") from None


def _matched(match: Callable[..., Any], name: str, key: str, where: str) -> Any:
    try:
        return match(name, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise LoadError(f"{where}: `{key}` holds a pattern that takes too long to match") from None
