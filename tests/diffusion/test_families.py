"""The families: what they paint is what diffusers' own loop paints, alone and in a batch."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fairlead.core.errors import Cancelled, InvalidRequest, Unsupported
from fairlead.core.generation import Delta, Paint
from fairlead.core.pictures import check, encode
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.decoder import DecoderHere
from fairlead.diffusion.engine import DiffusionEngine
from fairlead.diffusion.family import Family, Inputs, State
from fairlead.diffusion.load import load_family
from fairlead.diffusion.scheduler import Scheduler
from fairlead.diffusion.schedulers import DENOISING, FLOW
from tests.diffusion.conftest import Folders

SIDE = 32
TEXT, NEGATIVE = "a big red seven", "small blue"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[:, SIDE // 2 :] = 255
PAINTED = Inputs(image=IMAGE, mask=MASK)

BATCH_TOLERANCE = 2e-4
"""Of latents alone and in a batch: matrix products of other shapes add in another order, and steps carry it on."""

IMAGE_TO_IMAGE = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
}
INPAINT = {
    "sd": "StableDiffusionInpaintPipeline",
    "sd_inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
    "sd3": "StableDiffusion3InpaintPipeline",
    "flux": "FluxInpaintPipeline",
}


@cache
def pipeline(folder: Any) -> Any:
    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3" else {}
    if folder.name in ("sd", "sd_inpaint", "pixels"):
        absent = {"safety_checker": None, "requires_safety_checker": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def changed(folder: Path, home: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline, one of its JSON files with other values."""
    copied = shutil.copytree(folder, home / folder.name)
    path = copied / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copied


@cache
def family(folder: Any, **changes: Any) -> Family:
    return load_family(folder, DiffusionSpec(width=SIDE, height=SIDE, **changes))


def begun(model: Family, inputs: Inputs | None = None, **changes: Any) -> State:
    """A request held against the model, as the engine does it."""
    if inputs is not None:
        changes["image"] = encode(inputs.image, "png")
        changes["mask"] = encode(inputs.mask, "png") if inputs.mask is not None else b""
    paint = Paint(**{"text": TEXT, "seed": 11, "num_steps": 5, **changes})
    return model.encode(check(paint, model.info), inputs)


def finished(model: Family, states: list[State]) -> list[State]:
    """Those of one group by one forward, step by step, until all are done."""
    while under_way := [state for state in states if not state.done]:
        for state, prediction in zip(under_way, model.denoise(under_way), strict=True):
            model.step(state, prediction)
    return states


def by_diffusers(pipe: Any, kind: str | None = None, **arguments: Any) -> torch.Tensor:
    """Latents, and what the pipeline's own decoder makes of them."""
    if kind is not None:
        shell = getattr(diffusers, kind)
        pipe = shell(**{name: part for name, part in pipe.components.items() if part is not None or "safety" not in kind})
        pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": TEXT, "num_inference_steps": 5, "generator": torch.Generator().manual_seed(11), **arguments}
    return pipe(**arguments, output_type="latent").images


def pixels_by_diffusers(pipe: Any, **arguments: Any) -> np.ndarray:
    arguments = {"prompt": TEXT, "num_inference_steps": 5, "generator": torch.Generator().manual_seed(11), **arguments}
    return (pipe(**arguments, output_type="np").images[0] * 255).round().astype(np.uint8)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3_t5", "flux"])
def test_a_picture_from_a_text_is_that_of_diffusers_bit_by_bit(folders: Folders, name: str, guidance: float) -> None:
    model, pipe = family(folders(name)), pipeline(folders(name))
    negative = {"negative": NEGATIVE} if guidance > 1 and model.info.has_negative else {}
    (state,) = finished(model, [begun(model, guidance=guidance, **negative)])
    told = {"negative_prompt": NEGATIVE} if negative else {}
    expected = by_diffusers(pipe, guidance_scale=guidance, width=SIDE, height=SIDE, **told)
    assert torch.equal(state.latents, expected)
    (picture,) = model.decode([state])
    assert np.array_equal(picture, pixels_by_diffusers(pipe, guidance_scale=guidance, width=SIDE, height=SIDE, **told))
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 10


