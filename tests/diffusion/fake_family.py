"""A family of pictures without a model: deterministic, and it does wrong where a text says so.

| word | does |
|---|---|
| !encode | is refused when it is encoded |
| !raise | every forward with it fails |
| !nan | its numbers overflow in the first step |
| !step | its scheduler fails |
| !decode | cannot be decoded |
"""

import numpy as np
import torch

from fairlead.core.errors import InvalidRequest
from fairlead.core.generation import ImageInfo
from fairlead.diffusion.family import State

INFO = ImageInfo(
    family="fake",
    width=32,
    height=32,
    multiple=8,
    max_pixels=1 << 20,
    num_steps=4,
    max_steps=100,
    guidance=3.0,
    schedulers=("euler",),
    inputs=("text", "image", "mask"),
    modes=("exact", "turbo"),
)


class FakeFamily:
    """Implements `diffusion.family.Family`. A picture's latents depend on its seed, its text and its steps, and on nothing else."""

    def __init__(self, clock=None, info=INFO):
        self.info = info
        self.explain = ("made for tests",)
        self.num_cached = 0
        self.batches = []
        """Of every forward, the seeds."""
        self.decoded = []
        self.encoded = []
        self.clock = clock

    def encode(self, request, inputs):
        self.encoded.append(request.seed)
        if "!encode" in request.text:
            raise InvalidRequest("`text` is not to its taste")
        generator = torch.Generator().manual_seed(request.seed)
        h, w = request.height // 8, request.width // 8
        begin = 0 if inputs is None else request.num_steps - int(request.num_steps * request.strength)
        state = State(
            request=request,
            group=(request.width, request.height, request.mode),
            num_tokens=2 * (h // 2) * (w // 2),
            latents=torch.randn(1, 4, h, w, generator=generator),
            timesteps=torch.linspace(1.0, 0.0, request.num_steps)[begin:],
            scheduler=None,
            generator=generator,
            conditioning=torch.tensor(sum(request.text.encode()) % 97 / 97),
        )
        if inputs is not None:
            state.latents = state.latents + inputs.image.mean() / 255
        return state

    def denoise(self, states):
        self.batches.append([state.request.seed for state in states])
        if self.clock is not None:
            self.clock.now += 1.0
        if any("!raise" in state.request.text for state in states):
            raise RuntimeError("index out of range")
        latents = torch.cat([state.latents for state in states])
        times = torch.stack([state.timesteps[state.step] for state in states]).view(-1, 1, 1, 1)
        words = torch.stack([state.conditioning for state in states]).view(-1, 1, 1, 1)
        return list((torch.tanh(latents * times) + words).split(1))

    def step(self, state, prediction):
        if "!step" in state.request.text:
            raise ValueError("no such timestep")
        noise = torch.randn(state.latents.shape, generator=state.generator)
        state.latents = 0.9 * state.latents + 0.1 * prediction + 0.01 * noise
        if "!nan" in state.request.text:
            state.latents = state.latents / 0 * 0
        state.step += 1

    def decode(self, states):
        self.decoded.append([state.request.seed for state in states])
        if any("!decode" in state.request.text for state in states):
            raise RuntimeError("no such pixel")
        return [self._pixels(state).repeat(8, axis=0).repeat(8, axis=1) for state in states]

    def preview(self, state):
        return self._pixels(state)

    def _pixels(self, state):
        return ((state.latents[0, :3].permute(1, 2, 0).numpy() * 0.2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
