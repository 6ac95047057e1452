"""Tiny pipelines with random weights, one for each family, saved as a folder: the sizes of diffusers' own tests."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 32
"""Of embeddings."""
WORDS = ("zero", "one", "two", "three", "a", "red", "blue", "big", "small", "seven")
MAX_TOKENS = 16
NAMES = ("sd", "sd_inpaint", "sdxl", "sd3", "sd3_t5", "flux", "flux_plain", "pixels", "whole")
SCALE = 0.8
"""Of weights: large enough that pictures of different texts and seeds differ."""
TIME_SCALE = 0.02
"""Of what a transformer makes of the timestep: as in a trained one, neighbouring steps are much alike."""


def clip_tokenizer() -> CLIPTokenizer:
    """Of whole words, by merges of their letters."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges: list[str] = []
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for piece in (letter, f"{letter}</w>"):
            vocab[piece] = len(vocab)
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            vocab.setdefault(pieces[0], len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in dict.fromkeys(merges)], model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def clip(cls: Any = CLIPTextModel, **changes: Any) -> Any:
    config = {
        "vocab_size": 512,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": WIDTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return cls(CLIPTextConfig(**{**config, **changes}))


def t5(width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False))


def unet(**changes: Any) -> Any:
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def vae(channels: int = 4, **changes: Any) -> Any:
    config = {
        "block_out_channels": (8, 16),
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKL(**{**config, **changes})


def noise_schedule(cls: Any = diffusers.DDIMScheduler) -> Any:
    more = {"clip_sample": False} if cls is diffusers.DDIMScheduler else {}
    return cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **more)


def sd(**changes: Any) -> Any:
    parts = {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": noise_schedule(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return diffusers.StableDiffusionPipeline(**{**parts, **changes})


def sdxl() -> Any:
    model = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(),
        unet=model,
        scheduler=noise_schedule(diffusers.EulerDiscreteScheduler),
        add_watermarker=False,
    )


def sd3(*, t5_too: bool = False) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=16,
        pos_embed_max_size=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * WIDTH) if t5_too else None,
        tokenizer_3=t5_tokenizer() if t5_too else None,
    )


def flux(*, guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=vae(16, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def pixels() -> Any:
    """A UNet over the pixels themselves."""
    pipe = sd(unet=unet(in_channels=3, out_channels=3))
    pipe.register_modules(vae=None)
    return pipe


def whole() -> Any:
    """A pipeline that no adapter knows."""
    parts = sd(unet=unet(time_cond_proj_dim=8), scheduler=noise_schedule(diffusers.LCMScheduler)).components
    return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


MAKERS = {
    "sd": sd,
    "sd_inpaint": lambda: diffusers.StableDiffusionInpaintPipeline(
        **sd(unet=unet(in_channels=9)).components, requires_safety_checker=False
    ),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3_t5": lambda: sd3(t5_too=True),
    "flux": flux,
    "flux_plain": lambda: flux(guidance=False),
    "pixels": pixels,
    "whole": whole,
}


def save(name: str, folder: Path) -> Path:
    """The same weights each time."""
    torch.manual_seed(len(name))
    pipe = MAKERS[name]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for path, parameter in component.named_parameters():
                if parameter.ndim > 1:
                    scale = TIME_SCALE if "timestep_embedder" in path else SCALE
                    torch.nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5)
    pipe.save_pretrained(folder)
    return folder