def test_a_model_that_was_distilled_to_few_steps_paints_as_in_diffusers(folders: Folders) -> None:
    """FLUX.1 schnell: no guidance at all, and timesteps that do not depend on the size."""
    model, pipe = family(folders("flux_plain")), pipeline(folders("flux_plain"))
    (state,) = finished(model, [begun(model, num_steps=None)])
    assert (state.step, model.info.has_guidance) == (4, False)
    assert torch.equal(state.latents, by_diffusers(pipe, num_inference_steps=4, width=SIDE, height=SIDE))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd", {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("sd3", {"use_dynamic_shifting": True}),
        ("flux", {"use_dynamic_shifting": False}),
    ],
)
def test_what_a_checkpoint_says_of_its_timesteps_is_heeded(folders: Folders, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    plain = finished(family(folders(name)), [begun(family(folders(name)), guidance=3.0)])[0]
    folder = changed(folders(name), tmp_path, "scheduler/scheduler_config.json", **changes)
    model, pipe = family(folder), pipeline(folder)
    (state,) = finished(model, [begun(model, guidance=3.0)])
    assert torch.equal(state.latents, by_diffusers(pipe, guidance_scale=3.0, width=SIDE, height=SIDE))
    assert not torch.equal(state.latents, plain.latents)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_width_and_height_are_not_mixed_up(folders: Folders, name: str) -> None:
    model, pipe = family(folders(name)), pipeline(folders(name))
    size = {"width": SIDE + 16, "height": SIDE}
    image = RNG.integers(0, 256, (SIDE, SIDE + 16, 3), dtype=np.uint8)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[:8, :20] = 255
    sent = {"image": Image.fromarray(image), "strength": 0.8}
    for kind, inputs, told in (
        (None, None, size),
        (IMAGE_TO_IMAGE[name], Inputs(image=image), sent | ({} if name in ("sd", "sdxl") else size)),
        (INPAINT[name], Inputs(image=image, mask=mask), sent | size | {"mask_image": Image.fromarray(mask)}),
    ):
        (state,) = finished(model, [begun(model, inputs, guidance=3.0, **size, **({"strength": 0.8} if inputs else {}))])
        assert torch.equal(state.latents, by_diffusers(pipe, kind, guidance_scale=3.0, **told)), kind
        assert model.decode([state])[0].shape == (SIDE, SIDE + 16, 3)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "scheduler"), [*(("sd", each) for each in DENOISING), *(("sd3", each) for each in FLOW), ("flux", "flow_euler")]
)
def test_each_scheduler_walks_as_in_diffusers(folders: Folders, name: str, scheduler: str, guidance: float) -> None:
    model, pipe = family(folders(name)), pipeline(folders(name))
    own = pipe.scheduler
    cls, changes = {**DENOISING, **FLOW}[scheduler]
    pipe.scheduler = getattr(diffusers, cls).from_config({**own.config, **changes})
    try:
        for kind, inputs, told in (
            (None, None, {}),
            (IMAGE_TO_IMAGE[name], Inputs(image=IMAGE), {"image": Image.fromarray(IMAGE), "strength": 0.7}),
            (INPAINT[name], PAINTED, {"image": Image.fromarray(IMAGE), "mask_image": Image.fromarray(MASK), "strength": 0.7}),
        ):
            size = {} if kind == IMAGE_TO_IMAGE["sd"] else {"width": SIDE, "height": SIDE}
            expected = by_diffusers(pipe, kind, guidance_scale=guidance, **told, **size)
            (state,) = finished(
                model, [begun(model, inputs, scheduler=scheduler, guidance=guidance, **({"strength": 0.7} if inputs else {}))]
            )
            assert torch.equal(state.latents, expected), kind
    finally:
        pipe.scheduler = own


