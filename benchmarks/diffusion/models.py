"""Pipelines of Stable Diffusion's shape with random weights: speed does not ask what they say."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Shape:
    channels: tuple[int, ...]
    layers: int
    width: int
    """Of the text's embeddings."""
    size: int
    """Of pictures, in pixels."""
    vae_channels: tuple[int, ...]


SHAPES = {
    "S": Shape(channels=(32, 64), layers=1, width=64, size=32, vae_channels=(16, 32)),
    "M": Shape(channels=(96, 192, 192), layers=2, width=128, size=128, vae_channels=(32, 64, 64)),
}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    shape = SHAPES[name]
    letters = [chr(code) for code in range(33, 127)]
    vocab = {
        piece: number for number, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)])
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks = len(shape.channels)
    unet = diffusers.UNet2DConditionModel(
        sample_size=shape.size // 2 ** (len(shape.vae_channels) - 1),
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        down_block_types=("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
        cross_attention_dim=shape.width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(shape.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(shape.vae_channels),
        norm_num_groups=16,
        sample_size=shape.size,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def parameters(folder: Path) -> int:
    """Of the part that each step calls."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    return sum(parameter.numel() for parameter in diffusers.UNet2DConditionModel.from_config(config).parameters())
