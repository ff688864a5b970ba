"""Videos: AnimateDiff and its kin, Stable Video Diffusion, I2VGen-XL, and ModelScope's text to video."""

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    I2VGenXLUNet,
    MotionAdapter,
    SparseControlNetModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image

from .controlnet import controlnet
from .parts import (
    LATENT_SIZE,
    WIDTH,
    Small,
    certain,
    feature_extractor,
    image_encoder,
    pil_picture,
    small,
    unet,
    vae,
    zero_snr_scheduler,
)
from .stable_diffusion_xl import xl_unet

_FRAMES = 3


def _video() -> list[Image.Image]:
    return [pil_picture().rotate(90 * i) for i in range(_FRAMES)]


# AnimateDiff: Stable Diffusion, with layers between its own in which the frames of a video see each other


def _motion_adapter(**changes: Any) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **changes,
    )


def _sparse_controlnet() -> SparseControlNetModel:
    return SparseControlNetModel(
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8, 8),
        use_simplified_condition_embedding=False,  # it would draw latents, and not by the generator of the call
    )


_ANIMATED: dict[str, Any] = {"motion_adapter": _motion_adapter}

_CONTROLLED: dict[str, Any] = {**_ANIMATED, "controlnet": partial(controlnet, unet)}

_LENGTH: dict[str, Any] = {"num_frames": _FRAMES}

# Models of their own

_BLOCKS: dict[str, Any] = {"sample_size": LATENT_SIZE, "layers_per_block": 1, "cross_attention_dim": WIDTH}


def _stable_video_vae() -> AutoencoderKLTemporalDecoder:
    # As narrow as it can be, like the UNet: the norms have 32 groups.
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32,) * 3, layers_per_block=1
    )


def _stable_video_unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        num_attention_heads=2,
        addition_time_embed_dim=WIDTH,
        projection_class_embeddings_input_dim=3 * WIDTH,
        num_frames=_FRAMES,
        **_BLOCKS,
    )


def _unet_3d(kind: type = UNet3DConditionModel) -> Any:
    return kind(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        **_BLOCKS,
    )


_STABLE_VIDEO: dict[str, Any] = {
    "vae": _stable_video_vae,
    "unet": _stable_video_unet,
    "image_encoder": image_encoder,
    "feature_extractor": feature_extractor,
    "scheduler": partial(zero_snr_scheduler, EulerDiscreteScheduler),
}

_I2VGEN_XL: dict[str, Any] = {
    "vae": lambda: certain(vae()),
    "unet": partial(_unet_3d, I2VGenXLUNet),
    "image_encoder": image_encoder,
    "feature_extractor": feature_extractor,
}

# Stable Diffusion as it is: a first run, then one for all frames, of which each sees the first
_ZERO: dict[str, Any] = {"video_length": _FRAMES, "t0": 0, "t1": 1}

PIPELINES: dict[str, Small] = {
    "AnimateDiffPipeline": small("AnimateDiffPipeline", _ANIMATED, _LENGTH),
    "AnimateDiffPAGPipeline": small("AnimateDiffPAGPipeline", _ANIMATED, _LENGTH),
    "AnimateDiffSDXLPipeline": small("AnimateDiffSDXLPipeline", {**_ANIMATED, "unet": xl_unet}, _LENGTH),
    "AnimateDiffControlNetPipeline": small(
        "AnimateDiffControlNetPipeline", _CONTROLLED, _LENGTH, conditioning_frames=_video
    ),
    "AnimateDiffSparseControlNetPipeline": small(
        "AnimateDiffSparseControlNetPipeline",
        {**_ANIMATED, "controlnet": _sparse_controlnet},
        _LENGTH,
        conditioning_frames=lambda: _video()[:1],
    ),
    "AnimateDiffVideoToVideoPipeline": small("AnimateDiffVideoToVideoPipeline", _ANIMATED, video=_video),
    "AnimateDiffVideoToVideoControlNetPipeline": small(
        "AnimateDiffVideoToVideoControlNetPipeline", _CONTROLLED, video=_video, conditioning_frames=_video
    ),
    "PIAPipeline": small("PIAPipeline", {"motion_adapter": partial(_motion_adapter, conv_in_channels=9)}, _LENGTH),
    "StableVideoDiffusionPipeline": small("StableVideoDiffusionPipeline", _STABLE_VIDEO, max_guidance_scale=7.5),
    "I2VGenXLPipeline": small(
        "I2VGenXLPipeline",
        _I2VGEN_XL,
        _LENGTH,
        image=pil_picture,
        clip_skip=None,  # by default it looks into the text encoder, where transformers 5 has nothing for it
    ),
    "TextToVideoSDPipeline": small("TextToVideoSDPipeline", {"unet": _unet_3d}, _LENGTH),
    "VideoToVideoSDPipeline": small("VideoToVideoSDPipeline", {"unet": _unet_3d}, video=_video),
    "TextToVideoZeroPipeline": small("TextToVideoZeroPipeline", {}, _ZERO),
    "TextToVideoZeroSDXLPipeline": small("TextToVideoZeroSDXLPipeline", {"unet": xl_unet}, _ZERO),
}
"""By the name of the class."""
