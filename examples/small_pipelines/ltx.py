"""LTX-Video: one latent for many pixels; videos of images at any place, and longer ones than the network is for."""

from functools import partial
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from .flow_parts import flow, flow_scheduler
from .language import TEXT_WIDTH, t5_encoder, t5_tokenizer
from .parts import Small, pil_picture

_CHANNELS = 8


def _transformer() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )


def _vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=_CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )


LTX_SCHEDULER = partial(
    FlowMatchEulerDiscreteScheduler,
    use_dynamic_shifting=True,
    base_shift=0.95,
    max_shift=2.05,
    base_image_seq_len=1024,
    max_image_seq_len=4096,
    shift_terminal=0.1,
)
"""Shifted by the number of latents; the last one before the end is 0.1."""

_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": LTX_SCHEDULER,
    "vae": _vae,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
}

_ltx = partial(flow, output="frames")

PIPELINES: dict[str, Small] = {
    "LTXPipeline": _ltx("LTXPipeline", _COMPONENTS),
    "LTXImageToVideoPipeline": _ltx("LTXImageToVideoPipeline", _COMPONENTS),
    "LTXConditionPipeline": _ltx(
        "LTXConditionPipeline", {**_COMPONENTS, "scheduler": flow_scheduler}, {"strength": 1.0}
    ),
    "LTXI2VLongMultiPromptPipeline": _ltx(
        "LTXI2VLongMultiPromptPipeline",
        {**_COMPONENTS, "scheduler": lambda: diffusers.LTXEulerAncestralRFScheduler()},
        {"cond_image": pil_picture, "skip_steps_sigma_threshold": None},
        steps=lambda number: number - 1,  # the last timestep is taken for the end
    ),
}
"""By the name of the class."""
