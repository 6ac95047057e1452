"""LoRAs: each request lays its own over the model, and those without one see none."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from fairlead.core.errors import InvalidRequest, LoadError
from fairlead.core.generation import Lora
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.family import Inputs
from fairlead.diffusion.load import load_family
from tests.diffusion import tiny
from tests.diffusion.conftest import Folders
from tests.diffusion.test_families import BATCH_TOLERANCE, IMAGE, SIDE, TEXT, begun, by_diffusers, changed, family, finished

TARGETS = ["to_q", "to_k", "to_v"]

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
"""diffusers' own, where a pipeline takes a second one."""


def write(pipe: Any, folder: Path, name: str, seed: int, *, text: bool = False) -> None:
    """A LoRA with random weights, as diffusers' training scripts save theirs."""
    torch.manual_seed(seed)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = {component: _trained(getattr(pipe, component), TARGETS)}
    if text:
        layers["text_encoder"] = _trained(pipe.text_encoder, ["q_proj", "v_proj"])
    pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors", **{f"{part}_lora_layers": found for part, found in layers.items()})


def _trained(module: Any, targets: list[str]) -> Any:
    module.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    found = get_peft_model_state_dict(module)
    if hasattr(module, "delete_adapters"):
        module.delete_adapters("default")
    else:
        module.delete_adapter("default")
    return found


@pytest.fixture(scope="module", params=["sd", "sd3", "flux"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tiny.save(request.param, tmp_path_factory.mktemp("loras") / request.param)
    for number, name in enumerate(("ink", "v1.5")):
        pipe = reference(home)
        write(pipe, home / "loras", name, number, text=request.param == "sd" and name == "ink")
    return home


def reference(folder: Path) -> Any:
    absent = {"sd": {"safety_checker": None, "requires_safety_checker": False}, "sd3": {"text_encoder_3": None, "tokenizer_3": None}}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent.get(folder.name, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("wanted", [{"ink": 1.0}, {"v1.5": 0.5}, {"ink": 0.7, "v1.5": -1.0}])
def test_a_picture_with_loras_is_that_of_diffusers(folder: Path, wanted: dict[str, float]) -> None:
    model = load_family(folder, DiffusionSpec(width=SIDE, height=SIDE))
    assert model.info.loras == ("ink", "v1.5")
    (plain,) = finished(model, [begun(model)])
    (state,) = finished(model, [begun(model, loras=tuple(Lora(name=name, scale=scale) for name, scale in wanted.items()))])
    (after,) = finished(model, [begun(model)])

    pipe = reference(folder)
    expected_plain = by_diffusers(pipe, width=SIDE, height=SIDE)
    names = [name.replace(".", "_") for name in wanted]
    for name, file in zip(names, wanted, strict=True):
        pipe.load_lora_weights(folder / "loras", weight_name=f"{file}.safetensors", adapter_name=name)
    pipe.set_adapters(names, list(wanted.values()))
    expected = by_diffusers(pipe, width=SIDE, height=SIDE)

    assert torch.equal(state.latents, expected)
    assert torch.equal(plain.latents, expected_plain) and torch.equal(after.latents, expected_plain)
    assert (expected - expected_plain).abs().max() > 0.01


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_pipeline_that_runs_whole_takes_loras_too(folder: Path, tmp_path: Path) -> None:
    model = family(changed(folder, tmp_path, "model_index.json", _class_name="StableDiffusionImg2ImgPipeline"))
    assert (model.info.family, model.info.loras) == ("whole", ("ink", "v1.5"))
    pipe: Any = diffusers.StableDiffusionImg2ImgPipeline(**reference(folder).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def painted(*loras: Lora) -> torch.Tensor:
        return model.denoise([begun(model, Inputs(image=IMAGE), strength=0.8, loras=loras)])[0]

    def expected() -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        found = pipe(TEXT, Image.fromarray(IMAGE), 0.8, 5, generator=generator, output_type="np").images[0]
        return torch.from_numpy((found * 255).round().astype(np.uint8))

    before = painted()
    assert torch.equal(before, expected())
    pipe.load_lora_weights(folder / "loras", weight_name="ink.safetensors", adapter_name="ink")
    pipe.set_adapters(["ink"], [0.5])
    drawn = painted(Lora(name="ink", scale=0.5))
    assert torch.equal(drawn, expected()) and not torch.equal(drawn, before)
    assert torch.equal(painted(), before)


def test_pictures_with_other_loras_share_no_forward_but_take_turns(folder: Path) -> None:
    model = load_family(folder, DiffusionSpec(width=SIDE, height=SIDE))
    sets = [(), (Lora(name="ink"),), (Lora(name="ink", scale=0.5),), (Lora(name="v1.5"),)]
    alone = [finished(model, [begun(model, loras=loras)])[0] for loras in sets]
    states = [begun(model, loras=loras) for loras in sets]
    assert len({state.group for state in states}) == len(sets)
    while not states[0].done:
        for state in states:
            model.step(state, model.denoise([state])[0])
    for state, own in zip(states, alone, strict=True):
        assert (state.latents - own.latents).abs().max() < BATCH_TOLERANCE


def test_an_unknown_lora_is_refused(folder: Path) -> None:
    model = load_family(folder, DiffusionSpec(width=SIDE, height=SIDE))
    with pytest.raises(InvalidRequest, match=r"`loras`: 'inc' is unknown; one of ink, v1\.5"):
        begun(model, loras=(Lora(name="inc"),))


def test_a_file_that_is_no_lora_for_the_model_is_named(folders: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sd"), tmp_path / "sd"))
    loras = folder / "loras"
    loras.mkdir()
    (loras / "old.bin").write_bytes(b"pickle")
    with pytest.raises(LoadError, match=r"loras/old\.bin: a LoRA is loaded from safetensors only"):
        load_family(folder, DiffusionSpec())
    (loras / "old.bin").unlink()
    (loras / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(LoadError, match=r"loras/cut\.safetensors"):
        load_family(folder, DiffusionSpec())
    (loras / "cut.safetensors").unlink()
    save_file({"other.lora_A.weight": torch.zeros(4, 8), "other.lora_B.weight": torch.zeros(8, 4)}, loras / "else.safetensors")
    with pytest.raises(LoadError, match=r"loras/else\.safetensors is no LoRA for StableDiffusionPipeline"):
        load_family(folder, DiffusionSpec())
    assert load_family(folder, DiffusionSpec(loras="none")).info.loras == ()
