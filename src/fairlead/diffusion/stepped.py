"""What all families share that run step by step: the loop of a diffusers pipeline, taken apart.

A family adds how a prompt becomes conditioning, how its model is called, and how its latents are laid out. `conditioning` is a
dict of tensors whose rows are those of the forward: [unconditional, conditional] with guidance, else one.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Struct

from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.generation import ImageInfo, Paint
from fairlead.diffusion.family import Inputs, State
from fairlead.diffusion.first_block import FirstBlockCache
from fairlead.diffusion.loras import Loras
from fairlead.diffusion.modes import Modes
from fairlead.diffusion.prompts import PromptCache
from fairlead.diffusion.schedulers import draws, estimate, renoised, scaled
from fairlead.diffusion.vae import Vae, from_uint8, noise_like, to_uint8

Conditioning = dict[str, torch.Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])


def inferred(method: Method) -> Method:
    """Without gradients."""
    return cast(Method, torch.inference_mode()(method))


class Traits(Struct, frozen=True, kw_only=True):
    """What a checkpoint's configuration tells of the pictures that it makes."""

    width: int
    """Usual, in pixels."""
    height: int
    multiple: int
    num_steps: int = 0
    """Usual; 0: as the pipeline has it."""
    has_guidance: bool = True
    has_negative: bool = True
    only_inpaints: bool = False


@dataclass(slots=True)
class Parts:
    """What a family is made of, loaded."""

    pipe: Any
    model: Any
    """The one that each step calls."""
    vae: Vae
    schedulers: Mapping[str, Any]
    loras: Loras
    prompts: PromptCache[Any]
    modes: Modes
    first_block: FirstBlockCache
    info: ImageInfo
    explain: tuple[str, ...]
    tiling_pixels: int


