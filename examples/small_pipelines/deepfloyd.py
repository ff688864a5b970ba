"""DeepFloyd IF: pixels, and a variance predicted beside them. And the UNet that its kin share."""

from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from .parts import SIZE, WIDTH, Small, normal, picture, small, unet, zero_snr_scheduler


def variance_unet(channels: int, **changes: Any) -> UNet2DConditionModel:
    """Predicts `channels` and their variances, from the blocks of DeepFloyd IF, Kandinsky 2 and unCLIP."""
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": 2 * channels,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    }
    network = unet(**{**config, **changes})
    with torch.no_grad():
        # A trained one keeps the variances within [-1, 1]. Beyond, their noise would grow exponentially.
        network.conv_out.weight[channels:] *= 0.1
    return network


def variance_scheduler() -> DDPMScheduler:
    """DDPM, for the variances that a UNet predicts."""
    return zero_snr_scheduler(DDPMScheduler, variance_type="learned_range")


def _unet(**changes: Any) -> UNet2DConditionModel:
    # The embeddings of a text are projected, and pooled into the time embedding.
    text = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text"}
    return variance_unet(3, addition_embed_type_num_heads=2, **text, **changes)


def _enlarging_unet() -> UNet2DConditionModel:
    # It sees the noised small image beside its own, and is told the noise level as a class.
    return _unet(in_channels=6, class_embed_type="timestep")


# Texts come as embeddings: in transformers 4, T5's tokenizer needs a package more.
_COMPONENTS: dict[str, Any] = {
    "unet": _unet,
    "scheduler": variance_scheduler,
    "text_encoder": None,
    "tokenizer": None,
    "watermarker": None,
}

_ENLARGING: dict[str, Any] = {**_COMPONENTS, "unet": _enlarging_unet, "image_noising_scheduler": DDPMScheduler}

_ARGUMENTS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 4, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 4, WIDTH, seed=3),
    "output_type": "pt",
}


def _enlarging(name: str, **arguments: Any) -> Small:
    return small(name, _ENLARGING, _ARGUMENTS, image=partial(picture, SIZE // 2), **arguments)


PIPELINES: dict[str, Small] = {
    "IFPipeline": small("IFPipeline", _COMPONENTS, _ARGUMENTS),
    "IFImg2ImgPipeline": small("IFImg2ImgPipeline", _COMPONENTS, _ARGUMENTS),
    "IFInpaintingPipeline": small("IFInpaintingPipeline", _COMPONENTS, _ARGUMENTS),
    "IFSuperResolutionPipeline": _enlarging("IFSuperResolutionPipeline"),
    "IFImg2ImgSuperResolutionPipeline": _enlarging("IFImg2ImgSuperResolutionPipeline", original_image=picture),
    "IFInpaintingSuperResolutionPipeline": _enlarging("IFInpaintingSuperResolutionPipeline", original_image=picture),
}
"""By the name of the class."""
