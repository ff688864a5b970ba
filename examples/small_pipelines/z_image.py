"""Z-Image: texts and images in one sequence, given to the transformer as lists."""

from functools import partial
from typing import Any

import diffusers
import torch
import transformers

from .flow_parts import flow, flow_scheduler, sixteen_channel_vae
from .language import TEXT_WIDTH, byte_tokenizer, qwen3
from .parts import SIZE, Small, pil_picture

_SHAPE: dict[str, Any] = {"dim": 32, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}


def _transformer(**changes: Any) -> Any:
    return diffusers.ZImageTransformer2DModel(
        **_SHAPE, n_layers=2, cap_feat_dim=TEXT_WIDTH, axes_dims=[4, 6, 6], **changes
    )


def _controlnet(channels: int) -> Any:
    return diffusers.ZImageControlNetModel(
        **_SHAPE,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        add_control_noise_refiner="control_layers",
    )


def _siglip() -> Any:
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=8
    )
    return transformers.Siglip2VisionModel(config)


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": partial(flow_scheduler, shift=6.0),
    "vae": sixteen_channel_vae,
    "text_encoder": qwen3,
    "tokenizer": byte_tokenizer,
    "controlnet": partial(_controlnet, 16),
}

_INPAINTING: dict[str, Any] = {**_COMPONENTS, "controlnet": partial(_controlnet, 33)}

_SEEING: dict[str, Any] = {
    **_COMPONENTS,
    "transformer": partial(_transformer, siglip_feat_dim=16),
    "vae": lambda: sixteen_channel_vae().to(torch.bfloat16),  # what it encodes comes so, whatever the pipeline is
    "siglip": _siglip,
    "siglip_processor": lambda: transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
}

_NAMES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")

PIPELINES: dict[str, Small] = {
    **{name: flow(name, _COMPONENTS) for name in _NAMES},
    "ZImageControlNetPipeline": flow("ZImageControlNetPipeline", _COMPONENTS, {"control_image": pil_picture}),
    "ZImageControlNetInpaintPipeline": flow(
        "ZImageControlNetInpaintPipeline", _INPAINTING, {"control_image": pil_picture}
    ),
    "ZImageOmniPipeline": flow("ZImageOmniPipeline", _SEEING, {"image": partial(pil_picture, 2 * SIZE)}),
}
"""By the name of the class."""