class Original(Struct):
    """Of a picture that is painted into."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    """1 where it is painted anew."""


class Stepped:
    """Implements `family.Family` but for `condition`, `forward` and the layout."""

    schedulers: ClassVar[Mapping[str, tuple[str, dict[str, Any]]]]
    """Those that can sample what such models predict."""
    model_name: ClassVar[str]
    """Of the component that each step calls."""
    needs: ClassVar[tuple[str, ...]]
    """Components without which it cannot run."""
    only_inpaints = False
    """Whether the model takes a mask and what is left of the picture as channels of every step."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.info = parts.info
        self.explain = parts.explain
        self.num_cached = 0
        self.device, self.dtype = parts.model.device, parts.model.dtype

    # What a family says

    @classmethod
    def traits(cls, model: Any, vae: Vae) -> Traits:
        raise NotImplementedError

    def condition(self, request: Paint, guided: bool) -> Conditioning:
        raise NotImplementedError

    def readers(self) -> dict[Any, int]:
        """Tokenizers, and how many tokens of each are read; one of them must have room for the text."""
        raise NotImplementedError

    def embed(self, text: str) -> Conditioning:
        """What the text encoders say of one text."""
        raise NotImplementedError

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, states: Sequence[State]) -> torch.Tensor:
        """The model's output for rows."""
        raise NotImplementedError

    def guided(self, request: Paint) -> bool:
        """Whether classifier-free guidance asks for a second row."""
        return request.guidance is not None and request.guidance > 1

    def set_timesteps(self, scheduler: Any, request: Paint) -> None:
        scheduler.set_timesteps(request.num_steps)

    def first_step(self, request: Paint) -> int:
        """Of one that begins from a picture, rounded as diffusers does."""
        assert request.num_steps is not None and request.strength is not None
        return request.num_steps - int(request.num_steps * request.strength)

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """As the model takes them."""
        return latents

    def unpacked(self, latents: torch.Tensor, request: Paint) -> torch.Tensor:
        """[1, C, h, w] again."""
        return latents

    # What the families share

    def embedded(self, request: Paint, field: str) -> Conditioning:
        """Of `text` or `negative`. A LoRA may reach into the text encoders, too."""
        text: str = getattr(request, field)
        rows: Conditioning = self.parts.prompts.get((text, request.loras), lambda: self._read(field, text))
        return rows

    def _read(self, field: str, text: str) -> Conditioning:
        sizes = {most: len(tokenizer(text).input_ids) for tokenizer, most in self.readers().items()}
        if all(size > most for most, size in sizes.items()):
            most = max(sizes)
            raise InvalidRequest(f"`{field}` has {sizes[most]} tokens, and this model reads {most}: what comes after would have no effect")
        return self.embed(text)

    @inferred
    def encode(self, request: Paint, inputs: Inputs | None) -> State:
        assert request.width is not None and request.height is not None and request.seed is not None
        guided = self.guided(request)
        if request.negative and not guided:
            raise InvalidRequest("`negative` needs `guidance` above 1: without it nothing steers away from a text")
        self.parts.loras.lay(request.loras)
        conditioning = self.condition(request, guided)
        generator = torch.Generator().manual_seed(request.seed)
        scheduler = copy.deepcopy(self.parts.schedulers[request.scheduler])
        self.set_timesteps(scheduler, request)
        timesteps = scheduler.timesteps
        if inputs is not None:
            begin = self.first_step(request) * scheduler.order
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
        state = State(
            request=request,
            group=None,
            num_tokens=0,
            latents=torch.empty(0),
            timesteps=timesteps,
            scheduler=scheduler,
            generator=generator,
            conditioning=conditioning,
        )
        self.begin(state, inputs)
        h, w = request.height // self.parts.vae.factor, request.width // self.parts.vae.factor
        state.num_tokens = (1 + guided) * -(-h // 2) * -(-w // 2)
        shapes = tuple((name, tuple(rows.shape)) for name, rows in conditioning.items())
        state.group = (request.width, request.height, shapes, request.loras, request.mode)
        return state

    def begin(self, state: State, inputs: Inputs | None) -> None:
        """Noise, or as much of it as `strength` wants over a picture. Draws in the order in which diffusers does."""
        request, scheduler, vae = state.request, state.scheduler, self.parts.vae
        assert request.width is not None and request.height is not None
        shape = (1, vae.num_channels, request.height // vae.factor, request.width // vae.factor)
        whole = inputs is None or (inputs.mask is not None and request.strength == 1.0)
        image = None
        if inputs is not None and not (whole and self.only_inpaints):
            image = vae.encode(from_uint8(inputs.image), state.generator).to(self.device, self.dtype)
            image = image if inputs.mask is None else image.contiguous()  # as diffusers' copies are: the layout chooses kernels
        noise = noise_like(shape, state.generator, self.device, self.dtype)
        if whole:
            latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            assert image is not None
            latents = renoised(scheduler, image, noise, state.timesteps[:1])
        state.latents = self.packed(latents)
        if inputs is not None and inputs.mask is not None:
            self.paint_into(state, inputs, image, noise)
        elif self.only_inpaints:
            raise Unsupported("`mask`: this model only paints into pictures: it needs an `image` and a `mask`")

    def paint_into(self, state: State, inputs: Inputs, image: torch.Tensor | None, noise: torch.Tensor) -> None:
        """Where the mask is black, every step puts the picture back, with the noise of its timestep."""
        assert image is not None
        mask = self.mask(inputs, noise).expand_as(noise)
        state.original = Original(latents=self.packed(image), noise=self.packed(noise), mask=self.packed(mask))
        noise_like(tuple(noise.shape), state.generator, self.device, self.dtype)  # diffusers encodes the masked picture, which is not used

    def mask(self, inputs: Inputs, latents: torch.Tensor) -> torch.Tensor:
        """[1, 1, h, w]: 1 where it is painted anew."""
        assert inputs.mask is not None
        pixels = torch.from_numpy((inputs.mask >= 128).astype(np.float32))[None, None]
        return F.interpolate(pixels, size=latents.shape[-2:]).to(self.device, self.dtype)

    @inferred
    def denoise(self, states: Sequence[State]) -> list[torch.Tensor]:
        mode = states[0].request.mode
        self.parts.loras.lay(states[0].request.loras)
        guided = self.guided(states[0].request)
        now = [state.timesteps[state.step] for state in states]
        latents = torch.cat([scaled(state.scheduler, state.latents, at) for state, at in zip(states, now, strict=True)])
        timesteps = torch.stack(now).float()
        if self.device.type == "cuda":  # from other memory the copy would wait for the step before
            timesteps = timesteps.pin_memory()
        timesteps = timesteps.to(self.device, non_blocking=True)
        conditioning = _stacked([state.conditioning for state in states])
        if guided:
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        with self.parts.modes.entered(mode):
            rows = self._cached(states, latents, timesteps, conditioning, 1 + guided).to(self.dtype)
        if not guided:
            return list(rows.split(1))
        pairs = zip(rows[: len(states)].split(1), rows[len(states) :].split(1), states, strict=True)
        return [without + state.request.guidance * (with_text - without) for without, with_text, state in pairs]

    def _cached(
        self, states: Sequence[State], latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, rows_each: int
    ) -> torch.Tensor:
        """The model's output, without what the first-block cache knows already."""
        mode = states[0].request.mode
        threshold = self.parts.modes.thresholds[mode]
        wanted = len(latents)
        filled = self.parts.modes.num_rows(wanted, mode)
        if filled > wanted:
            latents, timesteps = _filled(latents, filled), _filled(timesteps, filled)
            conditioning = {name: _filled(rows, filled) for name, rows in conditioning.items()}
        if not threshold:
            return self.forward(latents, timesteps, conditioning, states)[:wanted]
        before = [(state.cache or [None] * rows_each)[row] for row in range(rows_each) for state in states]
        before += [before[-1]] * (filled - wanted)
        output, after = self.parts.first_block.run(before, threshold, lambda: self.forward(latents, timesteps, conditioning, states))
        for number, state in enumerate(states):
            own = [number + row * len(states) for row in range(rows_each)]
            self.num_cached += all(after[row] is before[row] for row in own)
            state.cache = [after[row] for row in own]
        return output[:wanted]

    @inferred
    def step(self, state: State, prediction: torch.Tensor) -> None:
        scheduler, latents, now = state.scheduler, state.latents, state.timesteps[state.step]
        output = scheduler.step(prediction, now, latents, **draws(scheduler, state.generator))
        state.step += 1
        state.latents = output.prev_sample
        if state.request.preview_steps:
            state.estimate = estimate(scheduler, output, latents, prediction, now)
        if isinstance(state.original, Original):
            kept = state.original.latents
            if not state.done:
                kept = renoised(scheduler, kept, state.original.noise, state.timesteps[state.step : state.step + 1])
            state.latents = (1 - state.original.mask) * kept + state.original.mask * state.latents

    @inferred
    def decode(self, states: Sequence[State]) -> list[np.ndarray]:
        """Pictures of one size together, as many as are less than one that is decoded in tiles."""
        found: dict[int, np.ndarray] = {}
        alike: dict[tuple[int, ...], list[int]] = {}
        unpacked = [self.unpacked(state.latents, state.request) for state in states]
        for number, latents in enumerate(unpacked):
            alike.setdefault(tuple(latents.shape), []).append(number)
        for shape, numbers in alike.items():
            most = max(self.parts.tiling_pixels // (shape[-1] * shape[-2] * self.parts.vae.factor**2), 1)
            for at in range(0, len(numbers), most):
                some = numbers[at : at + most]
                found |= dict(zip(some, to_uint8(self.parts.vae.decode(torch.cat([unpacked[number] for number in some]))), strict=True))
        return [found[number] for number in range(len(states))]

    @inferred
    def preview(self, state: State) -> np.ndarray | None:
        return self.parts.vae.preview(self.unpacked(state.latents if state.estimate is None else state.estimate, state.request))


def _stacked(each: list[Conditioning]) -> Conditioning:
    """First the unconditional rows of all, then the conditional ones."""
    if len(each) == 1:
        return each[0]
    return {
        name: torch.cat([conditioning[name][row : row + 1] for row in range(len(rows)) for conditioning in each])
        for name, rows in each[0].items()
    }


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """With copies of the last one."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])])
