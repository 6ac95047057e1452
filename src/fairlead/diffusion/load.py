"""A folder as a family: checked file by file, then loaded through diffusers, from safetensors only and without its code."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: a pipeline is a folder, never a download

import diffusers
import safetensors
import torch
import transformers
from msgspec import structs

from fairlead.core.errors import LoadError
from fairlead.core.generation import ImageInfo
from fairlead.core.json_files import read_json
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.family import Family
from fairlead.diffusion.first_block import FirstBlockCache
from fairlead.diffusion.flux import Flux
from fairlead.diffusion.loras import LOAD_ERRORS, Loras, first_line, load_loras
from fairlead.diffusion.modes import choose_modes
from fairlead.diffusion.prompts import PromptCache
from fairlead.diffusion.schedulers import offered
from fairlead.diffusion.sd import StableDiffusion
from fairlead.diffusion.sd3 import StableDiffusion3
from fairlead.diffusion.stepped import Parts, Stepped, Traits
from fairlead.diffusion.vae import PixelSpace, Vae
from fairlead.diffusion.whole import load_whole

INDEX = "model_index.json"
NO_PIPELINE = "it is no pipeline of diffusers"
FAMILIES: dict[str, tuple[str, type[Stepped]]] = {
    "StableDiffusionPipeline": ("sd", StableDiffusion),
    "StableDiffusionInpaintPipeline": ("sd", StableDiffusion),
    "StableDiffusionXLPipeline": ("sd", StableDiffusion),
    "StableDiffusion3Pipeline": ("sd3", StableDiffusion3),
    "FluxPipeline": ("flux", Flux),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are not used: pictures are moderated by filters, and no pictures are put into prompts."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_family(folder: Path, spec: DiffusionSpec, *, device: str = "cpu", threads: int = 0) -> Family:
    """The pipeline of `folder`, ready to compute. Raises LoadError with one sentence that names the file or what is not supported."""
    if threads:
        torch.set_num_threads(threads)
    components = read_index(folder)
    name = components.pop("_class_name")
    stored = {component: check_component(folder, component) for component in components}
    family, cls = FAMILIES.get(name, ("whole", None))
    for component in cls.needs if cls else ():
        if component not in components:
            raise LoadError(f"{folder.name}/{INDEX} has no {component!r}, which {name} needs")
    model = stored.get(cls.model_name) if cls else next((dtype for dtype in stored.values() if dtype), None)
    dtype = choose_dtype(spec, model, device)
    diffusers.utils.logging.set_verbosity_error()  # its warnings repeat what people ask for
    with quiet():
        pipe = load_pipe(folder, name, components, dtype)
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        loras = load_loras(pipe, folder / spec.loras)
        if cls is None:
            return load_whole(pipe, spec, loras)
        return build(pipe, family, cls, spec, loras, device)


def read_index(folder: Path) -> dict[str, str]:
    """Of model_index.json: the pipeline's class under `_class_name`, and the class of every component that is to be loaded."""
    index = read_json(folder / INDEX, otherwise=NO_PIPELINE)
    name = index.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        custom = "; Python code of a checkpoint's own is never run" if isinstance(name, list) else ""
        raise LoadError(f"{folder.name}/{INDEX}: {name!r} is no pipeline of diffusers {diffusers.__version__}{custom}")
    found = {"_class_name": name}
    for component, entry in index.items():
        if not isinstance(entry, list) or component.startswith("_"):
            continue
        library, cls = entry if len(entry) == 2 else (None, None)
        if library is None or component in LEFT_OUT:
            continue
        home = (
            diffusers.pipelines
            if hasattr(diffusers.pipelines, str(library))
            else {"diffusers": diffusers, "transformers": transformers}.get(library)
        )
        if home is None or not component.isidentifier() or not isinstance(cls, str):
            raise LoadError(
                f"{folder.name}/{INDEX}: {component!r} comes from {library!r}, and only components of diffusers and transformers are loaded: Python code of a checkpoint's own is never run"
            )
        found[component] = cls
    return found


def check_component(folder: Path, component: str) -> str | None:
    """How its weights are stored (F32, BF16, ...); None for one without weights. Raises LoadError."""
    home = folder / component
    if not home.is_dir():
        raise LoadError(f"{folder.name} has no {component}, which {INDEX} names")
    for path in sorted(home.glob("*.json")):
        config = read_json(path, otherwise=NO_PIPELINE)
        if config.get("auto_map"):
            raise LoadError(f"{component}/{path.name} has an `auto_map`: Python code of a checkpoint's own is never run")
    weights = sorted(home.glob("*.safetensors"))
    pickled = sorted(path.name for path in home.iterdir() if path.suffix in PICKLED)
    if pickled and not weights:
        raise LoadError(
            f"{component}/{pickled[0]} is not loaded, because reading it may run code: convert it where you trust it, e.g. `pipe.save_pretrained(folder, safe_serialization=True)`"
        )
    dtypes = [_stored(path) for path in weights]
    return dtypes[0] if dtypes else None


