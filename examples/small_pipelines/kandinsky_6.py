"""Kandinsky 6: videos with sound, and larger ones made of small ones, tile by tile."""

from functools import partial
from typing import Any

import diffusers
from PIL import Image

from .flow_parts import flow, flow_scheduler, video
from .hunyuan import hunyuan_video_vae
from .language import TEXT_WIDTH, SeeingProcessor, qwen2_5_vl
from .parts import SIZE, WIDTH, Small, normal, text_encoder, tokenizer

_SOUND_CHANNELS = 4


def _transformer() -> Any:
    return diffusers.Kandinsky6Transformer3DModel(
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=_SOUND_CHANNELS,
        out_audio_dim=_SOUND_CHANNELS,
        model_dim_a=16,
        time_dim_a=16,
        ff_dim_a=32,
        axes_dims_a=(16,),
        visual_token_type_num_embeddings=2,
    )


def _audio_vae() -> Any:
    return diffusers.MMAudioVAE(
        mel_bins=8,
        latent_channels=_SOUND_CHANNELS,
        hidden_channels=16,
        channel_multipliers=(1, 1),
        layers_per_block=1,
        sample_rate=256,
        n_fft=32,
        hop_length=8,
    )


def _vocoder() -> Any:
    return diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=16,
        upsample_rates=(4, 2),
        upsample_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": partial(flow_scheduler, shift=5.0),
    "vae": hunyuan_video_vae,
    "text_encoder": qwen2_5_vl,
    "tokenizer": SeeingProcessor,
    "text_encoder_2": text_encoder,
    "tokenizer_2": tokenizer,
    "audio_vae": _audio_vae,
    "vocoder": _vocoder,
}

_TEXTS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH),
    "pooled_prompt_embeds": partial(normal, 1, WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH, seed=3),
    "negative_pooled_prompt_embeds": partial(normal, 1, WIDTH, seed=3),
    "image": None,
}


def _enlarging_transformer() -> Any:
    return diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=8,
        out_visual_dim=8,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        tile_sizes=((SIZE, SIZE),),
    )


def _enlarging_vae() -> Any:
    return diffusers.Kandinsky6SRVAE(
        latent_channels=8,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        layers_per_block=1,
        temporal_compression_start_level=0,
    )


def _two_tiles() -> list[Image.Image]:
    return [frame.resize((24, 16)) for frame in video()]


_ENLARGING: dict[str, Any] = {
    "transformer": _enlarging_transformer,
    "vae": _enlarging_vae,
    "scheduler": partial(flow_scheduler, shift=5.0),
    "latent_upscaler": None,
}

PIPELINES: dict[str, Small] = {
    "Kandinsky6TI2VAPipeline": flow(
        "Kandinsky6TI2VAPipeline", _COMPONENTS, _TEXTS, output="frames", guidance="separate", updates=2
    ),
    "Kandinsky6SRPipeline": flow(
        "Kandinsky6SRPipeline",
        _ENLARGING,
        {"video": _two_tiles, "resolution_scale": 2, "output_type": "np"},
        output="frames",
        guidance="none",
        steps=lambda number: 2 * number,  # for each tile
    ),
}
"""By the name of the class."""
