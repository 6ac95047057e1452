"""The first-block cache: each row of a batch remembers for itself, and nothing else changes."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.load import load_family
from fairlead.diffusion.modes import TURBO_THRESHOLD
from tests.diffusion.conftest import Folders
from tests.diffusion.test_families import BATCH_TOLERANCE, SIDE, TEXT, begun, finished, pipeline

NUM_STEPS = 24


def loaded(folders: Folders, name: str, threshold: float = 0.0) -> Any:
    return load_family(folders(name), DiffusionSpec(width=SIDE, height=SIDE, first_block_threshold=threshold))


@pytest.mark.parametrize("threshold", [0.015, 0.025, 0.06])
def test_it_skips_what_that_of_diffusers_skips_bit_by_bit(folders: Folders, threshold: float) -> None:
    model = loaded(folders, "flux", threshold)
    (state,) = finished(model, [begun(model, num_steps=NUM_STEPS, mode="balanced")])

    pipe: Any = diffusers.FluxPipeline(**pipeline(folders("flux")).components)
    pipe.set_progress_bar_config(disable=True)
    blocks = pipe.transformer.single_transformer_blocks
    computed: list[int] = []
    forget = blocks[0].attn.register_forward_pre_hook(lambda *_: computed.append(1))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    try:
        generator = torch.Generator().manual_seed(11)
        expected = pipe(TEXT, width=SIDE, height=SIDE, num_inference_steps=NUM_STEPS, generator=generator, output_type="latent").images
    finally:
        pipe.transformer.disable_cache()
        forget.remove()

    assert torch.equal(state.latents, expected)
    assert model.num_cached == NUM_STEPS - len(computed) > 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_pictures_in_a_batch_skip_each_for_itself(folders: Folders, name: str) -> None:
    """One is in its first steps, where much changes; another in small steps, where little does."""
    model = loaded(folders, name, 0.03)
    asked: list[dict[str, Any]] = [{"seed": 1, "num_steps": 4, "text": "red"}, {"seed": 2, "num_steps": 40, "text": "seven"}]
    alone, skipped = [], []
    for one in asked:
        before = model.num_cached
        alone.append(finished(model, [begun(model, mode="balanced", guidance=3.0, **one)])[0])
        skipped.append(model.num_cached - before)
    assert skipped[0] == 0 < skipped[1] < 40

    before = model.num_cached
    together = finished(model, [begun(model, mode="balanced", guidance=3.0, **one) for one in asked])
    assert model.num_cached - before == sum(skipped)
    for state, own in zip(together, alone, strict=True):
        assert (state.latents - own.latents).abs().max() < BATCH_TOLERANCE


def test_only_the_rows_that_need_it_are_computed(folders: Folders) -> None:
    model = loaded(folders, "flux", 0.3)
    rows: list[int] = []
    forget = model.parts.model.single_transformer_blocks[1].attn.register_forward_pre_hook(
        lambda module, arguments, told: rows.append(len(told["hidden_states"])), with_kwargs=True
    )
    try:
        slow = begun(model, seed=1, num_steps=200, mode="balanced")
        for _ in range(3):
            model.step(slow, model.denoise([slow])[0])
        rows.clear()
        model.denoise([slow, begun(model, seed=2, num_steps=200, mode="balanced"), begun(model, seed=3, num_steps=200, mode="balanced")])
    finally:
        forget.remove()
    assert rows == [2], "the first steps of two; the third takes over what it knows"


def test_exact_never_skips_and_turbo_does_by_itself(folders: Folders) -> None:
    model = loaded(folders, "sd3")
    assert model.info.modes == ("exact", "turbo") and model.parts.modes.thresholds["turbo"] == TURBO_THRESHOLD
    (exact,) = finished(model, [begun(model, num_steps=NUM_STEPS)])
    assert model.num_cached == 0 and exact.cache is None
    (turbo,) = finished(model, [begun(model, num_steps=NUM_STEPS, mode="turbo")])
    assert 0 < model.num_cached < NUM_STEPS
    assert not torch.equal(turbo.latents, exact.latents)


def test_what_it_costs_in_quality_grows_with_the_threshold_and_is_little_for_that_of_turbo(folders: Folders) -> None:
    """The peak signal-to-noise ratio of finished pictures to the exact ones, the mean of a few."""
    asked: list[dict[str, Any]] = [
        {"seed": seed, "num_steps": 30, "text": text} for seed, text in enumerate(("red", "seven", "a blue one"))
    ]
    model = loaded(folders, "flux", 0.001)
    exact = model.decode(finished(model, [begun(model, **one) for one in asked]))
    noises, skipped = [], []
    for threshold in (0.001, 0.03, TURBO_THRESHOLD, 0.4):
        model = loaded(folders, "flux", threshold)
        pictures = model.decode(finished(model, [begun(model, mode="balanced", **one) for one in asked]))
        noises.append(np.mean([(one.astype(float) - own) ** 2 for one, own in zip(pictures, exact, strict=True)]) / 255**2)
        skipped.append(model.num_cached / 90)
    assert skipped[0] == 0 and noises[0] < 1e-7, "a cache that never answers changes nothing"
    assert skipped == sorted(skipped) and noises == sorted(noises)
    assert skipped[2] > 0.5 and 10 * np.log10(1 / noises[2]) > 30, (skipped, noises)


def test_a_threshold_of_the_operator_holds_for_balanced_too(folders: Folders) -> None:
    model = loaded(folders, "sd3", 0.3)
    assert model.info.modes == ("exact", "balanced"), "turbo would not differ"
    finished(model, [begun(model, num_steps=NUM_STEPS)])
    assert model.num_cached == 0
    finished(model, [begun(model, num_steps=NUM_STEPS, mode="balanced")])
    assert model.num_cached > 0


def test_a_model_that_fails_inside_is_left_as_it_was(folders: Folders) -> None:
    model = loaded(folders, "sd3", 0.3)
    state = begun(model, mode="balanced")
    state.conditioning = {name: rows[..., :3] for name, rows in state.conditioning.items()}
    with pytest.raises(RuntimeError):
        model.denoise([state])
    assert "transformer_blocks" not in model.parts.model.__dict__
    assert begun(model, mode="balanced").cache is None
    finished(model, [begun(model, mode="balanced")])
