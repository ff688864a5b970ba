"""CogView 4 and GLM-Image, which are told the sizes of images; and EasyAnimate."""

from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from .flow_parts import FRAMES, NEGATIVE_PROMPT, flow, flow_scheduler, sixteen_channel_vae
from .language import TEXT_WIDTH, byte_tokenizer, decoder_config, qwen2_vl, t5_config
from .parts import LATENT_SIZE, Small, certain, picture, pil_picture, right_half

_LINEAR = partial(
    flow_scheduler,
    base_shift=0.25,
    max_shift=0.75,
    base_image_seq_len=256,
    use_dynamic_shifting=True,
    time_shift_type="linear",
)

_SHAPE: dict[str, Any] = {
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


def _cog_transformer(channels: int) -> Any:
    return diffusers.CogView4Transformer2DModel(
        **_SHAPE, in_channels=channels, pos_embed_max_size=LATENT_SIZE, sample_size=LATENT_SIZE
    )


def _glm_tokenizer() -> Any:
    return byte_tokenizer("PreTrainedTokenizerFast", ("<|endoftext|>", "[gMASK]"), start="[gMASK]")


def _glm() -> Any:
    return transformers.GlmModel(decoder_config("GlmConfig"))


_COGVIEW: dict[str, Any] = {
    "transformer": partial(_cog_transformer, 16),
    "scheduler": _LINEAR,
    "vae": sixteen_channel_vae,
    "text_encoder": _glm,
    "tokenizer": _glm_tokenizer,
}

# GLM-Image: a language model writes tokens of a small image, which a transformer makes a large one of

_GLM_IMAGE: dict[str, Any] = {
    **_COGVIEW,
    "transformer": lambda: diffusers.GlmImageTransformer2DModel(
        **_SHAPE, in_channels=16, prior_vq_quantizer_codebook_size=32
    ),
    "tokenizer": lambda: transformers.ByT5Tokenizer(),
    "text_encoder": lambda: transformers.T5EncoderModel(t5_config(vocab_size=384)),
    "processor": None,
    "vision_language_encoder": None,
}

_TOKENS: dict[str, Any] = {
    "prior_token_ids": partial(torch.arange, LATENT_SIZE * LATENT_SIZE // 4),
    "image": None,
}

# EasyAnimate


def _animate_transformer(channels: int) -> Any:
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=16,
        patch_size=2,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
    )


def _animate_vae() -> Any:
    network = diffusers.AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
        layers_per_block=1,
        norm_num_groups=4,
    )
    network.register_to_config(cache_mag_vae=True)  # of published configs; one of the pipelines asks for it
    return network


_ANIMATE: dict[str, Any] = {
    "transformer": partial(_animate_transformer, 16),
    "scheduler": partial(flow_scheduler, shift=5.0),
    "vae": _animate_vae,
    "text_encoder": qwen2_vl,
    "tokenizer": byte_tokenizer,
}


def _still() -> torch.Tensor:
    return picture()[:, :, None].repeat(1, 1, FRAMES, 1, 1)


def _still_mask() -> torch.Tensor:
    return right_half()[:, :, None].repeat(1, 1, FRAMES, 1, 1)


_NEGATIVE: dict[str, Any] = {"negative_prompt": NEGATIVE_PROMPT}

_animate = partial(flow, output="frames")

PIPELINES: dict[str, Small] = {
    "CogView4Pipeline": flow("CogView4Pipeline", _COGVIEW, guidance="separate"),
    "CogView4ControlPipeline": flow(
        "CogView4ControlPipeline",
        {**_COGVIEW, "transformer": partial(_cog_transformer, 32), "vae": lambda: certain(sixteen_channel_vae())},
        {"control_image": pil_picture},
        guidance="separate",
    ),
    "GlmImagePipeline": flow("GlmImagePipeline", _GLM_IMAGE, _TOKENS, guidance="separate"),
    "EasyAnimatePipeline": _animate("EasyAnimatePipeline", _ANIMATE, _NEGATIVE),
    "EasyAnimateInpaintPipeline": _animate(
        "EasyAnimateInpaintPipeline",
        {**_ANIMATE, "transformer": partial(_animate_transformer, 33), "vae": lambda: certain(_animate_vae())},
        {**_NEGATIVE, "video": _still, "mask_video": _still_mask},
    ),
}
"""By the name of the class."""
