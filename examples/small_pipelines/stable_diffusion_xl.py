"""Stable Diffusion XL, and a descendant of it for phones."""

from functools import partial
from typing import Any

import diffusers
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from .parts import LATENT_SIZE, WIDTH, Small, small, text_encoder, tokenizer, unet


def xl_unet(**changes: Any) -> UNet2DConditionModel:
    """Conditioned on the tokens of two encoders, on the text as a whole, and on the sizes of images."""
    config: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": WIDTH,
        "projection_class_embeddings_input_dim": WIDTH + 6 * WIDTH,  # the text, and six numbers
    }
    return unet(**{**config, **changes})


def _dreamlite_unet() -> UNet2DConditionModel:
    return diffusers.DreamLiteUNetModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        addition_embed_type="time",
        addition_time_embed_dim=WIDTH,
        projection_class_embeddings_input_dim=2 * WIDTH,
    )


def _tiny_vae() -> AutoencoderTiny:
    blocks = {f"{end}_block_out_channels": (8, 8, 8) for end in ("encoder", "decoder")}
    return AutoencoderTiny(num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **blocks)


# The pipeline puts the prompt into a text of some hundred letters, of which it drops the first 34 tokens.
DREAMLITE: dict[str, Any] = {
    "text_encoder": partial(text_encoder, max_position_embeddings=512, initializer_factor=50.0),
    "tokenizer": partial(tokenizer, max_length=512),
    "processor": None,
    "vae": _tiny_vae,
    "unet": _dreamlite_unet,
    "scheduler": partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
}

_NAMES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
)

PIPELINES: dict[str, Small] = {
    **{name: small(name, {"unet": xl_unet}) for name in _NAMES},
    "StableDiffusionXLInstructPix2PixPipeline": small(
        "StableDiffusionXLInstructPix2PixPipeline", {"unet": partial(xl_unet, in_channels=8)}
    ),
    "DreamLitePipeline": small("DreamLitePipeline", DREAMLITE, {"image": None}),
}
"""By the name of the class."""
