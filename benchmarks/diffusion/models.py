"""Pipelines of Stable Diffusion's and FLUX's shape with random weights: speed does not ask what they say."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer


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
    "S": Shape(channels=(32, 64), layers=1, width=64, size=64, vae_channels=(8, 16, 16, 16)),
    "M": Shape(channels=(64, 128, 128), layers=2, width=128, size=128, vae_channels=(16, 32, 32, 32)),
}


LETTERS = [chr(code) for code in range(33, 127)]


def clip(width: int, layers: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder that reads letters."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{each}</w>" for each in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config), tokenizer


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    shape = SHAPES[name]
    text, tokenizer = clip(shape.width, layers=4)
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
        norm_num_groups=8,
        sample_size=shape.size,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class FluxShape:
    heads: int
    head_size: int
    axes: tuple[int, int, int]
    text: int
    """Width of the second text encoder's embeddings, of which there are 512."""
    pooled: int
    layers: int
    """Blocks with two streams; twice as many have one."""
    vae_channels: tuple[int, ...]
    size: int

    @property
    def width(self) -> int:
        return self.heads * self.head_size


FLUX = {
    "dev": FluxShape(24, 128, (16, 56, 56), text=4096, pooled=768, layers=19, vae_channels=(128, 256, 512, 512), size=1024),
    "tiny": FluxShape(4, 32, (8, 12, 12), text=128, pooled=64, layers=2, vae_channels=(8, 16, 16, 16), size=128),
}


def flux(shape: FluxShape, *, device: str, dtype: torch.dtype) -> diffusers.FluxPipeline:
    """FLUX.1-dev in all that a step computes; its text encoders have one layer, which is enough to give embeddings of their widths."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = diffusers.FluxTransformer2DModel(
                num_layers=shape.layers,
                num_single_layers=2 * shape.layers,
                attention_head_dim=shape.head_size,
                num_attention_heads=shape.heads,
                joint_attention_dim=shape.text,
                pooled_projection_dim=shape.pooled,
                guidance_embeds=True,
                axes_dims_rope=shape.axes,
            )
            vae = diffusers.AutoencoderKL(
                block_out_channels=shape.vae_channels,
                down_block_types=("DownEncoderBlock2D",) * len(shape.vae_channels),
                up_block_types=("UpDecoderBlock2D",) * len(shape.vae_channels),
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=8,
                sample_size=shape.size,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        text, tokenizer = clip(shape.pooled, layers=1)
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((letter, -6.0) for letter in LETTERS)]
        config = T5Config(vocab_size=128, d_model=shape.text, d_kv=64, d_ff=64, num_layers=1, num_heads=4, is_encoder_decoder=False)
        long, long_tokenizer = T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    finally:
        torch.set_default_dtype(before)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=long,
        tokenizer_2=long_tokenizer,
        transformer=transformer,
    )
    for component in (transformer, vae, text, long):
        component.eval()
    return pipe.to(device, dtype)


def parameters(folder: Path) -> int:
    """Of the part that each step calls."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    return sum(parameter.numel() for parameter in diffusers.UNet2DConditionModel.from_config(config).parameters())
