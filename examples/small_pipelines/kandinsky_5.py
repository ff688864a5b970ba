"""Kandinsky 5: images and videos by one kind of transformer."""

from functools import partial
from typing import Any

import diffusers
import torch

from .flow_parts import flow, flow_scheduler, sixteen_channel_vae
from .hunyuan import hunyuan_video_vae
from .language import TEXT_WIDTH, SeeingProcessor, qwen2_5_vl
from .parts import SIZE, WIDTH, Small, normal, text_encoder, tokenizer


def _transformer(visual_cond: bool) -> Any:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=visual_cond,
    )


_VIDEO: dict[str, Any] = {
    "transformer": partial(_transformer, True),
    "scheduler": partial(flow_scheduler, shift=5.0),
    "vae": hunyuan_video_vae,
    "text_encoder": qwen2_5_vl,
    "tokenizer": SeeingProcessor,
    "text_encoder_2": text_encoder,
    "tokenizer_2": tokenizer,
}

_IMAGE: dict[str, Any] = {
    **_VIDEO,
    "transformer": partial(_transformer, False),
    "scheduler": partial(flow_scheduler, shift=3.0),
    "vae": partial(sixteen_channel_vae, levels=4),  # 8 pixels to a latent's side, whatever the config says
}

_EDIT: dict[str, Any] = {**_IMAGE, "transformer": partial(_transformer, True)}


def _lengths() -> torch.Tensor:
    return torch.tensor([0, 8], dtype=torch.int32)


# Texts come as embeddings: the pipelines clean them by a package that need not be there.
_TEXTS: dict[str, Any] = {
    "prompt": None,
    "prompt_embeds_qwen": partial(normal, 1, 8, TEXT_WIDTH),
    "prompt_embeds_clip": partial(normal, 1, WIDTH),
    "prompt_cu_seqlens": _lengths,
    "negative_prompt_embeds_qwen": partial(normal, 1, 8, TEXT_WIDTH, seed=3),
    "negative_prompt_embeds_clip": partial(normal, 1, WIDTH, seed=3),
    "negative_prompt_cu_seqlens": _lengths,
}

_video = partial(flow, output="frames", guidance="separate")
_image = partial(flow, output="image", guidance="separate", attributes={"resolutions": [(SIZE, SIZE)]})

PIPELINES: dict[str, Small] = {
    "Kandinsky5T2VPipeline": _video("Kandinsky5T2VPipeline", _VIDEO, _TEXTS),
    "Kandinsky5I2VPipeline": _video("Kandinsky5I2VPipeline", _VIDEO, {**_TEXTS, "num_frames": 21}),
    "Kandinsky5T2IPipeline": _image("Kandinsky5T2IPipeline", _IMAGE, _TEXTS),
    "Kandinsky5I2IPipeline": _image("Kandinsky5I2IPipeline", _EDIT, _TEXTS),
}
"""By the name of the class."""
