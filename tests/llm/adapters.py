"""Adapters for the tiny models, made by peft with random weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.llm.tiny import tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def old_words() -> Iterator[None]:
    """peft still calls transformers by names that are about to go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        yield


def tiny_adapter(folder: Path, name: str, model_type: str = "llama", *, seed: int = 1, std: float = 0.1, **config: Any) -> Path:
    """Write `loras/NAME` into a checkpoint's folder."""
    torch.manual_seed(seed)
    with old_words():
        adapted = get_peft_model(tiny_model(model_type), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **config}))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, std)
    adapted.save_pretrained(folder / "loras" / name)
    return folder / "loras" / name
