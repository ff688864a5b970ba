"""Stable Diffusion 3: two CLIP encoders and T5, a transformer that joins text and image; and its ControlNets."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import flow, flow_scheduler, sixteen_channel_vae
from .language import TEXT_WIDTH, t5_encoder, t5_tokenizer
from .parts import LATENT_SIZE, WIDTH, Small, picture, projecting_text_encoder, right_half, tokenizer

_SHAPE: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": LATENT_SIZE,
}


def _transformer() -> Any:
    return diffusers.SD3Transformer2DModel(**_SHAPE)


def _controlnet(**changes: Any) -> Any:
    return diffusers.SD3ControlNetModel(**{**_SHAPE, "num_layers": 1, **changes})


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": partial(flow_scheduler, shift=3.0),
    "vae": partial(sixteen_channel_vae, scaling_factor=1.5305, shift_factor=0.0609),
    "text_encoder": projecting_text_encoder,
    "tokenizer": tokenizer,
    "text_encoder_2": projecting_text_encoder,
    "tokenizer_2": tokenizer,
    "text_encoder_3": t5_encoder,
    "tokenizer_3": t5_tokenizer,
}

# One more channel, for the mask
_INPAINTING: dict[str, Any] = {**_COMPONENTS, "controlnet": partial(_controlnet, extra_conditioning_channels=1)}

_PLAIN = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")

_PERTURBED = ("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline")

PIPELINES: dict[str, Small] = {
    **{name: flow(name, _COMPONENTS) for name in _PLAIN},
    **{name: flow(name, {**_COMPONENTS, "pag_applied_layers": ["blocks.0"]}) for name in _PERTURBED},
    "StableDiffusion3ControlNetPipeline": flow(
        "StableDiffusion3ControlNetPipeline", {**_COMPONENTS, "controlnet": _controlnet}
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": flow(
        "StableDiffusion3ControlNetInpaintingPipeline",
        _INPAINTING,
        {"control_image": picture, "control_mask": right_half},
    ),
}
"""By the name of the class."""
