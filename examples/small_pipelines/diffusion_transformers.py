"""Transformers that denoise along a schedule of betas: PixArt, Hunyuan-DiT, DiT, Latte, Allegro, Stable Audio 1."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from .flow_audio import oobleck
from .flow_parts import flow
from .language import TEXT_WIDTH, t5_encoder, t5_tokenizer
from .parts import LATENT_SIZE, WIDTH, Small, class_of, normal, picture, text_encoder, tokenizer, vae

_TEXT: dict[str, Any] = {"text_encoder": t5_encoder, "tokenizer": t5_tokenizer}

# By default they clean texts, through packages that need not be there.
_UNCLEANED: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False}

# PixArt: the variance is predicted, too, and not used


def _pixart_transformer() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=LATENT_SIZE,
        norm_num_groups=4,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )


_PIXART: dict[str, Any] = {**_TEXT, "transformer": _pixart_transformer, "scheduler": DPMSolverMultistepScheduler}

_PERTURBED: dict[str, Any] = {**_PIXART, "pag_applied_layers": ["blocks.0"]}

# Hunyuan-DiT

_HUNYUAN_SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": LATENT_SIZE,
    "hidden_size": 16,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": TEXT_WIDTH,
    "pooled_projection_dim": 8,
    "text_len": 8,
    "text_len_t5": 8,
}


def _hunyuan_transformer() -> Any:
    return diffusers.HunyuanDiT2DModel(**_HUNYUAN_SHAPE, num_layers=2)


def _hunyuan_controlnet() -> Any:
    return diffusers.HunyuanDiT2DControlNetModel(**_HUNYUAN_SHAPE, transformer_num_layers=2)


_HUNYUAN: dict[str, Any] = {
    "transformer": _hunyuan_transformer,
    "controlnet": _hunyuan_controlnet,
    "vae": partial(vae, levels=4),  # 8 pixels to a latent's side, whatever the config says
    "scheduler": partial(
        DDPMScheduler,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.018,
        prediction_type="v_prediction",
        steps_offset=1,
    ),
    "text_encoder": text_encoder,  # it is there to tell its dtype
    "tokenizer": tokenizer,
    "text_encoder_2": t5_encoder,
    "tokenizer_2": t5_tokenizer,
    "safety_checker": None,
    "requires_safety_checker": False,
    "pag_applied_layers": ["blocks.0"],
}

_EMBEDDINGS: dict[str, Any] = {
    "prompt": None,
    "use_resolution_binning": False,
    "control_image": picture,
    **{
        f"{end}prompt_embeds{second}": partial(normal, 1, 8, width, seed=seed)
        for end, seed in (("", 2), ("negative_", 3))
        for second, width in (("", WIDTH), ("_2", TEXT_WIDTH))
    },
    **{
        f"{end}prompt_attention_mask{second}": partial(torch.ones, 1, 8)
        for end in ("", "negative_")
        for second in ("", "_2")
    },
}


def _hunyuan(name: str) -> Small:
    arguments = {key: value for key, value in _EMBEDDINGS.items() if "ControlNet" in name or key != "control_image"}
    return flow(name, _HUNYUAN, arguments)


# DiT: classes of images


def _dit_transformer() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=LATENT_SIZE,
    )


_DIT: dict[str, Any] = {
    "transformer": _dit_transformer,
    "scheduler": partial(DDIMScheduler, clip_sample=False),
    "id2label": None,
}

# Latte and Allegro: videos


def _latte_transformer() -> Any:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=LATENT_SIZE,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH,
        video_length=4,
    )


def _allegro_transformer() -> Any:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=LATENT_SIZE,
        sample_width=LATENT_SIZE,
        sample_frames=2,
        caption_channels=TEXT_WIDTH,
    )


def _allegro_vae() -> Any:
    return diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        layers_per_block=1,
        norm_num_groups=4,
    )


_LATTE: dict[str, Any] = {
    **_TEXT,
    "transformer": _latte_transformer,
    "scheduler": partial(DDIMScheduler, clip_sample=False),
}

_ALLEGRO: dict[str, Any] = {
    **_TEXT,
    "transformer": _allegro_transformer,
    "vae": _allegro_vae,
    "scheduler": EulerAncestralDiscreteScheduler,
}

# Stable Audio 1


def _audio_transformer() -> Any:
    return diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=TEXT_WIDTH,
        time_proj_dim=16,
        global_states_input_dim=2 * TEXT_WIDTH,
        cross_attention_input_dim=TEXT_WIDTH,
    )


def _projection() -> Any:
    return class_of("projection_model", "StableAudioPipeline")(
        text_encoder_dim=TEXT_WIDTH, conditioning_dim=TEXT_WIDTH, min_value=0, max_value=8
    )


_AUDIO: dict[str, Any] = {
    **_TEXT,
    "tokenizer": partial(t5_tokenizer, max_length=32),
    "transformer": _audio_transformer,
    "projection_model": _projection,
    "vae": oobleck,
    "scheduler": lambda: diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    ),
}

_NAMES = ("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline", "HunyuanDiTControlNetPipeline")

PIPELINES: dict[str, Small] = {
    "PixArtAlphaPipeline": flow("PixArtAlphaPipeline", _PIXART, _UNCLEANED),
    "PixArtSigmaPipeline": flow("PixArtSigmaPipeline", _PIXART, _UNCLEANED),
    "PixArtSigmaPAGPipeline": flow("PixArtSigmaPAGPipeline", _PERTURBED, _UNCLEANED),
    **{name: _hunyuan(name) for name in _NAMES},
    "DiTPipeline": flow("DiTPipeline", _DIT, {"class_labels": [1], "output_type": "np"}),
    "LattePipeline": flow("LattePipeline", _LATTE, {"clean_caption": False, "video_length": 4}, output="frames"),
    "AllegroPipeline": flow("AllegroPipeline", _ALLEGRO, {"clean_caption": False}, output="frames"),
    "StableAudioPipeline": flow("StableAudioPipeline", _AUDIO, {"audio_end_in_s": 2.0}, output="audios"),
}
"""By the name of the class."""
