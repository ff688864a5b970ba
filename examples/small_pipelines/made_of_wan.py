"""What was made of Wan's transformer: SkyReels V2, AnyFlow, Helios and Wan-Animate."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import FRAMES, unipc_scheduler, video
from .parts import WIDTH, Small, image_encoder
from .wan import FROM_IMAGE, WAN_SHAPE, wan

# SkyReels V2: videos as long as one likes, some frames ahead of others


def _skyreels_transformer(**changes: Any) -> Any:
    return diffusers.SkyReelsV2Transformer3DModel(**{**WAN_SHAPE, **changes})


_SKYREELS: dict[str, Any] = {"transformer": _skyreels_transformer, "scheduler": partial(unipc_scheduler, 8.0)}

_FROM_PICTURE: dict[str, Any] = {
    **_SKYREELS,
    "scheduler": partial(unipc_scheduler, 5.0),
    "transformer": partial(_skyreels_transformer, **FROM_IMAGE),
    "image_encoder": image_encoder,
}

_FORCING: dict[str, Any] = {"num_frames": FRAMES, "base_num_frames": FRAMES}

# AnyFlow: steps from any time to any other, of which it is told both


def _any_flow_transformer() -> Any:
    shape = {key: value for key, value in WAN_SHAPE.items() if key != "qk_norm"}
    return diffusers.AnyFlowTransformer3DModel(**shape)


def _far_transformer() -> Any:
    # All in one piece: between pieces there are calls of a different kind.
    return diffusers.AnyFlowFARTransformer3DModel(**WAN_SHAPE, full_chunk_limit=1, chunk_partition=(2,))


def _any_flow_scheduler() -> Any:
    return diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)


_ANY_FLOW: dict[str, Any] = {"transformer": _any_flow_transformer, "scheduler": _any_flow_scheduler}

# Helios: piece by piece, from coarse to fine


def _helios_transformer() -> Any:
    shape = {key: value for key, value in WAN_SHAPE.items() if key != "rope_max_seq_len"}
    return diffusers.HeliosTransformer3DModel(**shape, rope_dim=(4, 4, 4))


_HELIOS: dict[str, Any] = {
    "transformer": _helios_transformer,
    "scheduler": lambda: diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
}

# With a third, as published, the noise of four neighbors is singular, and rounding decides whether a call fails.
_PYRAMID: dict[str, Any] = {**_HELIOS, "scheduler": lambda: diffusers.HeliosScheduler(gamma=0.333)}

_PIECES: dict[str, Any] = {"num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1], "image": None}


def _three_times(number: int) -> dict[str, Any]:
    return {"pyramid_num_inference_steps_list": [number] * 3}


# Wan-Animate: a person moves as another does


def _animating_transformer() -> Any:
    return diffusers.WanAnimateTransformer3DModel(
        **{**WAN_SHAPE, "in_channels": 36, "image_dim": WIDTH, "added_kv_proj_dim": 24},
        latent_channels=16,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


PIPELINES: dict[str, Small] = {
    "SkyReelsV2Pipeline": wan("SkyReelsV2Pipeline", _SKYREELS),
    "SkyReelsV2ImageToVideoPipeline": wan("SkyReelsV2ImageToVideoPipeline", _FROM_PICTURE),
    "SkyReelsV2DiffusionForcingPipeline": wan("SkyReelsV2DiffusionForcingPipeline", _SKYREELS, **_FORCING)._replace(
        updates=2  # each frame of latents has a copy of the scheduler
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": wan(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", _SKYREELS, **_FORCING
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": wan(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        _SKYREELS,
        **{**_FORCING, "num_frames": 2 * FRAMES - 1, "overlap_history": 1},
        video=video,
    )._replace(steps=lambda number: 2 * number),  # for as many frames as the network takes, and again
    "AnyFlowPipeline": wan("AnyFlowPipeline", _ANY_FLOW)._replace(guidance="stacked", calls=1),
    "AnyFlowFARPipeline": wan("AnyFlowFARPipeline", {**_ANY_FLOW, "transformer": _far_transformer})._replace(
        guidance="stacked", calls=1
    ),
    "HeliosPipeline": wan("HeliosPipeline", _HELIOS, **_PIECES),
    "HeliosPyramidPipeline": wan("HeliosPyramidPipeline", _PYRAMID, **_PIECES)._replace(
        ask=_three_times, steps=lambda number: 3 * number
    ),
    "WanAnimatePipeline": wan(
        "WanAnimatePipeline",
        {"transformer": _animating_transformer},
        pose_video=video,
        face_video=video,
        segment_frame_length=FRAMES,
    ),
}
"""By the name of the class."""
