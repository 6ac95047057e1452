"""Schedulers of diffusers by their short names: which of them a pipeline can be sampled with, and one of its own for each picture."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

DENOISING: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
FLOW: Mapping[str, tuple[str, dict[str, Any]]] = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
TRIAL_STEPS = 4
REFUSALS = (ValueError, NotImplementedError, TypeError, KeyError, IndexError, AttributeError, ImportError, RuntimeError)


def offered(own: Any, named: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """By name, the schedulers that can sample what `own`, the pipeline's, was trained for; `own` is the first."""
    name = next((name for name, (cls, _) in named.items() if cls == type(own).__name__), type(own).__name__)
    found = {name: own}
    for name, (cls, changes) in named.items():
        if name not in found and (scheduler := _tried(cls, {**own.config, **changes})) is not None:
            found[name] = scheduler
    return found


def _tried(cls: str, config: dict[str, Any]) -> Any:
    """None where it does not know the pipeline's kind of prediction, or lacks a library of its own."""
    try:
        scheduler = getattr(diffusers, cls).from_config(config)
        trial = copy.deepcopy(scheduler)
        trial.set_timesteps(TRIAL_STEPS)
        generator, sample = torch.Generator().manual_seed(0), torch.ones(1, 1, 4, 4)
        for timestep in trial.timesteps[:2]:
            prediction = scaled(trial, sample, timestep)
            sample = trial.step(prediction, timestep, sample, **draws(trial, generator)).prev_sample
    except REFUSALS:
        return None
    return scheduler if bool(sample.isfinite().all()) else None


def scaled(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """As the model takes them."""
    scale: Callable[..., torch.Tensor] | None = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def draws(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What its `step` takes to draw noise from, where it draws any."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def renoised(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Finished latents as they are at a timestep, [1]."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(latents, timestep, noise)
    return scheduler.add_noise(latents, noise, timestep)


def estimate(scheduler: Any, output: Any, latents: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the picture is believed to become, from `latents` and the model's prediction for them; for previews."""
    if (original := getattr(output, "pred_original_sample", None)) is not None:
        return original
    if hasattr(scheduler, "scale_noise"):
        return latents - float(timestep) / scheduler.config.num_train_timesteps * prediction
    if getattr(scheduler, "predict_x0", False) or getattr(scheduler.config, "algorithm_type", "").endswith("++"):
        return scheduler.model_outputs[-1]
    return output.prev_sample
