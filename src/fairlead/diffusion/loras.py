"""Low-rank weights beside a pipeline's own: all loaded at the start, of which each request lays its choice over the model."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from fairlead.core.errors import LoadError
from fairlead.core.generation import Lora

LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, SafetensorError)


class Loras:
    """A set is laid for the whole model, so all pictures of a forward share it."""

    def __init__(self, adapters: dict[str, str], layers: list[Any]) -> None:
        self.adapters = adapters
        """peft's name of each; theirs may hold no dots."""
        self.layers = layers
        """Those of peft, which stand where the model's own were."""
        self.laid: tuple[Lora, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def lay(self, wanted: tuple[Lora, ...]) -> None:
        if not self.adapters or wanted == self.laid:
            return
        for layer in self.layers:
            layer.enable_adapters(bool(wanted))
            if wanted:
                layer.set_adapter([self.adapters[lora.name] for lora in wanted])
            for lora in wanted:
                layer.set_scale(self.adapters[lora.name], lora.scale)
        self.laid = wanted


def load_loras(pipe: Any, folder: Path) -> Loras:
    """Every *.safetensors of `folder`. Raises LoadError naming the file."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")) if folder.is_dir() else []
    if others:
        raise LoadError(f"{folder.name}/{others[0]}: a LoRA is loaded from safetensors only")
    if files and not hasattr(pipe, "load_lora_weights"):
        raise LoadError(f"{folder.name}/{files[0].name}: {type(pipe).__name__} takes no LoRAs")
    adapters = {path.stem: f"lora_{number}" for number, path in enumerate(files)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for path in files:
            _load(pipe, path, adapters[path.stem])
    components = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)] if files else []
    return Loras(adapters, [layer for component in components for layer in component.modules() if isinstance(layer, BaseTunerLayer)])


def _load(pipe: Any, path: Path, adapter: str) -> None:
    where = f"{path.parent.name}/{path.name}"
    try:
        pipe.load_lora_weights(
            path.parent, weight_name=path.name, adapter_name=adapter, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except LOAD_ERRORS as error:
        raise LoadError(f"{where} is no LoRA for {type(pipe).__name__}: {first_line(error)}") from error
    if not any(adapter in names for names in pipe.get_list_adapters().values()):
        raise LoadError(f"{where} is no LoRA for {type(pipe).__name__}: none of its tensors has a place in the model")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
