"""A classifier for `picture_moderation`, learned in seconds: does a picture show a four, and is its ink red?

Neither does harm. Fours are left out where they are thought unlucky, and red is what a house style may forbid: enough to show how
pictures are held back.
"""

from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fairlead.cli.demo_models.digits.pictures import COLOURS, PIXELS, SEED, SHAPE, SIZES, draw, ink_of, originals, shape_of

LABELS = ("four", "red")
DRAWN, EPOCHS, BATCH, RATE = 4, 12, 64, 5e-3


class Trained(NamedTuple):
    network: nn.Module
    """Float32 [N, 32, 32, 3] from 0 to 1, to the probability of each label: they are independent of one another."""
    accuracy: float
    """Pictures of held-out digits of which both labels are right."""


class _Classifier(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SHAPE * SHAPE + 3, 96), nn.ReLU(), nn.Linear(96, len(LABELS)))

    def scores(self, pictures: Tensor) -> Tensor:
        ink = ink_of(pictures)
        colour = (ink * pictures).sum((2, 3)) / ink.sum((2, 3)).clamp_min(1e-6)
        scores: Tensor = self.layers(torch.cat([shape_of(ink), colour], 1))
        return scores

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.sigmoid(self.scores(pixels.permute(0, 3, 1, 2) * 2 - 1))


def train() -> Trained:
    torch.manual_seed(SEED)
    rng, generator = Random(SEED), torch.Generator().manual_seed(SEED)
    digits, held_out, shown, shown_held_out = originals()

    def drawn(some: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        colours, sizes = (rng.choices(tuple(names), k=len(some)) for names in (COLOURS, SIZES))
        red = torch.tensor([colour == "red" for colour in colours])
        return draw(some, colours, sizes, generator=generator), torch.stack([of == 4, red], 1).float()

    network = _Classifier()
    x, y = drawn(digits.repeat(DRAWN, 1, 1, 1), shown.repeat(DRAWN))
    num_steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=num_steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(network.scores(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    x, y = drawn(held_out, shown_held_out)
    with torch.no_grad():
        right = ((network.scores(x) > 0) == (y > 0.5)).all(1)
    return Trained(network.eval(), float(right.float().mean()))


def export(network: Any, file: Path) -> None:
    torch.onnx.export(
        network,
        (torch.zeros(2, PIXELS, PIXELS, 3),),
        str(file),
        opset_version=17,
        input_names=["picture"],
        output_names=["probability"],
        dynamic_axes={"picture": {0: "batch"}, "probability": {0: "batch"}},
        dynamo=False,
    )


def example(digit: int, colour: str) -> np.ndarray:
    """A held-out digit, [1, 32, 32, 3] from 0 to 1."""
    _, held_out, _, shown = originals()
    row = (shown == digit).nonzero()[0]
    picture = draw(held_out[row], [colour], ["large"], generator=torch.Generator().manual_seed(SEED))
    return np.asarray(((picture + 1) / 2).permute(0, 2, 3, 1).numpy())
