"""CogVideoX and CogView 3: transformers whose schedules end in pure noise."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import flow, sixteen_channel_vae, video
from .language import TEXT_WIDTH, t5_encoder, t5_tokenizer
from .parts import LATENT_SIZE, Small

_SCHEDULER = partial(
    diffusers.CogVideoXDDIMScheduler,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
)


def _transformer(channels: int = 16) -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=5,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )


def _vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=32,
    )


_VIDEO: dict[str, Any] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": t5_encoder,
    "tokenizer": t5_tokenizer,
    "scheduler": _SCHEDULER,
}

_MORE: dict[str, Any] = {**_VIDEO, "transformer": partial(_transformer, 32)}  # latents of what is given, too


def _image_transformer() -> Any:
    return diffusers.CogView3PlusTransformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=LATENT_SIZE,
        sample_size=LATENT_SIZE,
    )


_IMAGE: dict[str, Any] = {
    **_VIDEO,
    "transformer": _image_transformer,
    "vae": sixteen_channel_vae,
    "scheduler": partial(_SCHEDULER, snr_shift_scale=4.0),
}

_video = partial(flow, output="frames")

PIPELINES: dict[str, Small] = {
    "CogVideoXPipeline": _video("CogVideoXPipeline", _VIDEO),
    "CogVideoXImageToVideoPipeline": _video("CogVideoXImageToVideoPipeline", _MORE),
    "CogVideoXVideoToVideoPipeline": _video("CogVideoXVideoToVideoPipeline", _VIDEO, {"video": video}),
    "CogVideoXFunControlPipeline": _video("CogVideoXFunControlPipeline", _MORE, {"control_video": video}),
    "CogView3PlusPipeline": flow("CogView3PlusPipeline", _IMAGE),
}
"""By the name of the class."""