@pytest.mark.parametrize("strength", [0.37, 0.8, 1.0])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_a_picture_from_a_picture_is_that_of_diffusers(folders: Folders, name: str, strength: float) -> None:
    model, pipe = family(folders(name)), pipeline(folders(name))
    (state,) = finished(model, [begun(model, Inputs(image=IMAGE), guidance=3.0, strength=strength)])
    size = {} if name in ("sd", "sdxl") else {"width": SIDE, "height": SIDE}
    expected = by_diffusers(pipe, IMAGE_TO_IMAGE[name], image=Image.fromarray(IMAGE), guidance_scale=3.0, strength=strength, **size)
    assert torch.equal(state.latents, expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", INPAINT)
def test_painting_into_a_picture_is_that_of_diffusers(folders: Folders, name: str, strength: float) -> None:
    model, pipe = family(folders(name)), pipeline(folders(name))
    (state,) = finished(model, [begun(model, PAINTED, guidance=3.0, strength=strength)])
    told = {"image": Image.fromarray(IMAGE), "mask_image": Image.fromarray(MASK), "strength": strength, "width": SIDE, "height": SIDE}
    expected = by_diffusers(pipe, INPAINT[name], guidance_scale=3.0, **told)
    assert torch.equal(state.latents, expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "flux_plain", "pixels"])
def test_a_picture_is_the_same_alone_and_among_others(folders: Folders, name: str) -> None:
    """Others of other seeds, texts and lengths, which begin before it, end after it, or begin from a picture."""
    model = family(folders(name))
    guidance = {"guidance": 3.0} if model.info.has_guidance else {}
    mine = {"seed": 5, "num_steps": 6, "text": "seven", **guidance}
    (alone,) = finished(model, [begun(model, **mine)])

    early = begun(model, seed=1, num_steps=9, text="two", **guidance)
    for _ in range(3):
        model.step(early, model.denoise([early])[0])
    among = begun(model, **mine)
    painted = begun(model, PAINTED, seed=2, num_steps=8, strength=0.6, text="a blue one", **guidance)
    short = begun(model, seed=3, num_steps=2, text="big three", **guidance)
    states = [early, short, among, painted]
    assert len({state.group for state in states}) == 1
    finished(model, states)

    assert (among.latents - alone.latents).abs().max() < BATCH_TOLERANCE
    pictures = [picture.astype(int) for picture in model.decode(states)]
    assert np.abs(pictures[2] - model.decode([alone])[0].astype(int)).max() <= 1
    assert all(np.abs(pictures[2] - other).mean() > 5 for other in (pictures[0], pictures[1], pictures[3]))


@pytest.mark.parametrize(("name", "named"), [("sd", DENOISING), ("sd3", FLOW)])
def test_pictures_of_all_schedulers_share_a_forward_and_none_learns_of_the_other(folders: Folders, name: str, named: Any) -> None:
    """Also those that draw noise in each step, and those that remember steps."""
    model = family(folders(name))
    assert set(named) == set(model.info.schedulers)
    asked = [{"scheduler": scheduler, "seed": 5, "guidance": 3.0} for scheduler in (*named, next(iter(named)))]
    alone = [finished(model, [begun(model, **one)])[0] for one in asked]
    together = [begun(model, **one) for one in asked]
    assert len({state.group for state in together}) == 1
    finished(model, together)
    for state, own in zip(together, alone, strict=True):
        assert (state.latents - own.latents).abs().max() < BATCH_TOLERANCE, state.request.scheduler
    assert torch.equal(together[0].latents, together[-1].latents) or len(named) > 1


