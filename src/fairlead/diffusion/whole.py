"""Any other pipeline of diffusers, run from beginning to end: one request at a time, without a step schedule."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fairlead.core.errors import Cancelled, InvalidRequest, LoadError, ModelError
from fairlead.core.generation import ImageInfo, Paint
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.family import Inputs, State
from fairlead.diffusion.loras import Loras

SIZE = 512
"""Of pictures of a pipeline that does not tell its own."""
NUM_STEPS, GUIDANCE = 50, 7.5
FACTOR = 8


class Whole:
    """Implements `family.Family`: `denoise` is the whole call of the pipeline."""

    def __init__(self, pipe: Any, info: ImageInfo, loras: Loras, explain: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.info = info
        self.loras = loras
        self.explain = explain
        self.num_cached = 0
        self.takes = inspect.signature(pipe.__call__).parameters

    def encode(self, request: Paint, inputs: Inputs | None) -> State:
        assert request.width is not None and request.height is not None and request.seed is not None and request.num_steps is not None
        if inputs is None and "text" not in self.info.inputs:
            raise InvalidRequest(f"`image`: {type(self.pipe).__name__} needs {' and '.join(self.info.inputs)} to begin from")
        return State(
            request=request,
            group=object(),
            num_tokens=-(-request.width // 16) * -(-request.height // 16),
            latents=torch.empty(0),
            timesteps=torch.arange(request.num_steps),
            scheduler=self.pipe.scheduler,
            generator=torch.Generator().manual_seed(request.seed),
            conditioning=inputs,
        )

    def denoise(self, states: Sequence[State]) -> list[torch.Tensor]:
        """One state: no other is ever in its group."""
        (state,) = states
        self.loras.lay(state.request.loras)
        arguments = {name: value for name, value in self._arguments(state).items() if name in self.takes and value is not None}
        try:
            with torch.inference_mode():
                found = self.pipe(**arguments, output_type="np", return_dict=True)
        except ValueError as error:
            raise InvalidRequest(f"{type(self.pipe).__name__}: {error}") from error
        images = getattr(found, "images", None)
        if images is None or np.ndim(images[0]) != 3:
            raise ModelError(f"{type(self.pipe).__name__} gives no pictures")
        return [torch.from_numpy((np.asarray(images[0])[..., :3] * 255).round().astype(np.uint8))]

    def _arguments(self, state: State) -> dict[str, Any]:
        request, inputs = state.request, state.conditioning
        given = {"image": _pil(inputs.image), "mask_image": _pil(inputs.mask), "strength": request.strength} if inputs is not None else {}
        return given | {
            "prompt": request.text,
            "negative_prompt": request.negative or None,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_steps,
            "guidance_scale": request.guidance,
            "generator": state.generator,
            "callback_on_step_end": lambda pipe, step, timestep, tensors: self._between(state, step, tensors),
        }

    def _count(self, state: State) -> None:
        """The pipeline knows better how many steps it computes: fewer where it begins from a picture."""
        num_steps = getattr(self.pipe, "num_timesteps", None)
        if isinstance(num_steps, int) and num_steps > 0:
            state.timesteps = torch.arange(num_steps)

    def _between(self, state: State, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        self._count(state)
        state.step = min(step + 1, len(state.timesteps) - 1)
        if state.between is not None and state.between():
            raise Cancelled("the picture was stopped")
        return tensors

    def step(self, state: State, prediction: torch.Tensor) -> None:
        state.latents = prediction
        self._count(state)
        state.step = len(state.timesteps)

    def decode(self, states: Sequence[State]) -> list[np.ndarray]:
        return [state.latents.numpy() for state in states]

    def preview(self, state: State) -> np.ndarray | None:
        return None


def load_whole(pipe: Any, spec: DiffusionSpec, loras: Loras) -> Whole:
    """Raises LoadError where it answers no texts."""
    takes = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if "prompt" not in takes or "num_inference_steps" not in takes:
        raise LoadError(f"{name} takes no prompt, or no number of steps: only pipelines that paint from texts are served")
    factor = getattr(pipe, "vae_scale_factor", FACTOR)
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    own = getattr(pipe, "default_sample_size", None) or getattr(getattr(model, "config", None), "sample_size", None)
    size = own * factor if isinstance(own, int) else SIZE
    num_steps, guidance = (_default(takes, *pair) for pair in (("num_inference_steps", NUM_STEPS), ("guidance_scale", GUIDANCE)))
    info = ImageInfo(
        family="whole",
        width=spec.width or size,
        height=spec.height or size,
        multiple=factor,
        max_pixels=spec.max_pixels,
        num_steps=spec.num_steps or num_steps,
        max_steps=spec.max_steps,
        guidance=guidance if spec.guidance is None else spec.guidance,
        has_guidance="guidance_scale" in takes,
        has_negative="negative_prompt" in takes,
        schedulers=(),
        inputs=_begins(takes),
        loras=loras.names,
        previews=False,
    )
    watched = "callback_on_step_end" in takes
    explain = f"{name} is run whole: pictures share no steps, and one waits for the other" + (
        "" if watched else "; it cannot be stopped on the way, and tells no progress"
    )
    return Whole(pipe, info, loras, (explain,))


def _begins(takes: Any) -> tuple[Literal["text", "image", "mask"], ...]:
    if "mask_image" in takes:
        return ("image", "mask")
    if "image" not in takes:
        return ("text",)
    return ("image",) if "strength" in takes else ("text", "image")


def _default(takes: Any, name: str, otherwise: Any) -> Any:
    found = takes[name].default if name in takes else None
    return found if isinstance(found, int | float) else otherwise


def _pil(pixels: np.ndarray | None) -> Any:
    return None if pixels is None else Image.fromarray(pixels)