def _stored(path: Path) -> str:
    """How the first tensor of a safetensors file is stored; the library checks that the file is whole."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return next((file.get_slice(name).get_dtype() for name in file.keys()), "F32")  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise LoadError(f"{path.parent.name}/{path.name} is no whole safetensors file: {first_line(error)}") from error


def choose_dtype(spec: DiffusionSpec, stored: str | None, device: str) -> torch.dtype:
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    own = STORED.get(stored or "", torch.float32)
    return torch.float32 if device == "cpu" else torch.bfloat16 if own == torch.float32 else own


def load_pipe(folder: Path, name: str, components: dict[str, str], dtype: torch.dtype) -> Any:
    cls = getattr(diffusers, name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    absent: dict[str, Any] = {
        each.name: None for each in parameters if each.name in LEFT_OUT or (each.default is each.empty and each.name not in components)
    }
    if any(each.name == "requires_safety_checker" for each in parameters):
        absent["requires_safety_checker"] = False
    try:
        return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **absent)
    except LOAD_ERRORS as error:
        raise LoadError(f"{folder.name} cannot be loaded as {name}: {first_line(error)}") from error


def build(pipe: Any, family: str, cls: type[Stepped], spec: DiffusionSpec, loras: Loras, device: str) -> Stepped:
    model, first_block = getattr(pipe, cls.model_name), FirstBlockCache(getattr(pipe, cls.model_name))
    vae = find_vae(pipe, model, spec)
    modes = choose_modes(spec, model, device=device, caches=first_block.works)
    schedulers = offered(pipe.scheduler, cls.schedulers)
    with torch.inference_mode():
        vae.fit()
    info = describe(pipe, spec, cls.traits(model, vae), vae)
    info = structs.replace(info, family=family, schedulers=tuple(schedulers), loras=loras.names, modes=modes.offered)
    explain = (
        f"pipeline: {type(pipe).__name__} step by step, computed in {str(model.dtype).removeprefix('torch.')}",
        f"vae: {type(vae.module).__name__}, {vae.factor} pixels a latent"
        if vae.module is not None
        else "vae: none, the model computes pixels",
        f"schedulers: {', '.join(schedulers)}",
        modes.explain,
    )
    parts = Parts(
        pipe=pipe,
        model=model,
        vae=vae,
        schedulers=schedulers,
        loras=loras,
        prompts=PromptCache(spec.prompt_cache),
        modes=modes,
        first_block=first_block,
        info=info,
        explain=explain,
        tiling_pixels=spec.tiling_pixels,
    )
    return cls(parts)


def find_vae(pipe: Any, model: Any, spec: DiffusionSpec) -> Vae:
    """The pipeline's own; where model_index.json says `"vae": [null, null]`, the model computes pixels."""
    if pipe.vae is None:
        return PixelSpace(model.config.in_channels)
    if pipe.vae.dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    return Vae(pipe.vae, spec.tiling_pixels)


def describe(pipe: Any, spec: DiffusionSpec, traits: Traits, vae: Vae) -> ImageInfo:
    """Defaults are the checkpoint's, and the pipeline's own where it has none. Raises LoadError where the spec's do not fit."""
    takes = inspect.signature(pipe.__call__).parameters
    guidance = takes["guidance_scale"].default if spec.guidance is None else spec.guidance
    info = ImageInfo(
        family="",
        width=spec.width or traits.width,
        height=spec.height or traits.height,
        multiple=traits.multiple,
        max_pixels=spec.max_pixels,
        num_steps=spec.num_steps or traits.num_steps or takes["num_inference_steps"].default,
        max_steps=spec.max_steps,
        guidance=guidance if traits.has_guidance else 0.0,
        has_guidance=traits.has_guidance,
        has_negative=traits.has_negative,
        inputs=("image", "mask") if traits.only_inpaints else ("text", "image", "mask"),
    )
    return checked(info)


def checked(info: ImageInfo) -> ImageInfo:
    """Raises LoadError where its defaults are not within its limits."""
    for name, size in (("width", info.width), ("height", info.height)):
        if size % info.multiple:
            raise LoadError(f"diffusion.{name}: {size} is no multiple of {info.multiple}, as this model needs")
    if info.width * info.height > info.max_pixels:
        raise LoadError(
            f"diffusion.max_pixels: {info.max_pixels} are fewer than those of a picture of the usual size, {info.width}x{info.height}; raise it, or set diffusion.width and height"
        )
    if info.num_steps > info.max_steps:
        raise LoadError(
            f"diffusion.max_steps: {info.max_steps} are fewer than the usual {info.num_steps}; raise it, or set diffusion.num_steps"
        )
    return info


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notes of the libraries."""
    logs: Any = transformers.utils.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
