"""Flux.1 and what was made of it: guidance is an input of the transformer, and a second prediction is an option."""

from functools import partial
from typing import Any

import diffusers

from .flow_parts import NEGATIVE_PROMPT, flow, shifted_by_size, sixteen_channel_vae
from .language import TEXT_WIDTH, t5_encoder, t5_tokenizer
from .parts import SIZE, WIDTH, Small, pil_picture, text_encoder, tokenizer

_SHAPE: dict[str, Any] = {
    "in_channels": 64,  # 16 of latents, in patches of 2 x 2
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def _transformer(**changes: Any) -> Any:
    return diffusers.FluxTransformer2DModel(**{**_SHAPE, **changes})


def _controlnet() -> Any:
    return diffusers.FluxControlNetModel(**_SHAPE)


_COMPONENTS: dict[str, Any] = {
    "transformer": _transformer,
    "scheduler": shifted_by_size,
    "vae": sixteen_channel_vae,
    "text_encoder": text_encoder,
    "tokenizer": tokenizer,
    "text_encoder_2": t5_encoder,
    "tokenizer_2": t5_tokenizer,
    "image_encoder": None,
    "controlnet": _controlnet,
    "resolution": SIZE,
}


# Beside the latents: those of an image to follow; those of what is kept, with the pixels of a mask
_CONTROLLED = partial(_transformer, in_channels=128, out_channels=64)
_FILLING = partial(_transformer, in_channels=64 + 64 + 64, out_channels=64)

_NOTHING: dict[str, Any] = {}

# The pipeline puts the prompts into a text of its own.
_LONG_TEXTS: dict[str, Any] = {
    "text_encoder": partial(text_encoder, max_position_embeddings=256),
    "tokenizer": partial(tokenizer, max_length=256),
}

_EXAMPLES: dict[str, Any] = {
    "task_prompt": "a dark landscape becomes a bright one",
    "content_prompt": "a dark landscape",
    "image": lambda: [[pil_picture(), pil_picture()], [pil_picture(), None]],
    "max_sequence_length": 256,
}


def _plain(name: str, transformer: Any = _transformer, changes: Any = _NOTHING, /, **arguments: Any) -> Small:
    return flow(name, {**_COMPONENTS, "transformer": transformer, **changes}, arguments, guidance="none")


def _guided(name: str, /, **arguments: Any) -> Small:
    second = {"negative_prompt": NEGATIVE_PROMPT, "true_cfg_scale": 4.0}
    return flow(name, _COMPONENTS, {**second, **arguments}, guidance="separate")


PIPELINES: dict[str, Small] = {
    "FluxPipeline": _guided("FluxPipeline"),
    "FluxImg2ImgPipeline": _guided("FluxImg2ImgPipeline"),
    "FluxInpaintPipeline": _guided("FluxInpaintPipeline"),
    "FluxKontextPipeline": _guided("FluxKontextPipeline", max_area=SIZE * SIZE, _auto_resize=False),
    "FluxKontextInpaintPipeline": _guided("FluxKontextInpaintPipeline", max_area=SIZE * SIZE, _auto_resize=False),
    "FluxFillPipeline": _plain("FluxFillPipeline", _FILLING),
    "FluxControlPipeline": _plain("FluxControlPipeline", _CONTROLLED),
    "FluxControlImg2ImgPipeline": _plain("FluxControlImg2ImgPipeline", _CONTROLLED),
    "FluxControlInpaintPipeline": _plain("FluxControlInpaintPipeline", _CONTROLLED),
    "FluxControlNetPipeline": _guided("FluxControlNetPipeline", control_image=pil_picture),
    "FluxControlNetImg2ImgPipeline": _plain("FluxControlNetImg2ImgPipeline", control_image=pil_picture),
    "FluxControlNetInpaintPipeline": _plain("FluxControlNetInpaintPipeline", control_image=pil_picture),
    "VisualClozeGenerationPipeline": _plain("VisualClozeGenerationPipeline", _FILLING, _LONG_TEXTS, **_EXAMPLES),
    "VisualClozePipeline": _plain(
        "VisualClozePipeline", _FILLING, _LONG_TEXTS, **_EXAMPLES, upsampling_height=SIZE, upsampling_width=SIZE
    )._replace(steps=lambda number: 2 * number),  # the second time to enlarge
}
"""By the name of the class."""
