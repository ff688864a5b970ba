"""Sana for videos: from a text, from an image, and along the way of a camera."""

from functools import partial
from typing import Any

import diffusers
import numpy as np

from .flow_parts import flow, flow_scheduler
from .language import TEXT_WIDTH
from .ltx2 import ltx2_vae
from .parts import LATENT_SIZE, Small
from .sana import SANA_CALL, SANA_SCHEDULER, SANA_TEXT
from .wan import wan_vae


def _transformer() -> Any:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SIZE,
        rope_max_seq_len=32,
    )


_VIDEO: dict[str, Any] = {
    **SANA_TEXT,
    "transformer": _transformer,
    "scheduler": partial(SANA_SCHEDULER, flow_shift=8.0),
    "vae": wan_vae,
}

_FROM_IMAGE: dict[str, Any] = {**_VIDEO, "scheduler": partial(flow_scheduler, shift=8.0)}

_CALL: dict[str, Any] = {**SANA_CALL, "frames": 5}


def _world_transformer() -> Any:
    return diffusers.SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        chunk_plucker_channels=6 * 4,  # the rays of as many frames as a latent stands for
        chunk_plucker_post_attn_blocks=2,
        image_size=32,
        caption_channels=TEXT_WIDTH,
        mixed_precision="fp32",
    )


_WORLD: dict[str, Any] = {
    **SANA_TEXT,
    "transformer": _world_transformer,
    "scheduler": partial(flow_scheduler, shift=8.0),
    "vae": ltx2_vae,
}

_WAY: dict[str, Any] = {
    "action": "w-4",  # four frames ahead
    "intrinsics": lambda: np.array([32.0, 32.0, 16.0, 16.0]),
    "chi_prompt": " ",
}

_video = partial(flow, output="frames")

PIPELINES: dict[str, Small] = {
    "SanaVideoPipeline": _video("SanaVideoPipeline", _VIDEO, _CALL),
    "SanaImageToVideoPipeline": _video("SanaImageToVideoPipeline", _FROM_IMAGE, _CALL),
    "SanaWMPipeline": _video("SanaWMPipeline", _WORLD, _WAY),
}
"""By the name of the class."""