@pytest.mark.parametrize(("name", "asked"), [("sd", {"scheduler": "dpm++"}), ("sd", {"scheduler": "ddpm"}), ("flux", {"mode": "turbo"})])
def test_a_picture_that_made_way_for_another_is_the_same_when_it_goes_on(folders: Folders, name: str, asked: dict[str, Any]) -> None:
    model = family(folders(name))
    slow = check(Paint(text=TEXT, seed=11, num_steps=12, **asked), model.info)
    urgent = check(Paint(text="one", seed=12, num_steps=4, width=SIDE, height=2 * SIDE), model.info)

    def painted(*, interrupted: bool) -> bytes:
        scheduler = Scheduler(max_num_seqs=1, max_batch_tokens=4096, max_waiting=9)
        engine = DiffusionEngine(model, scheduler, DecoderHere(model, "art"))
        engine.add(1, slow, priority=2)
        answers = [answer for _ in range(5) for answer in engine.step()]
        if interrupted:
            engine.add(2, urgent, priority=1)
        while engine.has_work:
            answers += engine.step()
        assert engine.stats().num_preemptions == interrupted
        pictures = {work: answer.picture for work, answer in answers if isinstance(answer, Delta) and answer.picture}
        assert list(pictures) == ([2, 1] if interrupted else [1])
        return pictures[1].data

    assert painted(interrupted=True) == painted(interrupted=False)


def test_what_cannot_share_a_forward_is_of_another_group(folders: Folders) -> None:
    model = family(folders("sd3"))
    states = [
        begun(model),
        begun(model, guidance=1.0),
        begun(model, width=SIDE * 2),
        begun(model, width=SIDE, height=SIDE * 2),
        begun(model, width=SIDE * 2, height=SIDE),
        begun(model, mode="turbo"),
    ]
    assert len({state.group for state in states}) == 5
    assert begun(model, seed=99, num_steps=50, text="other", guidance=2.0, negative="small").group == states[0].group
    assert states[0].num_tokens == 2 * states[1].num_tokens == states[2].num_tokens // 2 == 2 * (SIDE // 4) ** 2


