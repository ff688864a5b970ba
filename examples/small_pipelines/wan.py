"""Wan 2.1 and 2.2, and what was made of them: latents of videos, two predictions in calls of their own."""

from functools import partial
from typing import Any

import diffusers
import transformers

from .flow_parts import FRAMES, flow, flow_scheduler, pil_mask, unipc_scheduler, video
from .language import TEXT_WIDTH, t5_tokenizer, umt5_encoder
from .parts import WIDTH, Small, feature_extractor, normal, vision_config

WAN_SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
"""Of a transformer of Wan's kind."""

# Beside the latents: those of the image that a video starts with, and four of which frames are given; its features
FROM_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": WIDTH, "added_kv_proj_dim": 24}
"""What makes it one for videos that start with an image."""


def _transformer(**changes: Any) -> Any:
    return diffusers.WanTransformer3DModel(**{**WAN_SHAPE, **changes})


def _vace_transformer() -> Any:
    return diffusers.WanVACETransformer3DModel(**WAN_SHAPE, vace_layers=[0], vace_in_channels=2 * 16 + 4 * 4)


def wan_vae(**changes: Any) -> Any:
    """With latents of 16 channels; four pixels to a latent's side, four frames to one of latents beside the first."""
    config: dict[str, Any] = {
        "base_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 4,
    }
    return diffusers.AutoencoderKLWan(**{**config, **changes})


def image_features() -> Any:
    """CLIP's vision model, of which the last layer but one is looked at."""
    return transformers.CLIPVisionModel(vision_config())


WAN_COMPONENTS: dict[str, Any] = {
    "text_encoder": umt5_encoder,
    "tokenizer": t5_tokenizer,
    "vae": wan_vae,
    "scheduler": partial(unipc_scheduler, 3.0),
    "transformer": _transformer,
    "image_processor": feature_extractor,
    "image_encoder": image_features,
}

# Wan 2.2: another transformer below this part of the timesteps
_TWO: dict[str, Any] = {"transformer_2": _transformer, "boundary_ratio": 0.875}

# Texts come as embeddings: the pipelines clean them by a package that need not be there.
WAN_TEXTS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH),
    "negative_prompt_embeds": partial(normal, 1, 8, TEXT_WIDTH, seed=3),
}
"""What calls are given for texts."""


def wan(name: str, components: Any, /, **arguments: Any) -> Small:
    """A pipeline with what Wan's have."""
    return flow(
        name, {**WAN_COMPONENTS, **components}, {**WAN_TEXTS, **arguments}, output="frames", guidance="separate"
    )


PIPELINES: dict[str, Small] = {
    "WanPipeline": wan("WanPipeline", _TWO)._replace(denoisers=("transformer", "transformer_2")),
    "WanImageToVideoPipeline": wan("WanImageToVideoPipeline", {"transformer": partial(_transformer, **FROM_IMAGE)}),
    "WanVideoToVideoPipeline": wan("WanVideoToVideoPipeline", {}, video=video),
    "WanVACEPipeline": wan(
        "WanVACEPipeline", {"transformer": _vace_transformer}, video=video, mask=lambda: [pil_mask()] * FRAMES
    ),
    "LucyEditPipeline": wan("LucyEditPipeline", {"transformer": partial(_transformer, in_channels=32)}, video=video),
    "ChronoEditPipeline": wan(
        "ChronoEditPipeline",
        {
            "transformer": lambda: diffusers.ChronoEditTransformer3DModel(**{**WAN_SHAPE, **FROM_IMAGE}),
            "scheduler": partial(flow_scheduler, shift=2.0),
        },
    ),
}
"""By the name of the class."""
