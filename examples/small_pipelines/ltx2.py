"""LTX-2: videos with sound, denoised together, and guided three times over."""

import importlib
from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import flow, flow_scheduler
from .language import TEXT_WIDTH, decoder_config, gemma_tokenizer
from .ltx import LTX_SCHEDULER
from .parts import Small, normal

_CHANNELS = 8
"""Of latents, of the video as of a moment of its sound."""


def _transformer(**changes: Any) -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        vae_scale_factors=(4, 8, 8),
        audio_in_channels=_CHANNELS,
        audio_out_channels=_CHANNELS,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        **changes,
    )


def ltx2_vae() -> Any:
    """With latents of 8 channels, 8 pixels to a latent's side, four frames to one of latents beside the first."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=_CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )


def _audio_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=_CHANNELS, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=16
    )


def gemma3() -> Any:
    """Gemma 3, `TEXT_WIDTH` features for each token."""
    text = decoder_config("Gemma3TextConfig", gemma_tokenizer()).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 16})
    return transformers.Gemma3ForConditionalGeneration(config)


def _part(name: str) -> Any:
    """A class that is no part of diffusers' own names; older versions do not have its module."""
    return getattr(importlib.import_module("diffusers.pipelines.ltx2"), name)


def _connectors() -> Any:
    ends: dict[str, Any] = {}
    for end in ("video", "audio"):
        ends[f"{end}_connector_num_attention_heads"] = 2
        ends[f"{end}_connector_attention_head_dim"] = TEXT_WIDTH // 2
        ends[f"{end}_connector_num_layers"] = 1
        ends[f"{end}_connector_num_learnable_registers"] = 4
    return _part("LTX2TextConnectors")(caption_channels=TEXT_WIDTH, text_proj_in_factor=3, **ends)


def _vocoder() -> Any:
    return _part("LTX2Vocoder")(
        in_channels=32,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": LTX_SCHEDULER,
    "vae": ltx2_vae,
    "audio_vae": _audio_vae,
    "text_encoder": gemma3,
    "tokenizer": partial(gemma_tokenizer, padding_side="left"),
    "connectors": _connectors,
    "vocoder": _vocoder,
}

_CALL: dict[str, Any] = {"spatio_temporal_guidance_blocks": [0], "num_frames": 5}

# Beside both predictions: without attention in a block, and without what sound and video know of each other. The
# sound has a copy of the scheduler.
_ltx2 = partial(flow, output="frames", calls=3, updates=2)


def _upsampler() -> Any:
    return _part("LTX2LatentUpsamplerModel")(
        in_channels=_CHANNELS,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
        use_rational_resampler=False,
    )


_KEYFRAMES: dict[str, Any] = {
    **_COMPONENTS,
    "transformer": partial(_transformer, use_keyframes_abs_pos_embedding=True),
    "scheduler": flow_scheduler,
}

_REFINING: dict[str, Any] = {
    **_KEYFRAMES,
    "scheduler": lambda: diffusers.LTXEulerAncestralRFScheduler(eta=0.5),
    "temporal_latent_upsampler": _upsampler,
}

# What the pipeline for keyframes made, to have twice as many frames
_MADE: dict[str, Any] = {
    "latents": partial(normal, 1, _CHANNELS, 3, 4, 4),
    "keyframes_latents": partial(normal, 1, _CHANNELS, 1, 4, 4, seed=3),
    "keyframe_positions": [8],
    "audio_latents": partial(normal, 1, 2, 9, 4, seed=4),
    "num_frames": 9,
}


def _sigmas(number: int) -> dict[str, Any]:
    return {"sigmas": [1 - i / number for i in range(number)]}


PIPELINES: dict[str, Small] = {
    "LTX2Pipeline": _ltx2("LTX2Pipeline", _COMPONENTS, _CALL),
    "LTX2ImageToVideoPipeline": _ltx2("LTX2ImageToVideoPipeline", _COMPONENTS, {**_CALL, "image_crf": 0}),
    "LTX2ConditionPipeline": _ltx2("LTX2ConditionPipeline", _COMPONENTS, _CALL),
    "LTX2InContextPipeline": _ltx2("LTX2InContextPipeline", _COMPONENTS, _CALL),
    "LTX2HDRPipeline": _ltx2("LTX2HDRPipeline", _COMPONENTS, {"num_frames": 5}, calls=1),
    "LTX2DFRPipeline": _ltx2(
        "LTX2DFRPipeline",
        _KEYFRAMES,
        {"num_frames": 5},
        calls=1,
        guidance="none",
        ask=_sigmas,
    ),
    "LTX2DFRTemporalRefinePipeline": _ltx2(
        "LTX2DFRTemporalRefinePipeline", _REFINING, _MADE, calls=1, updates=1, guidance="none", ask=_sigmas
    ),
}
"""By the name of the class."""