def test_one_forward_computes_a_step_of_all(folders: Folders) -> None:
    model: Any = family(folders("sd"))
    calls = []
    forget = model.parts.model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].shape))
    try:
        model.denoise([begun(model, seed=seed) for seed in range(3)])
    finally:
        forget.remove()
    assert calls == [(6, 4, SIDE // 2, SIDE // 2)]


def test_pixels_need_no_vae(folders: Folders) -> None:
    model = family(folders("pixels"))
    assert model.info.multiple == 2
    assert any("the model computes pixels" in line for line in model.explain)
    (state,) = finished(model, [begun(model, scheduler="ddpm")])
    (picture,) = model.decode([state])
    assert state.latents.shape == (1, 3, SIDE, SIDE) and picture.shape == (SIDE, SIDE, 3)
    preview = model.preview(state)
    assert preview is not None and np.array_equal(preview, picture)
    (kept,) = finished(model, [begun(model, PAINTED)])
    (painted,) = model.decode([kept])
    assert np.array_equal(painted[MASK == 0], IMAGE[MASK == 0])
    assert not np.array_equal(painted[MASK == 255], IMAGE[MASK == 255])


@pytest.mark.parametrize("scheduler", [*DENOISING, "flow_euler"])
def test_a_preview_shows_what_the_picture_becomes(folders: Folders, scheduler: str) -> None:
    """The estimate of the last step is nearer to the picture than the noise of the first."""
    model: Any = family(folders("sd3" if scheduler == "flow_euler" else "sd"))
    state = begun(model, scheduler=scheduler, preview_steps=1, num_steps=8)
    first = model.preview(state)
    while not state.done:
        model.step(state, model.denoise([state])[0])
    last = model.preview(state)
    assert first.shape == last.shape == (SIDE // 2, SIDE // 2, 3)
    shown = model.parts.vae.preview(state.latents)
    assert np.abs(last.astype(int) - shown).mean() < np.abs(first.astype(int) - shown).mean()


def test_a_preview_is_the_mean_colour_as_near_as_a_linear_map_can_say(folders: Folders) -> None:
    """Of a VAE that averages and mixes colours, exactly."""
    from fairlead.diffusion.vae import Vae, from_uint8

    mix = torch.linalg.qr(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).Q

    class Averages:
        config = diffusers.configuration_utils.FrozenDict(
            block_out_channels=(1, 1), latent_channels=4, scaling_factor=0.5, shift_factor=0.25
        )
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pixels: torch.Tensor) -> Any:
            means = torch.nn.functional.avg_pool2d(pixels, 2)
            return type("Found", (), {"latents": torch.einsum("lc,bchw->blhw", mix, means)})()

    vae = Vae(Averages(), 1 << 20)
    vae.fit()
    flat = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    preview = vae.preview(vae.encode(from_uint8(flat), torch.Generator()))
    assert preview is not None and np.abs(preview.astype(int) - flat[:4, :4]).max() <= 1


def test_large_pictures_are_decoded_in_tiles_and_small_ones_together(folders: Folders) -> None:
    model: Any = family(folders("sd"), tiling_pixels=3 * SIDE * SIDE)
    decoded: list[str] = []
    module = model.parts.vae.module
    for name in ("decode", "tiled_decode"):
        real = getattr(module, name)
        setattr(
            module, name, lambda latents, *, name=name, real=real, **told: decoded.append(f"{name} {len(latents)}") or real(latents, **told)
        )
    try:
        small = [begun(model, seed=seed, num_steps=1) for seed in range(5)]
        large = begun(model, width=2 * SIDE, height=2 * SIDE, num_steps=1)
        pictures = model.decode([small[0], large, *small[1:]])
    finally:
        del module.decode, module.tiled_decode
    assert sorted(decoded) == ["decode 2", "decode 3", "tiled_decode 1"]
    assert [picture.shape[0] for picture in pictures] == [SIDE, 2 * SIDE, *[SIDE] * 4]
    for state, picture in zip(small, [pictures[0], *pictures[2:]], strict=True):
        assert np.abs(picture.astype(int) - model.decode([state])[0]).max() <= 1


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_tiles_are_those_of_diffusers(folders: Folders, name: str) -> None:
    model, pipe = family(folders(name), tiling_pixels=SIDE * SIDE), pipeline(folders(name))
    size = {"width": 3 * SIDE, "height": 2 * SIDE}
    (state,) = finished(model, [begun(model, num_steps=2, guidance=3.0, **size)])
    whole = pixels_by_diffusers(pipe, num_inference_steps=2, guidance_scale=3.0, **size)
    pipe.vae.enable_tiling()
    try:
        expected = pixels_by_diffusers(pipe, num_inference_steps=2, guidance_scale=3.0, **size)
    finally:
        pipe.vae.disable_tiling()
    (picture,) = model.decode([state])
    assert np.array_equal(picture, expected)
    assert not np.array_equal(whole, expected)


def test_a_prompt_that_is_longer_than_the_model_reads_is_refused(folders: Folders) -> None:
    model = family(folders("sd"))
    with pytest.raises(InvalidRequest, match="`text` has 22 tokens, and this model reads 16"):
        begun(model, text="seven " * 20)
    with pytest.raises(InvalidRequest, match="`negative` has 22 tokens"):
        begun(model, negative="seven " * 20)
    for name in ("flux", "sd3_t5"):  # one of its encoders reads on
        begun(family(folders(name)), text="seven " * 20)


def test_a_negative_prompt_without_guidance_is_refused(folders: Folders) -> None:
    with pytest.raises(InvalidRequest, match="`negative` needs `guidance` above 1"):
        begun(family(folders("sd")), negative="blue", guidance=1.0)
    with pytest.raises(Unsupported, match="`negative`"):
        begun(family(folders("flux")), negative="blue")


def test_a_model_that_only_paints_into_pictures_needs_both(folders: Folders) -> None:
    model = family(folders("sd_inpaint"))
    assert model.info.inputs == ("image", "mask")
    with pytest.raises((InvalidRequest, Unsupported), match="`mask`"):
        begun(model, Inputs(image=IMAGE))


def test_the_prompt_cache_changes_nothing_but_the_work(folders: Folders) -> None:
    with_cache: Any = load_family(folders("sd3"), DiffusionSpec(prompt_cache=2))
    without: Any = load_family(folders("sd3"), DiffusionSpec(prompt_cache=0))
    for seed in range(2):
        states = [finished(model, [begun(model, seed=seed, negative=NEGATIVE)])[0] for model in (with_cache, without)]
        assert torch.equal(states[0].latents, states[1].latents)
    assert (with_cache.parts.prompts.num_hits, without.parts.prompts.num_hits) == (2, 0)
    begun(with_cache, text="one")
    assert set(with_cache.parts.prompts.kept) == {("one", ()), ("", ())}, "the two that were used last"
    assert not without.parts.prompts.kept


def test_another_pipeline_runs_whole_and_says_so(folders: Folders) -> None:
    model, pipe = load_family(folders("whole"), DiffusionSpec(width=SIDE, height=SIDE)), pipeline(folders("whole"))
    assert model.info.family == "whole" and not model.info.previews and model.info.schedulers == ()
    assert any("is run whole" in line for line in model.explain)
    state, other = begun(model), begun(model, seed=12)
    assert state.group != other.group
    steps: list[int] = []
    state.between = lambda: bool(steps.append(state.step))
    (prediction,) = model.denoise([state])
    assert steps == [1, 2, 3, 4, 4] and not state.done
    model.step(state, prediction)
    assert state.done
    (picture,) = model.decode([state])
    assert np.array_equal(picture, pixels_by_diffusers(pipe, width=SIDE, height=SIDE))


def test_a_pipeline_that_runs_whole_stops_after_a_step(folders: Folders) -> None:
    model = load_family(folders("whole"), DiffusionSpec(width=SIDE, height=SIDE))
    state = begun(model)
    state.between = lambda: state.step == 2
    with pytest.raises(Cancelled):
        model.denoise([state])
    assert state.step == 2


@pytest.mark.parametrize(
    ("name", "kind", "inputs"),
    [
        ("sd", "StableDiffusionImg2ImgPipeline", Inputs(image=IMAGE)),
        ("flux", "FluxImg2ImgPipeline", Inputs(image=IMAGE)),
        ("flux", "FluxInpaintPipeline", PAINTED),
    ],
)
def test_a_pipeline_that_runs_whole_begins_from_a_picture_as_in_diffusers(
    folders: Folders, tmp_path: Path, name: str, kind: str, inputs: Inputs
) -> None:
    """And counts the steps that it computes, not those that were asked for."""
    model: Any = family(changed(folders(name), tmp_path, "model_index.json", _class_name=kind))
    assert model.info.family == "whole" and model.info.inputs == (("image",) if inputs.mask is None else ("image", "mask"))
    state = begun(model, inputs, num_steps=6, strength=0.5)
    seen: list[tuple[int, int]] = []
    state.between = lambda: bool(seen.append((state.step, len(state.timesteps))))
    (prediction,) = model.denoise([state])
    model.step(state, prediction)
    assert seen == [(1, 3), (2, 3), (2, 3)] and (state.step, len(state.timesteps)) == (3, 3)

    told = {"image": Image.fromarray(IMAGE), "strength": 0.5, "guidance_scale": model.info.guidance}
    if inputs.mask is not None:
        told["mask_image"] = Image.fromarray(MASK)
    if name == "flux":
        told |= {"width": SIDE, "height": SIDE}
    pipe = getattr(diffusers, kind)(
        **{part: loaded for part, loaded in pipeline(folders(name)).components.items() if part in model.pipe.components}
    )
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(model.decode([state])[0], pixels_by_diffusers(pipe, num_inference_steps=6, **told))


def test_a_pipeline_that_was_stopped_on_the_way_paints_the_next_as_if_it_had_not_been(folders: Folders) -> None:
    model = load_family(folders("whole"), DiffusionSpec(width=SIDE, height=SIDE))

    def painted() -> torch.Tensor:
        return model.denoise([begun(model)])[0]

    before, stopped = painted(), begun(model, seed=3)
    stopped.between = lambda: stopped.step == 3
    with pytest.raises(Cancelled):
        model.denoise([stopped])
    assert torch.equal(painted(), before)
