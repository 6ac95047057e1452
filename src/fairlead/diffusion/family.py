"""What the engine asks of a family of image models: encode, denoise, step, decode.

The loop of a diffusers pipeline is taken apart into these four, so that pictures of several requests, each at a step of its
own, can share one forward (as in step-level batching of vLLM-Omni and of "PatchedServe"). All methods are called from the
engine's thread, except `decode`, which a thread beside it calls.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from msgspec import Struct

from fairlead.core.generation import ImageInfo, Paint


class Inputs(Struct, frozen=True):
    """What a picture begins from, decoded by the thread that reads requests, so that no step waits for it."""

    image: np.ndarray
    """uint8 [height, width, 3], of the request's own width and height."""
    mask: np.ndarray | None = None
    """uint8 [height, width]: 255 where it is painted anew."""


class State(Struct, kw_only=True):
    """One picture under way."""

    request: Paint
    """With every default filled in: width, height, seed (this picture's own), num_steps, guidance, scheduler, strength."""
    group: Hashable
    """Pictures of one group can share a forward: shapes, LoRAs, guidance or not, and whatever else the family needs equal."""
    num_tokens: int
    """Latent tokens that it adds to a forward, guidance included."""
    latents: torch.Tensor
    """Of a batch of one; its layout is the family's own."""
    timesteps: torch.Tensor
    """Those that are computed for it: fewer than `num_steps` where it begins from a picture."""
    scheduler: Any
    """A diffusers scheduler of its own: it remembers steps."""
    generator: torch.Generator
    """Its own: the same seed gives the same picture, alone or among others."""
    step: int = 0
    """Steps done."""
    conditioning: Any = None
    """The prompt's embeddings and what else the forward takes, in a form of the family's own."""
    original: Any = None
    """Of a picture that it begins from, what every step needs of it."""
    cache: Any = None
    """The first-block cache's memory of its last full step; None: off, or nothing yet."""
    estimate: torch.Tensor | None = None
    """What the last step believed it to become, laid out as `latents`; only where the request wants previews."""
    between: Callable[[], bool] | None = None
    """Set by the engine, for a family that does all steps within one `denoise`: called after each, with `step` moved on; True
    stops the picture, which then raises Cancelled."""

    @property
    def done(self) -> bool:
        return self.step >= len(self.timesteps)


class Family(Protocol):
    """One loaded pipeline."""

    info: ImageInfo
    explain: tuple[str, ...]
    """What was chosen at load, and why, one readable line each."""
    num_cached: int
    """Steps of pictures that the first-block cache answered, since it was loaded."""

    def encode(self, request: Paint, inputs: Inputs | None) -> State:
        """One picture, ready for its first step. `request` was held against `info` (core.pictures.check), and its `seed` is this
        picture's own; `inputs` are there if it begins from a picture. Raises InvalidRequest or Unsupported, naming the field."""

    def denoise(self, states: Sequence[State]) -> list[torch.Tensor]:
        """The model's prediction for each, guidance applied, by ONE forward (two, where guidance does not fit into the same).

        `states` are of one group; each may be at another timestep.
        """

    def step(self, state: State, prediction: torch.Tensor) -> None:
        """The only place where a picture moves on: its latents, and `step` by one."""

    def decode(self, states: Sequence[State]) -> list[np.ndarray]:
        """Of each its pixels, uint8 [height, width, 3]."""

    def preview(self, state: State) -> np.ndarray | None:
        """What it looks like by now, small, without the decoder: uint8 [h, w, 3]. None where the family cannot."""
